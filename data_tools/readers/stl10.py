"""STL-10 in its binary form: 5000 labelled, 8000 test and 100 000 unlabelled images of 96x96, with the ten official folds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_tools.collection import UNKNOWN, ArraySplit, Collection, RawSplit, Reader, file_state
from data_tools.readers.joined import join
from data_tools.readers.listed import find_below, integer, lines_of
from data_tools.readers.options import choice
from fastssl.errors import DataError

SIDE = 96
_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    folder = find_below(Path(source), ("stl10_binary",), ("train_X.bin",))
    if folder is None:
        return None
    labeled, test = (_split(folder, f"{name}_X.bin", f"{name}_y.bin", name) for name in ("train", "test"))
    rest = None
    if choice(options, "unlabeled", ("yes", "no")) == "yes":
        rest = _split(folder, "unlabeled_X.bin", None, "unlabeled")
    names = folder / "class_names.txt"
    classes = tuple(lines_of(names)) if names.is_file() else _CLASSES
    splits: dict[str, RawSplit] = {"train": join(labeled, rest), "test": test}
    return Collection("stl10", "stl10", classes, 3, splits, _folds(folder / "fold_indices.txt", labeled.count))


def _split(folder: Path, images: str, labels: str | None, prefix: str) -> ArraySplit:
    """Images are stored as three colour planes, each column by column; labels count from 1.  Nothing is read before it is used."""
    file = folder / images
    state = file_state(file)
    size = file.stat().st_size
    if not size or size % (3 * SIDE * SIDE):
        raise DataError(f"{str(file)!r} is truncated: {size} bytes are no whole number of {SIDE}x{SIDE} images; fetch the collection again")
    pixels = np.memmap(file, np.uint8, "r").reshape(-1, 3, SIDE, SIDE).transpose(0, 3, 2, 1)
    if labels is None:
        return ArraySplit(pixels, np.full(len(pixels), UNKNOWN, np.int64), prefix, state=state)
    known = np.fromfile(folder / labels, np.uint8) if (folder / labels).is_file() else np.zeros(0, np.uint8)
    if len(known) != len(pixels) or known.min() < 1:
        raise DataError(f"{str(folder / labels)!r} is missing or damaged: {len(pixels)} labels from 1 are needed; fetch the collection again")
    return ArraySplit(pixels, known.astype(np.int64) - 1, prefix, state=f"{state}\n{file_state(folder / labels)}")


def _folds(file: Path, count: int) -> dict[str, np.ndarray]:
    """One fold per line: the rows of the labelled images that it uses."""
    if not file.is_file():
        return {}
    folds = {}
    for number, line in enumerate(lines_of(file)):
        rows = np.array([integer(word, str(file)) for word in line.split()], np.int64)
        if rows.min() < 0 or rows.max() >= count or len(np.unique(rows)) != len(rows):
            raise DataError(f"{str(file)!r}: fold {number} names rows outside 0..{count - 1} or one twice; fetch the collection again")
        folds[f"fold{number}"] = rows
    return folds


READER = Reader("stl10", "STL-10 binary (train_X.bin, test_X.bin, unlabeled_X.bin ...)", _open, ("unlabeled",))
