"""Datasets in Arrow and Parquet files: what Hugging Face's save_to_disk writes, the hub's Parquet layout, and plain Parquet with an image column."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.collection import Collection, RawSplit, Reader
from data_tools.readers.class_maps import class_names
from data_tools.readers.columns import Labels, Table, image_column, label_column
from data_tools.readers.split_names import OPTIONS, arrange, split_of
from fastssl.errors import DataError

_PARQUET = (".parquet", ".pq")


def _open_saved(source: str, options: Mapping[str, str]) -> Collection | None:
    """A folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    root = Path(source)
    if (root / "state.json").is_file():
        folders = {split_of(root.name): root}
    elif (root / "dataset_dict.json").is_file():
        folders = {name: root / name for name in _json(root / "dataset_dict.json").get("splits", [])}
    else:
        return None
    tables: dict[str, Table] = {}
    features: dict[str, Any] = {}
    for name, folder in folders.items():
        state = _json(folder / "state.json")
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise DataError(f"{str(folder)!r} was saved with a list of chosen rows beside its data; call flatten_indices() before save_to_disk")
        files = [folder / str(entry["filename"]) for entry in state.get("_data_files", [])]
        if not files:
            raise DataError(f"{str(folder / 'state.json')!r} names no data files; save the dataset again")
        tables[name] = Table(files)
        features |= _json(folder / "dataset_info.json").get("features") or {} if (folder / "dataset_info.json").is_file() else {}
    return _collection("hf_saved", root.resolve().name, tables, features, options, str(root))


def _open_parquet(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    if root.is_file() and root.suffix in _PARQUET:
        files, base = [root], root.parent
    elif root.is_dir():
        # a converted dataset has rows.parquet beside its dataset.json; it is no source
        files, base = sorted(file for file in root.rglob("*") if file.suffix in _PARQUET and not (file.parent / "dataset.json").is_file()), root
    else:
        return None
    if not files:
        return None
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(file.relative_to(base).as_posix()), []).append(file)
    tables = {name: Table(found) for name, found in by_split.items()}
    features: dict[str, Any] = {}
    for table in tables.values():
        features |= table.features()
    return _collection("parquet", root.resolve().stem, tables, features, options, str(root))


def _collection(kind: str, name: str, tables: dict[str, Table], features: Mapping[str, Any], options: Mapping[str, str], where: str) -> Collection:
    table = next(iter(tables.values()))
    image, label = image_column(table, features, options, where), label_column(table, features, options, where)
    noted = features.get(label, {}) if label else {}
    names = class_names(options["classes"]) if "classes" in options else tuple(map(str, noted.get("names") or ())) if isinstance(noted, dict) else ()
    reader = Labels(names)
    # A part without the label column is one without labels.
    labels = [reader.read(part, label if label in part.schema.names else None, f"{where} ({split})") for split, part in tables.items()]
    classes, labels = reader.finish(labels)
    for split, part in tables.items():
        if image not in part.schema.names:
            raise DataError(f"{where}: its part {split!r} has no column {image!r}; it has {', '.join(part.schema.names)}")
    parts: dict[str, RawSplit] = {split: part.split(split, image, own) for (split, part), own in zip(tables.items(), labels, strict=True)}
    return Collection(kind, name, classes, 3, arrange(parts, options))


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{str(file)!r} is missing or damaged ({error}); save the dataset again") from error
    if not isinstance(found, dict):
        raise DataError(f"{str(file)!r} does not hold a JSON object; save the dataset again")
    return found


_OPTIONS = ("image", "label", "classes", *OPTIONS)
SAVED = Reader("hf_saved", "Hugging Face datasets on disk (dataset_dict.json or state.json, as save_to_disk writes them)", _open_saved, _OPTIONS)
PARQUET = Reader("parquet", "Parquet files with an image column (data/train-00000-of-00001.parquet ..., the hub's layout)", _open_parquet, _OPTIONS)
