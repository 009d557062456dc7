"""SVHN's cropped digits: train_32x32.mat and test_32x32.mat, with the 531 131 easier digits of extra_32x32.mat where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_tools.collection import ArraySplit, Collection, RawSplit, Reader, file_state
from data_tools.readers.joined import join, without_labels
from data_tools.readers.mat_files import read_mat
from data_tools.readers.names import DIGITS
from data_tools.readers.options import choice
from fastssl.errors import DataError


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    if not (root / "train_32x32.mat").is_file():
        return None
    extra = choice(options, "extra", ("no", "train", "unlabeled"))
    train: RawSplit = _split(root, "train")
    if extra != "no":
        more = _split(root, "extra")
        train = join(train, more if extra == "train" else without_labels(more))
    return Collection("svhn", "svhn", DIGITS, 3, {"train": train, "test": _split(root, "test")})


def _split(root: Path, name: str) -> ArraySplit:
    """``X`` uint8 [32, 32, 3, N], ``y`` 1..10 where 10 is the digit 0."""
    file = root / f"{name}_32x32.mat"
    found = read_mat(file, ("X", "y"), squeeze=False)
    pixels, labels = found["X"], found["y"].astype(np.int64).reshape(-1)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3) or len(labels) != pixels.shape[3] or not 1 <= labels.min():
        raise DataError(f"{str(file)!r} has X {pixels.dtype}{list(pixels.shape)} and {len(labels)} labels, not [32, 32, 3, N] and N labels from 1")
    return ArraySplit(pixels.transpose(3, 0, 1, 2), labels % 10, name, state=file_state(file))


READER = Reader("svhn", "SVHN (train_32x32.mat, test_32x32.mat; extra=train|unlabeled uses extra_32x32.mat)", _open, ("extra",))
