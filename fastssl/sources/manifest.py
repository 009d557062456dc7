"""The dataset folder's table of contents (dataset.json) and the label split files beside it, read with full validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from fastssl.errors import DataError, nearest
from fastssl.sources.split_text import read_split_text, rest_of

FORMAT_VERSION = 1
FORMATS = ("arrays", "ffcv", "dali")
MANIFEST_NAME = "dataset.json"
SPLIT_SUFFIXES = (".txt", ".json")  # text is what `fastssl-data split` writes; JSON was before


@dataclass(frozen=True)
class SplitInfo:
    """One official split ("train", "test"): row count, rows per class, the largest image in pixels and its files relative to the dataset folder.

    ``files`` by role; ``lists`` has the roles that several files fill, in order ("shards").
    ``rows_digest`` identifies the source bytes (encoded file or pixels) and labels in row order, whatever the storage format.
    """

    name: str
    count: int
    class_counts: tuple[int, ...]
    max_height: int
    max_width: int
    files: dict[str, str]
    labels: str
    rows_digest: str = ""
    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unlabeled: int = 0  # rows whose class nobody knows (label -1)

    @property
    def content(self) -> list[str]:
        """Every content file of the split, relative to the dataset folder."""
        return [*self.files.values(), *(name for names in self.lists.values() for name in names), self.labels]


@dataclass(frozen=True)
class Manifest:
    """What a converted dataset is: class names, channels, train mean and std in [0, 1] per channel, splits, digest of the content files."""

    root: Path
    name: str
    format: str
    classes: tuple[str, ...]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: dict[str, SplitInfo]
    source: dict[str, Any]
    options: dict[str, Any]
    digest: str

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> SplitInfo:
        """The split called ``name``; DataError with the nearest valid name otherwise."""
        if name not in self.splits:
            raise DataError(f"dataset {str(self.root)!r} has no split {name!r}{nearest(name, self.splits)}; it has {sorted(self.splits)}")
        return self.splits[name]


@dataclass(frozen=True)
class LabelSplit:
    """Which training rows count as labelled, unlabelled (never a labelled row) and held-out validation; int64 row arrays in the order the law drew them."""

    name: str
    law: str
    seed: int
    labeled: np.ndarray
    unlabeled: np.ndarray
    validation: np.ndarray
    digest: str
    of: str = "train"


def load_manifest(path: str | Path) -> Manifest:
    """Read and check ``path``/dataset.json.  Raises DataError for a missing folder, a folder that is no dataset, another format version or wrong content."""
    root = Path(path)
    file = root / MANIFEST_NAME
    if not root.exists():
        raise DataError(f"data folder {str(root)!r} does not exist; make one with `fastssl-data convert SOURCE {root}` or correct data.path")
    if not file.is_file():
        raise DataError(f"{str(root)!r} is not a converted dataset (no {MANIFEST_NAME} in it); make one with `fastssl-data convert SOURCE DEST`")
    raw = _read_json(file)
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(f"{str(file)!r} has format version {version!r}, this fastssl reads version {FORMAT_VERSION}; convert the dataset again")
    try:
        manifest = Manifest(
            root=root,
            name=str(raw["name"]),
            format=str(raw["format"]),
            classes=tuple(map(str, raw["classes"])),
            channels=int(raw["channels"]),
            mean=tuple(map(float, raw["mean"])),
            std=tuple(map(float, raw["std"])),
            splits={name: _split_info(name, entry) for name, entry in raw["splits"].items()},
            source=dict(raw.get("source", {})),
            options=dict(raw.get("options", {})),
            digest=str(raw["digest"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{str(file)!r} is damaged ({type(error).__name__}: {error}); convert the dataset again") from error
    _check(manifest, file)
    return manifest


def _split_info(name: str, entry: dict[str, Any]) -> SplitInfo:
    return SplitInfo(
        name=name,
        count=int(entry["count"]),
        class_counts=tuple(map(int, entry["class_counts"])),
        max_height=int(entry["max_height"]),
        max_width=int(entry["max_width"]),
        files={str(key): str(value) for key, value in entry["files"].items() if not isinstance(value, list)},
        lists={str(key): tuple(map(str, value)) for key, value in entry["files"].items() if isinstance(value, list)},
        labels=str(entry["labels"]),
        rows_digest=str(entry.get("rows_digest", "")),
        unlabeled=int(entry.get("unlabeled", 0)),
    )


def _check(manifest: Manifest, file: Path) -> None:
    where = f"{str(file)!r}"
    if manifest.format not in FORMATS:
        raise DataError(f"{where} names the unknown format {manifest.format!r}{nearest(manifest.format, FORMATS)}; known: {list(FORMATS)}")
    if manifest.channels not in (1, 3):
        raise DataError(f"{where} says {manifest.channels} channels; images have 1 or 3")
    if len(manifest.mean) != manifest.channels or len(manifest.std) != manifest.channels:
        raise DataError(f"{where} has {len(manifest.mean)} means and {len(manifest.std)} stds for {manifest.channels} channels; convert the dataset again")
    if not manifest.splits:
        raise DataError(f"{where} lists no split; convert the dataset again")
    for split in manifest.splits.values():
        if split.count <= 0:
            raise DataError(f"{where}: split {split.name!r} is empty; convert a source that has images in it")
        if len(split.class_counts) != manifest.num_classes:
            raise DataError(f"{where}: split {split.name!r} counts {len(split.class_counts)} classes but the dataset names {manifest.num_classes}")
        if sum(split.class_counts) + split.unlabeled != split.count:
            raise DataError(f"{where}: split {split.name!r} has {split.count} rows but its class counts sum to {sum(split.class_counts) + split.unlabeled}")


def load_labels(manifest: Manifest, split: str = "train") -> np.ndarray:
    """int64 labels [N] of a split, -1 where unknown, checked against the manifest's row and class counts (DataError when they disagree)."""
    info = manifest.split(split)
    labels = open_npy(manifest.root / info.labels, np.int64, (info.count,), mmap=False)
    low, high = int(labels.min()), int(labels.max())
    if low < (-1 if info.unlabeled else 0) or high >= manifest.num_classes:
        raise DataError(
            f"{str(manifest.root / info.labels)!r} has labels {low}..{high}, but the dataset names {manifest.num_classes} classes "
            f"(0..{manifest.num_classes - 1}); convert the dataset again"
        )
    counts = np.bincount(labels[labels >= 0], minlength=manifest.num_classes)
    if counts.tolist() != list(info.class_counts):
        bad = int(np.flatnonzero(counts != np.asarray(info.class_counts))[0])
        raise DataError(
            f"{str(manifest.root / info.labels)!r} has {int(counts[bad])} rows of class {bad} ({manifest.classes[bad]}), "
            f"{MANIFEST_NAME} says {info.class_counts[bad]}; convert the dataset again"
        )
    return labels


