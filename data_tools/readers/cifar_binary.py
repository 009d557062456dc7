"""CIFAR-10 and CIFAR-100 in their binary form: fixed-size records of label bytes and colour planes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_tools.collection import ArraySplit, Collection, Reader, file_state
from data_tools.readers.listed import find_below, lines_of
from data_tools.readers.options import choice
from fastssl.errors import DataError

_PIXELS = 3 * 32 * 32


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    ten = find_below(root, ("cifar-10-batches-bin",), ("data_batch_1.bin",))
    if ten is not None:
        classes = tuple(lines_of(ten / "batches.meta.txt"))
        splits = {"train": _split(ten, [f"data_batch_{i}.bin" for i in range(1, 6)], 1, 0, "train"), "test": _split(ten, ["test_batch.bin"], 1, 0, "test")}
        return Collection("cifar_binary", "cifar10", classes, 3, splits)
    hundred = find_below(root, ("cifar-100-binary",), ("train.bin", "test.bin"))
    if hundred is None:
        return None
    kind = choice(options, "labels", ("fine", "coarse"))
    classes = tuple(lines_of(hundred / f"{kind}_label_names.txt"))
    splits = {name: _split(hundred, [f"{name}.bin"], 2, int(kind == "fine"), name) for name in ("train", "test")}
    return Collection("cifar_binary", "cifar100" if kind == "fine" else "cifar20", classes, 3, splits)


def _split(folder: Path, files: list[str], label_bytes: int, which: int, prefix: str) -> ArraySplit:
    records = []
    for name in files:
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0
        if not size or size % (label_bytes + _PIXELS):
            raise DataError(f"{str(file)!r} is missing or truncated ({size} bytes are no whole number of images); fetch the collection again")
        records.append(np.fromfile(file, np.uint8).reshape(-1, label_bytes + _PIXELS))
    rows = np.concatenate(records)
    pixels = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ArraySplit(pixels, rows[:, which].astype(np.int64), prefix, state="\n".join(file_state(folder / name) for name in files))


READER = Reader("cifar_binary", "CIFAR binary version (data_batch_1.bin ... or train.bin and test.bin)", _open, ("labels",))
