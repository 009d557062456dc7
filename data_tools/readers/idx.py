"""IDX files of unsigned bytes (MNIST, Fashion-MNIST), plain or gzipped."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_tools.collection import ArraySplit, Collection, Reader, file_state
from data_tools.readers.names import DIGITS
from fastssl.errors import DataError


def find_idx(root: Path, stem: str) -> Path | None:
    """The IDX file called ``stem`` (gz or not) in ``root`` or torchvision's raw/ subfolders."""
    for folder in (root, root / "raw", *sorted(root.glob("*/raw"))):
        for file in (folder / stem, folder / f"{stem}.gz"):
            if file.is_file():
                return file
    return None


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    if find_idx(root, "train-images-idx3-ubyte") is None:
        return None
    splits = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images, labels = f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"
        pixels, classes = read_idx(root, images), read_idx(root, labels)
        state = "\n".join(file_state(file) for file in (find_idx(root, images), find_idx(root, labels)) if file is not None)
        splits[split] = ArraySplit(pixels[..., None], classes.astype(np.int64), split, state=state)
    return Collection("idx", root.name, DIGITS, 1, splits)


def read_idx(root: Path, stem: str) -> np.ndarray:
    """An IDX file of unsigned bytes: magic 0, 0, 8, ndim, then big-endian int32 sizes, then the data."""
    file = find_idx(root, stem)
    if file is None:
        raise DataError(f"{str(root)!r} lacks {stem}[.gz]; fetch the collection again")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if len(data) < 4 or data[:3] != b"\0\0\x08":
            raise ValueError("no IDX header of unsigned bytes")
        shape = tuple(np.frombuffer(data, ">i4", count=data[3], offset=4).tolist())
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{str(file)!r} is truncated or damaged ({error}); fetch the collection again") from error


READER = Reader("idx", "IDX files (train-images-idx3-ubyte[.gz] ...)", _open)