def load_sizes(manifest: Manifest, split: str = "train") -> np.ndarray | None:
    """int32 [N, 2] (height, width) of the images before conversion reduced them, or None where they were stored as they are."""
    info = manifest.split(split)
    if "sizes" not in info.files:
        return None
    sizes = open_npy(manifest.root / info.files["sizes"], np.int32, (info.count, 2), mmap=False)
    if sizes.min() < 1:
        raise DataError(f"{str(manifest.root / info.files['sizes'])!r} has sizes below 1; convert the dataset again")
    return sizes


def open_npy(file: Path, dtype: Any, shape: tuple[int, ...], *, mmap: bool = True) -> np.ndarray:
    """A .npy file that must have exactly this dtype and shape; read-only memory map unless ``mmap`` is False.  DataError when missing or truncated."""
    if not file.is_file():
        raise DataError(f"{str(file)!r} is missing from its dataset folder; convert the dataset again")
    try:
        array = np.load(file, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, TokenError) as error:  # numpy parses the header as Python
        raise DataError(f"{str(file)!r} is truncated or damaged ({error}); convert the dataset again") from error
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise DataError(f"{str(file)!r} holds {array.dtype}{list(array.shape)}, {MANIFEST_NAME} says {np.dtype(dtype)}{list(shape)}; convert the dataset again")
    return array


def split_digest(of: str, rows_digest: str, labeled: Iterable[int], unlabeled: Iterable[int], validation: Iterable[int]) -> str:
    """sha256 (hex) of a label split: the rows it draws, in order, and the data they index."""
    digest = hashlib.sha256(f"{of}\n{rows_digest}\n".encode())
    for name, rows in (("labeled", labeled), ("unlabeled", unlabeled), ("validation", validation)):
        data = np.asarray(rows, dtype="<i8")
        digest.update(f"{name} {data.size}\n".encode())
        digest.update(data.tobytes())
    return digest.hexdigest()


