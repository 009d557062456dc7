"""Class-per-folder trees: train/<class>/... with test/<class>/... or val/<class>/..., in the row order of torchvision's ImageFolder."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from data_tools.collection import Collection, FileSplit, Keys, RawSplit, Reader
from data_tools.readers.class_maps import class_names
from data_tools.readers.joined import join
from data_tools.readers.names import IMAGE_SUFFIXES
from fastssl.errors import DataError, nearest

_UNLABELED = ("unlabeled", "unlabelled")


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    if not (root / "train").is_dir() or next(walk_images(root / "train"), None) is None:
        return None
    test = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
    return _collection("class_folders", root, root / "train", test, options)


def _open_tree(source: str, options: Mapping[str, str]) -> Collection | None:
    """The folder itself is the tree <class>/...: folders with images in them, and no images beside these."""
    root = Path(source)
    if not root.is_dir() or any(entry.is_file() and entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in root.iterdir()):
        return None
    if not any(next(walk_images(root / name), None) is not None for name in folder_classes(root, skip=_UNLABELED)):
        return None
    return _collection("class_tree", root, root, None, options)


def _collection(kind: str, root: Path, train: Path, test: Path | None, options: Mapping[str, str]) -> Collection | None:
    classes = folder_classes(train, skip=_UNLABELED if train == root else ())
    if not classes:
        return None
    if "classes" in options:
        classes = _mapped(classes, class_names(options["classes"]), options["classes"])
    rest = next((root / name for name in _UNLABELED if (root / name).is_dir()), None)
    splits: dict[str, RawSplit] = {"train": join(folder_split(root, train, classes, ignore=_UNLABELED if train == root else ()), _unlabeled(root, rest))}
    if test is not None:
        splits["test"] = folder_split(root, test, classes)
    return Collection(kind, root.resolve().name, classes, 3, splits)


def folder_classes(folder: Path, skip: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The names of the folders in ``folder``, sorted."""
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name not in skip and not entry.name.startswith(".")))


def _mapped(found: tuple[str, ...], names: tuple[str, ...], file: str) -> tuple[str, ...]:
    strange = sorted(set(found) - set(names))
    if strange:
        raise DataError(f"class map {file!r} lacks the class folder {strange[0]!r}{nearest(strange[0], names)}: wrong class map")
    return names


def _unlabeled(root: Path, folder: Path | None) -> FileSplit | None:
    from data_tools.readers.flat_folder import flat_split  # it reads folders with this module's help

    return None if folder is None else flat_split(root, folder)


def folder_split(root: Path, folder: Path, classes: tuple[str, ...], ignore: tuple[str, ...] = ()) -> FileSplit:
    """All images in ``folder``'s class folders, by class, with keys relative to ``root``.  DataError for other folders than ``classes`` and ``ignore``."""
    strange = sorted({*folder_classes(folder, skip=ignore)} - set(classes))
    if strange:
        raise DataError(f"{str(folder)!r} has class folders {strange[:5]} that train/ lacks: wrong class count; give both the same class folders")
    counts = np.zeros(len(classes), np.int64)
    state = hashlib.sha256()

    def keys() -> Iterator[str]:
        for label, name in enumerate(classes):
            for file, size, changed in walk_images(folder / name):
                counts[label] += 1
                state.update(struct.pack("<qq", size, changed))
                yield os.path.relpath(file, root).replace(os.sep, "/")

    found = Keys.of(keys())
    if not len(found):
        raise DataError(f"{str(folder)!r} has no images in its class folders; known endings: {', '.join(IMAGE_SUFFIXES)}")
    return FileSplit(str(root), found, np.repeat(np.arange(len(classes)), counts), state.hexdigest())


def walk_images(folder: str | Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Iterator[tuple[str, int, int]]:
    """(path, bytes, modification time in ns) of every image file below ``folder``: folders in the order of their paths, files by name within.

    Holds the names of one folder at a time.  Links are followed.  Raises DataError where a folder cannot be read, for an image that is a link to nothing,
    and for a link to a folder that it lies in, which would give the same images again and again.
    """
    try:
        for place in sorted(_folders(folder)):
            with os.scandir(place) as entries:
                files = sorted((entry for entry in entries if entry.name.lower().endswith(suffixes) and not entry.is_dir()), key=lambda entry: entry.name)
            for entry in files:
                if not entry.is_file():
                    if entry.is_symlink():
                        raise DataError(f"{entry.path!r} is a link to a file that is not there; bring the file back or remove the link")
                    continue
                facts = entry.stat()
                yield entry.path, facts.st_size, facts.st_mtime_ns
    except OSError as error:
        raise DataError(f"{str(error.filename or folder)!r} cannot be read ({error.strerror or error}); check the source and its permissions") from error


def _folders(folder: str | Path) -> Iterator[str]:
    """Paths of ``folder`` and all folders below it."""
    for path, names, _ in os.walk(folder, followlinks=True, onerror=_raise):
        yield path
        for name in names:
            below = os.path.join(path, name)
            if os.path.islink(below) and (os.path.realpath(path) + os.sep).startswith(os.path.realpath(below) + os.sep):
                raise DataError(f"{below!r} is a link to a folder that it lies in, so its images would be read again and again; remove the link")


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a class that a split lacks is an empty class
        raise error


READER = Reader("class_folders", "class-per-folder trees (train/<class>/*.jpg and test/ or val/; unlabeled/ beside them)", _open, ("classes",))
TREE = Reader("class_tree", "one class-per-folder tree (<class>/*.jpg; unlabeled/ beside them), which becomes the training set", _open_tree, ("classes",))
