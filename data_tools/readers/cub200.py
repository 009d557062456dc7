"""CUB-200-2011: images.txt, image_class_labels.txt and train_test_split.txt side by side, one line per image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

from data_tools.collection import Collection, Reader
from data_tools.readers.class_maps import class_names
from data_tools.readers.listed import fields_of, find_below, integer, lines_of, listed_split
from fastssl.errors import DataError

_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    folder = find_below(Path(source), ("CUB_200_2011",), (*_LISTS, "images"))
    if folder is None:
        return None
    classes = class_names(folder / "classes.txt")
    splits = {
        split: listed_split(folder, _rows(folder, flag, len(classes)), str(folder / "train_test_split.txt")) for split, flag in (("train", "1"), ("test", "0"))
    }
    return Collection("cub200", "cub200", classes, 3, splits)


def _rows(folder: Path, wanted: str, num_classes: int) -> Iterator[tuple[str, int]]:
    for lines in zip_longest(*(lines_of(folder / name) for name in _LISTS)):
        if None in lines:
            raise DataError(f"{str(folder)!r}: {', '.join(_LISTS)} differ in length; fetch the collection again")
        (number, path), (second, label), (third, flag) = (fields_of(line, 2, str(folder / name)) for line, name in zip(lines, _LISTS, strict=True))
        if not number == second == third or flag not in ("0", "1") or not 1 <= integer(label, str(folder / _LISTS[1])) <= num_classes:
            raise DataError(f"{str(folder)!r}: {', '.join(_LISTS)} disagree at image {number}; fetch the collection again")
        if flag == wanted:
            yield f"images/{path}", int(label) - 1


READER = Reader("cub200", "CUB-200-2011 (images.txt, image_class_labels.txt, train_test_split.txt, classes.txt)", _open)
