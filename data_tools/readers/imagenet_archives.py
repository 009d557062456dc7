"""ILSVRC 2012 as published: the training archive of class archives, the validation archive, and the devkit or a list of validation labels."""

from __future__ import annotations

import csv
import io
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from data_tools.collection import Collection, Keys, RawSplit, Reader, file_state
from data_tools.readers.class_folders import folder_classes, folder_split
from data_tools.readers.listed import integer, lines_of, listed_split
from data_tools.readers.mat_files import read_mat
from data_tools.readers.options import choice
from data_tools.readers.tar_index import TarSplit, members
from fastssl.errors import DataError

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT, TRUTH = "ILSVRC2012_devkit_t12", "ILSVRC2012_validation_ground_truth.txt"
LISTS = ("imagenet_2012_validation_synset_labels.txt", "LOC_val_solution.csv", "val_labels.txt")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG$")


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    for folder in (root, root / "Data" / "CLS-LOC", root / "ILSVRC" / "Data" / "CLS-LOC"):
        flat_val = next((folder / "val").glob("ILSVRC2012_val_*.JPEG"), None) if (folder / "val").is_dir() else None
        if (folder / TRAIN).is_file() or (flat_val is not None and (folder / "train").is_dir()):
            return _collection(root, folder, options)
    return None


def _collection(root: Path, folder: Path, options: Mapping[str, str]) -> Collection:
    splits: dict[str, RawSplit] = {}
    if (folder / TRAIN).is_file():
        classes, splits["train"] = _train_archive(folder)
    else:
        classes = folder_classes(folder / "train")
        splits["train"] = folder_split(root, folder / "train", classes)
    if choice(options, "val", ("yes", "no")) == "yes":
        splits["test"] = _validation(root, folder, classes, options)
    return Collection("imagenet", "imagenet", classes, 3, splits)


def _train_archive(folder: Path) -> tuple[tuple[str, ...], TarSplit]:
    """Rows as ImageFolder would list the unpacked archives: classes by name, files by name within each."""
    archive = folder / TRAIN
    inner = sorted((member for member in members(archive) if member.name.endswith(".tar")), key=lambda member: member.name)
    if not inner:
        raise DataError(f"{str(archive)!r} holds no class archives (n01440764.tar ...); fetch it again")
    offset_N, size_N, labels = array("q"), array("q"), array("q")

    def names() -> Iterator[str]:
        for label, outer in enumerate(inner):
            images = sorted(members(archive, outer.offset, outer.size), key=lambda member: member.name)
            if not images:
                raise DataError(f"{str(archive)!r}: class archive {outer.name!r} is empty; fetch it again")
            for image in images:
                offset_N.append(image.offset)
                size_N.append(image.size)
                labels.append(label)
                yield f"{Path(outer.name).stem}/{image.name}"

    keys = Keys.of(names())
    offsets, sizes, classes = (np.frombuffer(column, np.int64) for column in (offset_N, size_N, labels))
    split = TarSplit(str(folder), (TRAIN,), keys, np.zeros(len(keys), np.int64), offsets, sizes, classes, file_state(archive))
    return tuple(Path(outer.name).stem for outer in inner), split


def _validation(root: Path, folder: Path, classes: tuple[str, ...], options: Mapping[str, str]) -> RawSplit:
    """The validation images by class, by name within each, as ImageFolder would list them sorted into class folders."""
    number = {name: label for label, name in enumerate(classes)}
    if (folder / VAL).is_file():
        found = sorted(members(folder / VAL), key=lambda member: member.name)
        if not found:
            raise DataError(f"{str(folder / VAL)!r} holds no images; fetch it again")
        truth = _truth(root, folder, len(found), options)
        wnids = [truth(member.name) for member in found]
        labels = _labels(wnids, number)
        offsets, sizes = (np.array(column, np.int64) for column in zip(*((member.offset, member.size) for member in found), strict=True))
        keys = Keys.of(member.name for member in found)
        split = TarSplit(str(folder), (VAL,), keys, np.zeros(len(found), np.int64), offsets, sizes, labels, file_state(folder / VAL))
        return split.ordered(np.argsort(labels, kind="stable"))
    val = folder / "val"
    if not val.is_dir():
        raise DataError(f"{str(folder)!r} has neither {VAL} nor val/; fetch the validation images, or say --option val=no")
    if any(entry.is_dir() for entry in val.iterdir()):
        return folder_split(root, val, classes)
    names = sorted(file.name for file in val.glob("ILSVRC2012_val_*.JPEG"))
    truth = _truth(root, folder, len(names), options)
    labels = _labels([truth(name) for name in names], number)
    order = np.argsort(labels, kind="stable").tolist()
    place = val.relative_to(root).as_posix()
    return listed_split(root, ((f"{place}/{names[i]}", int(labels[i])) for i in order), str(val))


