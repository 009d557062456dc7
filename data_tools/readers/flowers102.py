"""Oxford Flowers 102: jpg/image_00001.jpg ..., imagelabels.mat and setid.mat; the validation images serve as unlabelled ones unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from data_tools.collection import UNKNOWN, Collection, Reader
from data_tools.readers.class_maps import class_names
from data_tools.readers.listed import find_below, listed_split
from data_tools.readers.mat_files import read_mat
from data_tools.readers.options import choice
from fastssl.errors import DataError

_IDS = ("trnid", "valid", "tstid")


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    folder = find_below(Path(source), ("flowers-102",), ("imagelabels.mat", "setid.mat", "jpg"))
    if folder is None:
        return None
    labels = np.atleast_1d(read_mat(folder / "imagelabels.mat", ("labels",))["labels"]).astype(np.int64)
    ids = {name: np.atleast_1d(value).astype(np.int64) for name, value in read_mat(folder / "setid.mat", _IDS).items()}
    if any(part.min() < 1 or part.max() > len(labels) for part in ids.values()):
        raise DataError(f"{str(folder / 'setid.mat')!r} names images beyond the {len(labels)} that have labels; fetch the collection again")
    count = int(labels.max())
    classes = class_names(options["classes"]) if "classes" in options else tuple(f"flower {i}" for i in range(1, count + 1))
    if len(classes) != count:
        raise DataError(f"the class map names {len(classes)} classes, imagelabels.mat has {count}: wrong class map")
    validation = choice(options, "validation", ("unlabeled", "drop", "train"))

    def rows(*names: str) -> Iterator[tuple[str, int]]:
        for name in names:
            for image in ids[name].tolist():
                hidden = name == "valid" and validation == "unlabeled"
                yield f"jpg/image_{image:05d}.jpg", UNKNOWN if hidden else int(labels[image - 1]) - 1

    taken = ("trnid",) if validation == "drop" else ("trnid", "valid")
    what = str(folder / "setid.mat")
    splits = {"train": listed_split(folder, rows(*taken), what), "test": listed_split(folder, rows("tstid"), what)}
    return Collection("flowers102", "flowers102", classes, 3, splits)


READER = Reader("flowers102", "Oxford Flowers 102 (jpg/, imagelabels.mat, setid.mat; validation=unlabeled|drop|train)", _open, ("validation", "classes"))
