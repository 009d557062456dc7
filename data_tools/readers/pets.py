"""Oxford-IIIT Pets: images/ in one folder, annotations/trainval.txt and test.txt with the class in the image's name and as a number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_tools.collection import Collection, Reader
from data_tools.readers.listed import fields_of, find_below, integer, lines_of, listed_split
from fastssl.errors import DataError


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    folder = find_below(Path(source), ("oxford-iiit-pet",), ("annotations/trainval.txt", "annotations/test.txt", "images"))
    if folder is None:
        return None
    files = {"train": folder / "annotations" / "trainval.txt", "test": folder / "annotations" / "test.txt"}
    names: dict[int, str] = {}
    for image, label in _lines(files["train"]):
        if names.setdefault(label, image.rpartition("_")[0]) != image.rpartition("_")[0]:
            raise DataError(f"{str(files['train'])!r} gives {image!r} the number of {names[label]!r}; fetch the collection again")
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{str(files['train'])!r} leaves out a class: it has numbers {sorted(label + 1 for label in names)[:40]}; fetch the collection again")
    splits = {split: listed_split(folder, ((f"images/{image}.jpg", label) for image, label in _lines(file)), str(file)) for split, file in files.items()}
    return Collection("pets", "pets", tuple(names[label] for label in range(len(names))), 3, splits)


def _lines(file: Path) -> Iterator[tuple[str, int]]:
    """(image, class from 0) of each line ``image class species breed``; lines that begin with # are remarks."""
    for line in lines_of(file):
        if not line.startswith("#"):
            image, label, _, _ = fields_of(line, 4, str(file))
            yield image, integer(label, str(file)) - 1


READER = Reader("pets", "Oxford-IIIT Pets (images/*.jpg, annotations/trainval.txt, annotations/test.txt)", _open)