def _labels(wnids: list[str], number: dict[str, int]) -> np.ndarray:
    strange = sorted(set(wnids) - set(number))
    if strange:
        raise DataError(f"validation labels name the classes {strange[:3]}, which the training images lack: wrong class map or another list of labels")
    return np.array([number[wnid] for wnid in wnids], np.int64)


def _truth(root: Path, folder: Path, count: int, options: Mapping[str, str]):
    """A function from the name of a validation image to its class, from the first list that is there."""
    places = [place / name for place in (folder, root) for name in LISTS]
    file = Path(options["val_labels"]) if "val_labels" in options else next((place for place in places if place.is_file()), None)
    if file is None:
        by_number = _devkit(root, folder)
    elif file.suffix == ".csv":
        with open(file, newline="") as handle:
            rows = [row for row in csv.reader(handle) if len(row) >= 2 and row[0].startswith("ILSVRC2012_val_")]
        by_number = {int(row[0][-8:]): row[1].split()[0] for row in rows}
    else:
        lines = list(lines_of(file))
        if all(" " in line for line in lines):  # name and class on each line
            by_number = {_number(line.split()[0], str(file)): line.split()[1] for line in lines}
        else:
            by_number = dict(enumerate(lines, 1))
    if len(by_number) < count:
        raise DataError(f"there are {count} validation images but only {len(by_number)} validation labels; use the list that belongs to them")

    def of(name: str) -> str:
        number = _number(name, "the validation archive")
        if number not in by_number:
            raise DataError(f"no validation label for {name!r}; use the list that belongs to the images")
        return by_number[number]

    return of


def _number(name: str, what: str) -> int:
    found = _VAL_NAME.search(name if name.endswith(".JPEG") else f"{name}.JPEG")
    if not found:
        raise DataError(f"{what} has {name[:60]!r}, which is no name of an ILSVRC 2012 validation image")
    return int(found[1])


def _devkit(root: Path, folder: Path) -> dict[int, str]:
    for place in (folder, root):
        unpacked, packed = place / DEVKIT / "data", place / f"{DEVKIT}.tar.gz"
        if (unpacked / TRUTH).is_file():
            return _ground_truth(list(lines_of(unpacked / TRUTH)), str(unpacked / "meta.mat"), unpacked / "meta.mat")
        if packed.is_file():
            try:
                with tarfile.open(packed) as archive:
                    inside = {Path(member.name).name: member for member in archive.getmembers() if member.isfile()}
                    contents = {name: archive.extractfile(inside[name]) for name in (TRUTH, "meta.mat")}
                    text, meta = (handle.read() for handle in contents.values() if handle is not None)
            except (OSError, EOFError, KeyError, ValueError, tarfile.TarError) as error:
                raise DataError(f"{str(packed)!r} is damaged or lacks {TRUTH} or meta.mat ({error}); fetch it again") from error
            return _ground_truth(text.decode().split(), str(packed), io.BytesIO(meta))
    raise DataError(
        f"{str(root)!r} has no labels of the validation images; put {DEVKIT}.tar.gz or one of {', '.join(LISTS)} there, name a list with "
        "--option val_labels=FILE, or say --option val=no"
    )


def _ground_truth(lines: list[str], where: str, meta: Path | io.BytesIO) -> dict[int, str]:
    """Image number -> class: the devkit's ground truth counts classes by its own ids, which meta.mat explains."""
    synsets = np.atleast_1d(read_mat(meta, ("synsets",), name=where)["synsets"])
    try:
        wnid_of = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets if int(entry["num_children"]) == 0}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{where}: its synsets lack ILSVRC2012_ID, WNID or num_children ({error}); fetch the devkit again") from error
    found = {}
    for number, line in enumerate(lines, 1):
        own = integer(line, TRUTH)
        if own not in wnid_of:
            raise DataError(f"{TRUTH} has the class {own} in line {number}, which meta.mat lacks; fetch the devkit again")
        found[number] = wnid_of[own]
    return found


READER = Reader("imagenet", f"ILSVRC 2012 archives ({TRAIN}, {VAL}, devkit or label list)", _open, ("val", "val_labels"))
