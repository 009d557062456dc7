"""FGVC-Aircraft: data/images/ with one list per level of classes (variant, family, manufacturer) and split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_tools.collection import Collection, Reader
from data_tools.readers.listed import fields_of, find_below, lines_of, listed_split, number_of
from data_tools.readers.options import choice

_CLASSES = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    folder = find_below(Path(source), ("data", "fgvc-aircraft-2013b/data"), ("images_variant_trainval.txt", "images"))
    if folder is None:
        return None
    level = choice(options, "level", tuple(_CLASSES))
    classes = tuple(lines_of(folder / _CLASSES[level]))
    number = {name: label for label, name in enumerate(classes)}

    def rows(file: Path) -> Iterator[tuple[str, int]]:
        for line in lines_of(file):
            image, name = fields_of(line, 2, str(file))
            yield f"images/{image}.jpg", number_of(number, name, str(file))

    files = {"train": folder / f"images_{level}_trainval.txt", "test": folder / f"images_{level}_test.txt"}
    return Collection("aircraft", "aircraft", classes, 3, {split: listed_split(folder, rows(file), str(file)) for split, file in files.items()})


READER = Reader("aircraft", "FGVC-Aircraft (data/images, images_variant_trainval.txt ...; level=variant|family|manufacturer)", _open, ("level",))