def split_files(root: Path) -> list[Path]:
    """The label split files of the dataset folder ``root``, by name."""
    folder = root / "splits"
    files = [file for file in folder.iterdir() if file.suffix in SPLIT_SUFFIXES and file.is_file()] if folder.is_dir() else []
    return sorted(files, key=lambda file: (file.stem, file.suffix))


def find_split(root: Path, name_or_path: str | Path) -> Path:
    """The file of a label split by name (``<root>/splits/<name>.txt`` or ``.json``) or by path; DataError with the nearest name where there is none."""
    text = str(name_or_path)
    places = [Path(text)] if text.endswith(SPLIT_SUFFIXES) else [root / "splits" / f"{text}{suffix}" for suffix in SPLIT_SUFFIXES]
    found = next((file for file in places if file.is_file()), None) if text else None
    if found is None:
        have = sorted({entry.stem for entry in split_files(root)})
        raise DataError(
            f"no label split {text!r} for {str(root)!r}{nearest(text, have)}; it has {have}; "
            f"draw one with `fastssl-data split make {root} --name NAME --law tllib --per-class 4`"
        )
    return found


def load_split(manifest: Manifest, name_or_path: str | Path) -> LabelSplit:
    """A label split by name (``<dataset>/splits/<name>.txt`` or ``.json``) or by path.

    Raises DataError when it is missing, damaged, drawn for other data, empty, or names rows that the dataset does not have or names twice.
    """
    file = find_split(manifest.root, name_or_path)
    raw = read_split_text(file) if file.suffix == ".txt" else _read_json(file)
    if file.suffix != ".txt" and raw.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{str(file)!r} has format version {raw.get('format_version')!r}, this fastssl reads version {FORMAT_VERSION}; draw the split again")
    if file.suffix == ".txt" and raw["unlabeled"] is None and str(raw["of"]) in manifest.splits:
        raw["unlabeled"] = rest_of(manifest.split(raw["of"]).count, raw["labeled"], raw["validation"])
    try:
        rows = {key: np.asarray(raw[key], dtype=np.int64).reshape(-1) for key in ("labeled", "unlabeled", "validation")}
        of, recorded = str(raw.get("of", "train")), str(raw["digest"])
        split = LabelSplit(str(raw["name"]), str(raw["law"]), int(raw["seed"]), rows["labeled"], rows["unlabeled"], rows["validation"], recorded, of)
        dataset_digest, rows_digest = str(raw["dataset_digest"]), str(raw.get("rows_digest", ""))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{str(file)!r} is damaged ({type(error).__name__}: {error}); draw the split again") from error
    info = manifest.split(of)
    # The same rows in another storage format are the same data: a split drawn for one may be used with the other.
    if dataset_digest != manifest.digest and (not rows_digest or rows_digest != info.rows_digest):
        raise DataError(
            f"label split {str(file)!r} was drawn for other data ({raw.get('dataset')!r}, digest {dataset_digest[:12]}) than {str(manifest.root)!r} "
            f"(digest {manifest.digest[:12]}); draw it again with `fastssl-data split`"
        )
    if split_digest(of, rows_digest, *rows.values()) != recorded:
        raise DataError(f"label split {str(file)!r} does not match its own digest: it was edited or damaged; draw it again")
    if split.labeled.size == 0:
        raise DataError(f"label split {str(file)!r} has no labelled rows; draw one with --per-class or --fraction above zero")
    every = np.concatenate(list(rows.values()))
    if every.min() < 0 or every.max() >= info.count:
        bad = int(every.max() if every.max() >= info.count else every.min())
        raise DataError(f"label split {str(file)!r} names row {bad}, {of!r} has rows 0..{info.count - 1}")
    if np.unique(every).size != every.size:
        raise DataError(f"label split {str(file)!r} names a row twice (labelled, unlabelled and validation rows must be disjoint); draw it again")
    if info.unlabeled:
        _check_known(manifest, split, file)
    return split


def _check_known(manifest: Manifest, split: LabelSplit, file: Path) -> None:
    """Labelled and validation rows need a class; rows of unknown class (-1) may only be unlabelled."""
    labels = load_labels(manifest, split.of)
    for side, rows in (("labelled", split.labeled), ("validation", split.validation)):
        unknown = rows[labels[rows] < 0]
        if unknown.size:
            raise DataError(
                f"label split {str(file)!r} has {unknown.size} {side} rows whose class nobody knows (label -1), first row {unknown[0]}; draw it again"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{str(file)!r} cannot be read as JSON ({error}); make it again") from error
    if not isinstance(raw, dict):
        raise DataError(f"{str(file)!r} does not hold a JSON object; make it again")
    return raw
