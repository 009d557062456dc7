"""CIFAR-10 and CIFAR-100 as python batches: pickled colour planes, as published and as torchvision keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_tools.collection import ArraySplit, Collection, Reader, file_state
from data_tools.readers.safe_pickle import unpickle

_LAYOUTS = (
    ("cifar10", "batches.meta", b"labels", b"label_names", [f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
    ("cifar100", "meta", b"fine_labels", b"fine_label_names", ["train"], "test"),
)


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    for folder in (root, root / "cifar-10-batches-py", root / "cifar-100-python"):
        for name, meta, label_key, name_key, train, test in _LAYOUTS:
            if (folder / meta).is_file() and (folder / train[0]).is_file():
                classes = tuple(text.decode() for text in unpickle(folder / meta)[name_key])
                splits = {"train": _split(folder, train, label_key, "train"), "test": _split(folder, [test], label_key, "test")}
                return Collection("cifar_batches", name, classes, 3, splits)
    return None


def _split(folder: Path, files: list[str], label_key: bytes, split: str) -> ArraySplit:
    parts = [unpickle(folder / file) for file in files]
    planes = np.concatenate([np.asarray(part[b"data"], np.uint8) for part in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([np.asarray(part[label_key], np.int64) for part in parts])
    return ArraySplit(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels, split, state="\n".join(file_state(folder / file) for file in files))


READER = Reader("cifar_batches", "CIFAR python batches (data_batch_1 ... or train and test, with their meta file)", _open)
