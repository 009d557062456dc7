"""Rows of a dataset and the names and places that others call them by, in both directions: importing and exporting lists of images."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.atomic import write_file
from data_tools.split_lists import Listed
from fastssl.errors import DataError, nearest
from fastssl.sources.manifest import LabelSplit, Manifest, load_labels

EXPORTS = ("names", "paths", "csv", "npy", "index")
_SHOWN = 3


def find_rows(manifest: Manifest, split: str, listed: Listed, *, skip_missing: bool = False) -> tuple[np.ndarray, int]:
    """(int64 row of each image of the list in the list's order, how many were skipped because the dataset does not have them).

    Names are compared with the keys in rows.parquet from the end: the base name must fit, and every folder that the list gives.  Places are positions in the
    source's own order (that of torchvision's ImageFolder for class folders), which differ from rows where conversion left bad images out.
    Labels in the list must be the dataset's.  Raises DataError for images that are missing (unless ``skip_missing``) or not told apart by their names.
    """
    info = manifest.split(split)
    rows = _by_name(manifest, split, listed) if listed.names is not None else _by_place(manifest, split, listed)
    missing = np.flatnonzero(rows < 0)
    if len(missing) and (not skip_missing or len(missing) == len(rows)):
        shown = ", ".join(repr(listed.names[i]) if listed.names is not None else str(listed.places[i]) for i in missing[:_SHOWN].tolist())  # type: ignore[index]
        raise DataError(
            f"{listed.file!r} lists {len(missing)} of {len(listed)} images that {split} of {str(manifest.root)!r} does not have ({shown}"
            f"{', ...' if len(missing) > _SHOWN else ''}); it has rows 0..{info.count - 1} (bad.parquet lists images left out). --skip-missing takes the others"
        )
    found = rows[rows >= 0]
    if listed.labels is not None:
        own = load_labels(manifest, split)[found]
        wrong = np.flatnonzero(own != listed.labels[rows >= 0])
        if len(wrong):
            where, says = int(wrong[0]), int(listed.labels[rows >= 0][wrong[0]])
            raise DataError(
                f"{listed.file!r} gives row {found[where]} the label {says}, the dataset says {own[where]} ({manifest.classes[own[where]]}), {len(wrong)} "
                "differ in all: the list numbers classes otherwise or belongs to other data; remove its label column if only the numbering differs"
            )
    return found, len(missing)


def _by_name(manifest: Manifest, split: str, listed: Listed) -> np.ndarray:
    assert listed.names is not None
    wanted: dict[str, list[int]] = {}
    parts = [name.replace("\\", "/").strip("/").removeprefix("./") for name in listed.names]
    for place, name in enumerate(parts):
        wanted.setdefault(name.rsplit("/", 1)[-1], []).append(place)
    rows = np.full(len(parts), -1, np.int64)
    for row, key in _keys(manifest, split):
        for place in wanted.get(key.rsplit("/", 1)[-1], ()):
            if key != parts[place] and not key.endswith("/" + parts[place]):
                continue
            if rows[place] >= 0:
                raise DataError(
                    f"{listed.file!r}: {listed.names[place]!r} fits several images of the dataset (rows {rows[place]} and {row}); "
                    "the list must give their folders too, as far as they tell them apart"
                )
            rows[place] = row
    return rows


def _by_place(manifest: Manifest, split: str, listed: Listed) -> np.ndarray:
    assert listed.places is not None
    source = source_places(manifest, split)
    if int(listed.places.min()) < 0:
        raise DataError(f"{listed.file!r} names place {int(listed.places.min())}; places are counted from 0")
    spot = np.minimum(np.searchsorted(source, listed.places), len(source) - 1)
    return np.where(source[spot] == listed.places, spot, -1)


def source_places(manifest: Manifest, split: str) -> np.ndarray:
    """Position in the source of each row, int64 [N] ascending: the row itself, except where images before it were left out."""
    count = manifest.split(split).count
    bad = _bad_places(manifest, split)
    return np.setdiff1d(np.arange(count + len(bad)), bad, assume_unique=True)


def _bad_places(manifest: Manifest, split: str) -> np.ndarray:
    file = manifest.root / "bad.parquet"
    if not file.is_file():
        return np.zeros(0, np.int64)
    try:
        table = pq.read_table(file, columns=["split", "row"])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{str(file)!r} is damaged ({str(error).splitlines()[0]}); convert the dataset again") from error
    return np.array([row for name, row in zip(table["split"].to_pylist(), table["row"].to_pylist(), strict=True) if name == split], np.int64)


def _keys(manifest: Manifest, split: str) -> Iterator[tuple[int, str]]:
    """(row, key) of a split as rows.parquet has them, read in pieces."""
    file = manifest.root / "rows.parquet"
    try:
        for batch in pq.ParquetFile(file).iter_batches(65536, columns=["split", "row", "key"]):
            for name, row, key in zip(*(batch.column(i).to_pylist() for i in range(3)), strict=True):
                if name == split:
                    yield row, key
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{str(file)!r} is missing or damaged ({str(error).splitlines()[0]}); convert the dataset again") from error


def export_rows(manifest: Manifest, split: LabelSplit, out: str | Path, *, form: str = "names", side: str = "labeled") -> int:
    """Write one side of a label split as a list for other code; returns how many images.

    ``names``: base name per line; ``paths``: key and label per line; ``csv``: a column Index; ``npy``: int64; ``index``: a number per line.  The last three
    hold places in the source's order, as ``find_rows`` takes them.  DataError where base names would not tell the images apart.
    """
    if form not in EXPORTS:
        raise DataError(f"unknown form {form!r}{nearest(form, EXPORTS)}; known: {', '.join(EXPORTS)}")
    sides = ("labeled", "unlabeled", "validation")
    if side not in sides:
        raise DataError(f"unknown side {side!r}{nearest(side, sides)}; known: {', '.join(sides)}")
    rows = getattr(split, side)
    if not len(rows):
        raise DataError(f"split {split.name!r} has no {side} rows to export")
    write_file(Path(out), _rendered(manifest, split.of, rows, form))
    return len(rows)


def _rendered(manifest: Manifest, of: str, rows: np.ndarray, form: str) -> bytes:
    if form in ("names", "paths"):
        keys = _keys_of(manifest, of, rows, distinct=form == "names")
        labels = load_labels(manifest, of)[rows].tolist() if form == "paths" else []
        lines = [f"{key} {label}" for key, label in zip(keys, labels, strict=True)] if form == "paths" else [key.rsplit("/", 1)[-1] for key in keys]
        return ("\n".join(lines) + "\n").encode("utf-8")
    places = source_places(manifest, of)[rows]
    if form == "npy":
        buffer = io.BytesIO()
        np.save(buffer, places.astype(np.int64))
        return buffer.getvalue()
    if form == "index":
        return ("\n".join(map(str, places.tolist())) + "\n").encode()
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["Index"], *([place] for place in places.tolist())])
    return text.getvalue().encode()


def _keys_of(manifest: Manifest, of: str, rows: np.ndarray, *, distinct: bool) -> list[str]:
    position = np.full(manifest.split(of).count, -1, np.int64)
    position[rows] = np.arange(len(rows))
    keys = [""] * len(rows)
    for row, key in _keys(manifest, of):
        if position[row] >= 0:
            keys[position[row]] = key
    if distinct:
        wanted = {key.rsplit("/", 1)[-1] for key in keys}
        seen: set[str] = set()
        for _, key in _keys(manifest, of):
            name = key.rsplit("/", 1)[-1]
            if name in wanted:
                if name in seen:
                    raise DataError(f"several images are called {name!r}: base names do not tell them apart; export with --form paths")
                seen.add(name)
    return keys
