"""Stanford Cars: cars_train/ and cars_test/ with the devkit's annotations, or the one-file form car_ims/ with cars_annos.mat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.collection import Collection, RawSplit, Reader
from data_tools.readers.listed import find_below, listed_split
from data_tools.readers.mat_files import read_mat
from fastssl.errors import DataError

_TEST = ("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat")


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    whole = find_below(root, ("stanford_cars",), ("cars_annos.mat", "car_ims"))
    folder = find_below(root, ("stanford_cars",), ("devkit/cars_train_annos.mat", "cars_train"))
    if whole is None and folder is None:
        return None
    if folder is None:
        assert whole is not None
        found = read_mat(whole / "cars_annos.mat", ("annotations", "class_names"))
        classes, what = tuple(map(str, np.atleast_1d(found["class_names"]))), str(whole / "cars_annos.mat")
        entries = np.atleast_1d(found["annotations"])
        splits: dict[str, RawSplit] = {
            name: listed_split(whole, _rows(entries[entries["test"].astype(int) == flag], "relative_im_path", "", classes, what), what)
            for name, flag in (("train", 0), ("test", 1))
        }
        return Collection("cars", "cars", classes, 3, splits)
    classes = tuple(map(str, np.atleast_1d(read_mat(folder / "devkit" / "cars_meta.mat", ("class_names",))["class_names"])))
    test = next((folder / name for name in _TEST if (folder / name).is_file()), None)
    if test is None:
        raise DataError(f"{str(folder)!r} lacks cars_test_annos_withlabels.mat: the devkit's own test annotations have no labels; fetch that file")
    splits = {}
    for name, file in (("train", folder / "devkit" / "cars_train_annos.mat"), ("test", test)):
        entries = np.atleast_1d(read_mat(file, ("annotations",))["annotations"])
        splits[name] = listed_split(folder, _rows(entries, "fname", f"cars_{name}/", classes, str(file)), str(file))
    return Collection("cars", "cars", classes, 3, splits)


def _rows(entries: Any, field: str, place: str, classes: tuple[str, ...], what: str) -> Iterator[tuple[str, int]]:
    if not {field, "class"} <= set(entries.dtype.names or ()):
        raise DataError(f"{what}: its annotations lack {field!r} or 'class'; test annotations without labels cannot be used")
    for entry in entries:
        label = int(entry["class"])
        if not 1 <= label <= len(classes):
            raise DataError(f"{what} has the class {label}, but there are {len(classes)}; fetch the collection again")
        yield f"{place}{entry[field]}", label - 1


READER = Reader("cars", "Stanford Cars (cars_train, cars_test, devkit/*.mat; or car_ims with cars_annos.mat)", _open)
