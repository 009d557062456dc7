"""Caltech-101: 101_ObjectCategories/<class>/; it has no official split, so a fixed number per class is drawn for training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from data_tools.collection import Collection, Reader
from data_tools.readers.class_folders import folder_classes, folder_split
from data_tools.readers.listed import find_below, listed_split
from data_tools.readers.options import choice, whole
from fastssl.errors import DataError

BACKGROUND = "BACKGROUND_Google"


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    """``per_class`` images of each class, drawn with ``seed`` by numpy's legacy generator, train; all others test.  Both in the order of their paths."""
    base = find_below(Path(source), ("caltech101", "caltech-101"), ("101_ObjectCategories",))
    if base is None:
        return None
    folder = base / "101_ObjectCategories"
    skip = (BACKGROUND,) if choice(options, "background", ("yes", "no")) == "no" else ()
    classes = folder_classes(folder, skip=skip)
    per_class, seed = whole(options, "per_class", 30, 1, 10**6), whole(options, "seed", 0, 0, 2**32 - 1)
    if not classes:
        raise DataError(f"{str(folder)!r} has no class folders; unpack the collection again")
    everything = folder_split(base, folder, classes, ignore=skip)

    def rows(train: bool) -> Iterator[tuple[str, int]]:
        for label, name in enumerate(classes):
            of_class = np.flatnonzero(everything.labels == label)
            if len(of_class) <= per_class:
                raise DataError(f"class {name!r} has {len(of_class)} images, too few for {per_class} in training and one in the test; lower per_class")
            chosen = np.zeros(len(of_class), bool)
            chosen[np.random.RandomState([seed, label]).permutation(len(of_class))[:per_class]] = True
            yield from ((everything.key(int(row)), label) for row in of_class[chosen == train])

    splits = {"train": listed_split(base, rows(True), str(folder)), "test": listed_split(base, rows(False), str(folder))}
    return Collection("caltech101", "caltech101", classes, 3, splits)


READER = Reader("caltech101", "Caltech-101 (101_ObjectCategories/<class>; per_class=30, seed=0, background=yes|no)", _open, ("per_class", "seed", "background"))
