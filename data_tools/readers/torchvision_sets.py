"""Datasets of torchvision by name, ``torchvision:STL10``: their files where this package reads them itself, else whatever the class returns."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.collection import BadImage, Collection, RawSplit, Reader, digest_of, labels_digest
from data_tools.readers import (
    aircraft,
    caltech101,
    cars,
    cifar_batches,
    dtd,
    flowers102,
    food101,
    idx,
    imagenet_archives,
    pets,
    stl10,
    sun397,
    svhn,
)  # fmt: skip
from data_tools.readers.listed import listed_split
from data_tools.readers.options import choice
from fastssl.errors import DataError, nearest

PREFIX = "torchvision:"
# Class -> (who reads its files, the subfolder of root that it makes, arguments of each download)
KNOWN: dict[str, tuple[Reader, str, tuple[dict[str, Any], ...]]] = {
    "CIFAR10": (cifar_batches.READER, "cifar-10-batches-py", ({},)),
    "CIFAR100": (cifar_batches.READER, "cifar-100-python", ({},)),
    "STL10": (stl10.READER, "", ({},)),
    "SVHN": (svhn.READER, "", ({"split": "train"}, {"split": "test"})),
    "MNIST": (idx.READER, "MNIST", ({},)),
    "FashionMNIST": (idx.READER, "FashionMNIST", ({},)),
    "KMNIST": (idx.READER, "KMNIST", ({},)),
    "Food101": (food101.READER, "", ({},)),
    "FGVCAircraft": (aircraft.READER, "", ({},)),
    "StanfordCars": (cars.READER, "", ()),
    "SUN397": (sun397.READER, "", ({},)),
    "DTD": (dtd.READER, "", ({},)),
    "OxfordIIITPet": (pets.READER, "", ({},)),
    "Flowers102": (flowers102.READER, "", ({},)),
    "Caltech101": (caltech101.READER, "", ({},)),
    "ImageNet": (imagenet_archives.READER, "", ()),
}


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    if not source.startswith(PREFIX):
        return None
    from torchvision import datasets

    name = source[len(PREFIX) :]
    if not inspect.isclass(getattr(datasets, name, None)):
        raise DataError(f"torchvision has no dataset {name!r}{nearest(name, datasets.__all__)}")
    if "root" not in options:
        raise DataError(f"{source}: say where its files are or shall go with --option root=FOLDER (and --option download=yes to let torchvision fetch them)")
    root, download = Path(options["root"]), choice(options, "download", ("no", "yes")) == "yes"
    reader, below, calls = KNOWN.get(name, (None, "", ()))
    rest = {key: value for key, value in options.items() if key not in ("root", "download")}
    if reader is None:
        if rest:
            raise DataError(f"{source} has no option {sorted(rest)[0]!r}; it has: root, download")
        return _generic(name, root, download)
    if name == "SVHN" and rest.get("extra", "no") != "no":
        calls = (*calls, {"split": "extra"})
    if download and not calls:
        raise DataError(f"{source} cannot be downloaded by torchvision; put its files into {str(root)!r} (docs/data/sources.md has the layout)")
    for arguments in calls if download else ():
        _made(name, root, {**arguments, "download": True})
    for place in (root / below, root):
        found = reader.open(str(place), rest) if place.is_dir() else None
        if found is not None:
            unknown = sorted(set(rest) - set(reader.options))
            if unknown:
                raise DataError(f"{source} has no option {unknown[0]!r}; it has: {', '.join(('root', 'download', *reader.options))}")
            return found
    raise DataError(f"{str(root)!r} has no files of {name} ({reader.shape}); add --option download=yes, or put them there yourself")


def _made(name: str, root: Path, arguments: Mapping[str, Any]) -> Any:
    from torchvision import datasets

    try:
        return getattr(datasets, name)(str(root), **arguments)
    except Exception as error:  # each of its datasets has errors of its own
        hint = "" if arguments.get("download") else "; add --option download=yes, or put the files there yourself"
        raise DataError(f"torchvision's {name} cannot be opened in {str(root)!r} ({type(error).__name__}: {str(error)[:200]}){hint}") from error


def _generic(name: str, root: Path, download: bool) -> Collection:
    """Any other class: its splits by its own arguments, its files where it names them, else the pixels that it returns."""
    from torchvision import datasets

    accepted = inspect.signature(getattr(datasets, name)).parameters
    extra = {"download": True} if download and "download" in accepted else {}
    if "train" in accepted:
        wanted: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in accepted:
        wanted = {"train": {"split": "train"}, "test": {"split": "test"}}
    else:
        wanted = {"train": {}}
    made = {split: _made(name, root, {**arguments, **extra}) for split, arguments in wanted.items()}
    labels = {split: _labels(dataset, name) for split, dataset in made.items()}
    highest = max(int(found.max()) for found in labels.values() if len(found))
    classes = tuple(map(str, getattr(made["train"], "classes", ()) or ()))
    if len(classes) <= highest:
        classes = tuple(str(i) for i in range(highest + 1))
    splits: dict[str, RawSplit] = {}
    channels = 3
    for split, dataset in made.items():
        files = _files(dataset)
        if files is not None and len(files) == len(labels[split]):
            paths = (os.path.relpath(file, root).replace(os.sep, "/") for file in files)
            splits[split] = listed_split(root, zip(paths, labels[split].tolist(), strict=True), f"torchvision's {name}")
        else:
            splits[split] = TorchvisionSplit(name, str(root), tuple(sorted(wanted[split].items())), labels[split], split)
            channels = 1 if np.ndim(_pixels(dataset[0][0])) == 2 else 3
    return Collection("torchvision", name.lower(), classes, channels, splits)


def _files(dataset: Any) -> list[str] | None:
    """The image files of a dataset in row order, where it says which they are."""
    for name in ("samples", "_samples", "imgs"):
        found = getattr(dataset, name, None)
        if isinstance(found, list) and found and isinstance(found[0], tuple) and isinstance(found[0][0], str | Path):
            return [str(entry[0]) for entry in found]
    found = getattr(dataset, "_image_files", None) or getattr(dataset, "_images", None)
    return [str(file) for file in found] if isinstance(found, list) and found and isinstance(found[0], str | Path) else None


def _labels(dataset: Any, name: str) -> np.ndarray:
    for attribute in ("targets", "labels", "_labels", "y"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) == len(dataset):
            return np.asarray(found, np.int64).reshape(-1)
    for attribute in ("_samples", "samples"):
        found = getattr(dataset, attribute, None)
        if isinstance(found, list) and found and isinstance(found[0], tuple) and isinstance(found[0][-1], int):
            return np.array([entry[-1] for entry in found], np.int64)
    first = dataset[0]
    if not isinstance(first, tuple) or len(first) != 2 or not isinstance(first[1], int):
        raise DataError(f"torchvision's {name} does not give (image, class) pairs; it is no classification dataset")
    return np.array([dataset[i][1] for i in range(len(dataset))], np.int64)


@lru_cache(maxsize=4)
def _opened(name: str, root: str, arguments: tuple[tuple[str, Any], ...]) -> Any:
    return _made(name, Path(root), dict(arguments))


def _pixels(image: Any) -> np.ndarray:
    mode = getattr(image, "mode", None)
    if mode is None:
        raise BadImage(f"the dataset gives a {type(image).__name__}, not an image")
    return np.asarray(image if mode in ("L", "RGB") else image.convert("RGB"))


@dataclass(frozen=True)
class TorchvisionSplit:
    """Rows ``first``... of a torchvision dataset, opened again where they are read; its own decoder makes the pixels."""

    name: str
    root: str
    arguments: tuple[tuple[str, Any], ...]
    labels: np.ndarray
    prefix: str
    first: int = 0

    @property
    def count(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        return f"{self.prefix}/{self.first + row}"

    def read(self, row: int) -> np.ndarray:
        pixels = _pixels(_opened(self.name, self.root, self.arguments)[self.first + row][0])
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def part(self, start: int, stop: int) -> TorchvisionSplit:
        return TorchvisionSplit(self.name, self.root, self.arguments, self.labels[start:stop].copy(), self.prefix, self.first + start)

    def stamp(self) -> str:
        return digest_of(self.name, self.root, repr(self.arguments), labels_digest(self.labels))


_ALL = dict.fromkeys(option for reader, _, _ in KNOWN.values() for option in reader.options)
READER = Reader("torchvision", f"{PREFIX}NAME, a torchvision dataset such as {PREFIX}STL10 (root=FOLDER, download=yes)", _open, ("root", "download", *_ALL))
