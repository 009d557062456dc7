"""A folder of images without class folders, searched recursively: no labels, or those that a list names."""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from data_tools.collection import UNKNOWN, Collection, FileSplit, Keys, Reader
from data_tools.readers.class_folders import walk_images
from data_tools.readers.class_maps import class_names
from data_tools.readers.listed import lines_of
from data_tools.readers.names import IMAGE_SUFFIXES
from fastssl.errors import DataError


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    if not root.is_dir():
        return None
    classes: tuple[str, ...] = class_names(options["classes"]) if "classes" in options else ()
    table = _Labels(Path(options["labels"]), classes) if "labels" in options else None
    train = flat_split(root, root, table)
    if train is None:
        return None
    if table is not None:
        table.check_all_used(root)
        classes = table.classes
    splits = {"train": train}
    if "test" in options:
        test_table = _Labels(Path(options["test"]), classes)
        rows = np.array([row for row in range(train.count) if train.key(row) in test_table.label], np.int64)
        splits = {"train": _rows(train, np.setdiff1d(np.arange(train.count), rows)), "test": _labelled(_rows(train, rows), test_table)}
        test_table.used = len(rows)
        test_table.check_all_used(root)
    return Collection("flat", root.resolve().name, classes, 3, splits)


class _Labels:
    """Paths with labels from a list of ``path label`` lines (blanks in paths are fine; a comma may stand for the last blank): some rows, not all."""

    def __init__(self, file: Path, classes: tuple[str, ...]):
        self.file, self.used, self.label = file, 0, {}
        names: dict[str, str] = {}
        for line in lines_of(file):
            path, _, name = line.rpartition("," if "," in line else " ")
            if not path:
                raise DataError(f"{str(file)!r} has the line {line[:80]!r}, which should be a path and a label")
            names[path.strip().removeprefix("./")] = name.strip()
        if not classes:
            found = set(names.values())
            numeric = all(name.isdigit() for name in found)
            classes = tuple(str(i) for i in range(max(map(int, found)) + 1)) if numeric and found else tuple(sorted(found))
        number = {name: i for i, name in enumerate(classes)}
        for path, name in names.items():
            label = number.get(name, int(name) if name.isdigit() else -1)
            if not 0 <= label < len(classes):
                raise DataError(f"{str(file)!r} gives {path!r} the class {name!r}, which the class map lacks: wrong class map")
            self.label[path] = label
        self.classes = classes

    def of(self, path: str) -> int:
        label = self.label.get(path, UNKNOWN)
        self.used += label != UNKNOWN
        return label

    def check_all_used(self, root: Path) -> None:
        if self.used != len(self.label):
            raise DataError(f"{str(self.file)!r} labels {len(self.label)} images, of which {len(self.label) - self.used} are not below {str(root)!r}")


def flat_split(root: Path, folder: Path, labels: _Labels | None = None) -> FileSplit | None:
    """All images below ``folder`` with keys relative to ``root``, in the order of their paths; None where there are none."""
    state, label_N = hashlib.sha256(), array("q")

    def keys() -> Iterator[str]:
        for file, size, changed in walk_images(folder):
            state.update(struct.pack("<qq", size, changed))
            key = os.path.relpath(file, root).replace(os.sep, "/")
            label_N.append(UNKNOWN if labels is None else labels.of(key))
            yield key

    found = Keys.of(keys())
    return FileSplit(str(root), found, np.frombuffer(label_N, np.int64), state.hexdigest()) if len(found) else None


def _rows(split: FileSplit, rows: np.ndarray) -> FileSplit:
    return FileSplit(split.root, Keys.of(split.key(int(row)) for row in rows), split.labels[rows], split.state)


def _labelled(split: FileSplit, table: _Labels) -> FileSplit:
    return FileSplit(split.root, split.keys, np.array([table.label[split.key(row)] for row in range(split.count)], np.int64), split.state)


READER = Reader(
    "flat",
    f"a folder of images without labels, searched recursively ({', '.join(IMAGE_SUFFIXES[:3])} ...); labels=LIST names some",
    _open,
    ("labels", "classes", "test"),
)
