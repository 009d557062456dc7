"""Food-101: images/<class>/ with meta/train.txt and meta/test.txt, in the row order of a tree of class folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data_tools.collection import Collection, FileSplit, Reader
from data_tools.readers.listed import find_below, lines_of, listed_split, number_of


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    folder = find_below(Path(source), ("food-101",), ("meta/train.txt", "meta/test.txt", "images"))
    if folder is None:
        return None
    names = folder / "meta" / "classes.txt"
    classes = tuple(sorted(lines_of(names) if names.is_file() else {line.split("/")[0] for line in lines_of(folder / "meta" / "train.txt")}))
    return Collection("food101", "food101", classes, 3, {split: _split(folder, split, classes) for split in ("train", "test")})


def _split(folder: Path, split: str, classes: tuple[str, ...]) -> FileSplit:
    file, number = folder / "meta" / f"{split}.txt", {name: label for label, name in enumerate(classes)}
    lines = sorted(lines_of(file), key=lambda line: (line.split("/")[0], f"{line}.jpg"))
    return listed_split(folder, ((f"images/{line}.jpg", number_of(number, line.split("/")[0], str(file))) for line in lines), str(file))


READER = Reader("food101", "Food-101 (images/<class>/*.jpg, meta/train.txt, meta/test.txt)", _open)
