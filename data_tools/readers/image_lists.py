"""Image lists as TLlib keeps them: ``path label`` lines (blanks in paths are fine) in image_list/train.txt, test.txt ..., paths relative to the folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_tools.collection import UNKNOWN, Collection, Reader
from data_tools.readers.class_maps import class_names
from data_tools.readers.listed import integer, lines_of, listed_split
from fastssl.errors import DataError

_NAMES = {"train": ("train_100.txt", "train.txt"), "test": ("test.txt",), "unlabeled": ()}
_FOLDERS = ("image_list", "image_lists")


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    lists = next((root / name for name in _FOLDERS if any((root / name / file).is_file() for file in _NAMES["train"])), root)
    if not root.is_dir() or (lists == root and _found(root, lists, options.get("train", "")) is None):
        return None
    train, test, unlabeled = (_file(root, lists, options, role) for role in _NAMES)
    assert train is not None
    labelled = [file for file in (train, test) if file is not None]
    names: dict[int, str] = {}
    for file in labelled:
        for path, label in _lines(file):
            names.setdefault(label, path.rpartition("/")[0].rpartition("/")[2])
    if "classes" in options:
        classes = class_names(options["classes"])
    else:  # the folders' names where they tell the classes apart, else numbers
        distinct = "" not in names.values() and len(set(names.values())) == len(names) == max(names, default=0) + 1
        classes = tuple(names[i] if distinct else str(i) for i in range(max(names, default=0) + 1))
    splits = {"train": listed_split(root, _with_unlabeled(root, train, unlabeled), str(train))}
    if test is not None:
        splits["test"] = listed_split(root, _lines(test), str(test))
    return Collection("image_lists", root.resolve().name, classes, 3, splits)


def _file(root: Path, lists: Path, options: Mapping[str, str], role: str) -> Path | None:
    if role not in options:
        return next((lists / name for name in _NAMES[role] if (lists / name).is_file()), None)
    found = _found(root, lists, options[role])
    if found is None:
        raise DataError(f"option {role}={options[role]!r}: there is no such list in {str(lists)!r} nor here")
    return found


def _found(root: Path, lists: Path, name: str) -> Path | None:
    """The list called ``name``, beside the other lists, in the source or here."""
    return next((place for place in (lists / name, root / name, Path(name)) if name and place.is_file()), None)


def _lines(file: Path) -> Iterator[tuple[str, int]]:
    for line in lines_of(file):
        path, blank, label = line.rpartition(" ")
        if not blank:
            raise DataError(f"{str(file)!r} has the line {line[:80]!r}, which should be a path, a blank and a label")
        number = integer(label, str(file))
        if number < 0:
            raise DataError(f"{str(file)!r} gives {path!r} the label {number}; put images without labels into a list of their own (--option unlabeled=LIST)")
        yield path.rstrip(), number


def _with_unlabeled(root: Path, train: Path, unlabeled: Path | None) -> Iterator[tuple[str, int]]:
    """Training rows, then unlabelled ones, whose list may hold labels (they are not used) or paths alone."""
    yield from _lines(train)
    for line in lines_of(unlabeled) if unlabeled is not None else ():
        yield (line if (root / line).is_file() else line.rpartition(" ")[0].rstrip() or line), UNKNOWN


READER = Reader(
    "image_lists",
    "image lists of `path label` lines (image_list/train_100.txt or train.txt, test.txt; unlabeled=validation.txt adds images without labels)",
    _open,
    (*_NAMES, "classes"),
)
