"""SUN397: class folders by first letter, ClassName.txt, and ten partitions of 50 training and 50 test images per class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_tools.collection import Collection, Reader
from data_tools.readers.listed import find_below, lines_of, listed_split, number_of
from data_tools.readers.options import whole
from fastssl.errors import DataError


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    folder = find_below(root, ("SUN397",), ("ClassName.txt",))
    if folder is None:
        return None
    places = (folder, folder / "Partitions", root, root / "Partitions")
    lists = next((place for place in places if (place / "Training_01.txt").is_file()), None)
    if lists is None:
        raise DataError(f"{str(folder)!r} lacks the partitions (Training_01.txt ...), which are published as an archive of their own; unpack it there")
    names = tuple(line.lstrip("/") for line in lines_of(folder / "ClassName.txt"))
    number = {name: label for label, name in enumerate(names)}

    def rows(file: Path) -> Iterator[tuple[str, int]]:
        for line in lines_of(file):
            path = line.lstrip("/")
            yield path, number_of(number, path.rpartition("/")[0], str(file))

    partition = whole(options, "partition", 1, 1, 10)
    files = {"train": lists / f"Training_{partition:02d}.txt", "test": lists / f"Testing_{partition:02d}.txt"}
    classes = tuple(name.partition("/")[2] for name in names)  # without the letter that only sorts the folders
    return Collection("sun397", "sun397", classes, 3, {split: listed_split(folder, rows(file), str(file)) for split, file in files.items()})


READER = Reader("sun397", "SUN397 (ClassName.txt, a/ ... z/, Partitions/Training_01.txt ...; partition=1..10)", _open, ("partition",))
