"""DTD, describable textures: images/<class>/ with ten partitions of train, validation and test lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_tools.collection import UNKNOWN, Collection, Reader
from data_tools.readers.listed import find_below, lines_of, listed_split, number_of
from data_tools.readers.options import choice, whole


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    folder = find_below(Path(source), ("dtd", "dtd/dtd"), ("labels/train1.txt", "images"))
    if folder is None:
        return None
    partition, validation = whole(options, "partition", 1, 1, 10), choice(options, "validation", ("drop", "train", "unlabeled"))
    train, val, test = (folder / "labels" / f"{name}{partition}.txt" for name in ("train", "val", "test"))
    classes = tuple(sorted({line.split("/")[0] for line in lines_of(train)}))
    number = {name: label for label, name in enumerate(classes)}

    def rows(*files: Path) -> Iterator[tuple[str, int]]:
        for file in files:
            hidden = file == val and validation == "unlabeled"
            for line in lines_of(file):
                yield f"images/{line}", UNKNOWN if hidden else number_of(number, line.split("/")[0], str(file))

    taken = (train,) if validation == "drop" else (train, val)
    splits = {"train": listed_split(folder, rows(*taken), str(train)), "test": listed_split(folder, rows(test), str(test))}
    return Collection("dtd", "dtd", classes, 3, splits)


READER = Reader("dtd", "DTD (images/<class>, labels/train1.txt ...; partition=1..10, validation=drop|train|unlabeled)", _open, ("partition", "validation"))
