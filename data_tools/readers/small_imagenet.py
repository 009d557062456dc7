"""Downsampled ImageNet (32x32, 64x64): pickled batches of colour planes with labels from 1, as 1000 classes or as the 127 of ImageNet-127."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_tools.collection import ArraySplit, Collection, RawSplit, Reader, file_state
from data_tools.longtail import TEST_PER_CLASS, balanced_test, share_counts, size_order
from data_tools.readers.class_maps import class_names, superclasses
from data_tools.readers.joined import Joined, Picked, Relabelled
from data_tools.readers.listed import lines_of
from data_tools.readers.options import choice, whole
from data_tools.readers.safe_pickle import unpickle
from fastssl.errors import DataError

CLASSES = 1000
LABELED_SHARE = 0.1  # of ImageNet-127: its classes are numbered by their labelled images


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    if not (root / "train_data_batch_1").is_file():
        return None
    files: list[Path] = []
    while (root / f"train_data_batch_{len(files) + 1}").is_file():
        files.append(root / f"train_data_batch_{len(files) + 1}")
    beyond = sorted(set(root.glob("train_data_batch_*")) - set(files))
    if beyond:
        raise DataError(f"{str(root)!r} has {beyond[0].name} but lacks train_data_batch_{len(files) + 1}; fetch it")
    train, test = Joined(tuple(_batch(file) for file in files)), _batch(root / "val_data")
    names = _names(root, options)
    if "class_map" not in options:
        return Collection("small_imagenet", f"imagenet{test.pixels.shape[1]}", names, 3, {"train": train, "test": test})
    return _grouped(f"imagenet127-{test.pixels.shape[1]}", train, test, names, options)


def _names(root: Path, options: Mapping[str, str]) -> tuple[str, ...]:
    """Class names in label order: ``classes=FILE``, the published map_clsloc.txt (``n02119789 1 kit_fox``), else numbers."""
    table = root / "map_clsloc.txt"
    if "classes" in options:
        names = class_names(options["classes"])
    elif table.is_file():
        lines = [line.split() for line in lines_of(table)]
        if any(len(line) < 2 or not line[1].isdigit() for line in lines):
            raise DataError(f"{str(table)!r} is damaged: its lines should be a WordNet id, a number and a name")
        names = tuple(line[0] for line in sorted(lines, key=lambda line: int(line[1])))
    else:
        return tuple(str(i) for i in range(CLASSES))
    if len(names) != CLASSES:
        raise DataError(f"the class map names {len(names)} classes, downsampled ImageNet has {CLASSES}: wrong class map")
    return names


def _grouped(name: str, train: RawSplit, test: RawSplit, names: tuple[str, ...], options: Mapping[str, str]) -> Collection:
    """ImageNet-127's construction: superclasses, the balanced test, then classes numbered from the largest to the smallest.

    Source: the data code of CoSSL and SimPro; the test is drawn before classes are renumbered, by numpy's legacy generator.
    """
    table, groups = superclasses(options["class_map"], names)
    train_labels, test_labels = table[train.labels], table[test.labels]
    train, test = Relabelled(train, train_labels), Relabelled(test, test_labels)
    if choice(options, "test", ("balanced", "all")) == "balanced":
        test = Picked(test, balanced_test(test_labels, len(groups), TEST_PER_CLASS, whole(options, "seed", 0, 0, 2**32 - 1)))
    if choice(options, "renumber", ("yes", "no")) == "yes":
        order = size_order(share_counts(train_labels, len(groups), LABELED_SHARE))
        train, test = Relabelled(train, order[train.labels]), Relabelled(test, order[test.labels])
        groups = tuple(groups[i] for i in np.argsort(order).tolist())
    return Collection("small_imagenet", name, groups, 3, {"train": train, "test": test})


def _batch(file: Path) -> ArraySplit:
    """One batch file.  Its pixels are mapped where they lie in the pickle, so that ten files of 1.6 GB need no memory."""
    content = unpickle(file)
    found = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()} if isinstance(content, dict) else {}
    if "data" not in found or "labels" not in found:
        raise DataError(f"{str(file)!r} is no batch of downsampled ImageNet (data and labels are expected); fetch it again")
    data, labels = np.asarray(found["data"]), np.asarray(found["labels"], np.int64).reshape(-1)
    side = round((data.shape[1] / 3) ** 0.5) if data.ndim == 2 else 0
    if data.dtype != np.uint8 or not side or data.shape[1] != 3 * side * side or len(labels) != len(data) or not len(labels):
        raise DataError(f"{str(file)!r} has data {data.dtype}{list(data.shape)} and {len(labels)} labels, not uint8 [N, 3 * side * side] and N labels")
    if labels.min() < 1 or labels.max() > CLASSES:
        raise DataError(f"{str(file)!r} has labels {labels.min()}..{labels.max()}, published are 1..{CLASSES}; fetch it again")
    planes = _mapped(file, data).reshape(-1, 3, side, side)
    return ArraySplit(planes.transpose(0, 2, 3, 1), labels - 1, file.name, state=file_state(file))


def _mapped(file: Path, data: np.ndarray) -> np.ndarray:
    """The same numbers as a view of the file, found by their first bytes and compared to the end; ``data`` itself where the pickle holds them otherwise."""
    data = np.ascontiguousarray(data)
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(data.reshape(-1)[:4096].tobytes())
    if place < 0 or place + data.size > file.stat().st_size:
        return data
    view = np.memmap(file, np.uint8, "r", place, data.shape)
    step = max(1, (1 << 26) // data.shape[1])
    same = all(np.array_equal(view[start : start + step], data[start : start + step]) for start in range(0, len(data), step))
    return view if same else data


READER = Reader(
    "small_imagenet",
    "downsampled ImageNet batches (train_data_batch_1 ..., val_data); class_map=FILE makes ImageNet-127 of it",
    _open,
    ("classes", "class_map", "test", "renumber", "seed"),
)
