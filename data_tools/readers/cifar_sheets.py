"""CIFAR-10 as PNG sheets: one image of 32x32 per line of 1024 pixels, labels as JSON lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.collection import ArraySplit, Collection, Reader, file_state
from data_tools.readers.names import CIFAR10_CLASSES
from fastssl.errors import DataError


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    sheets = [root / f"data_batch_{i}.png" for i in range(1, 6)]
    if not sheets[0].is_file():
        return None
    splits = {}
    for split, files, label_name in (("train", sheets, "train_lables.json"), ("test", [root / "test_batch.png"], "test_lables.json")):
        pixels = np.concatenate([_read_sheet(file) for file in files])
        labels = _read_label_list(root / label_name)
        splits[split] = ArraySplit(pixels, labels, split, state="\n".join(map(file_state, [*files, root / label_name])))
    return Collection("cifar_sheets", "cifar10", CIFAR10_CLASSES, 3, splits)


def _read_sheet(file: Path) -> np.ndarray:
    if not file.is_file():
        raise DataError(f"{str(file)!r} is missing; fetch the collection again")
    try:
        # A sheet of 10 000 images is larger than Pillow's guard against hostile files expects; its size is checked right below.
        with Image.open(file) as image:
            if image.mode != "RGB" or image.width != 1024:
                raise DataError(
                    f"{str(file)!r} is {image.mode} {image.width}x{image.height}, a CIFAR sheet has one image of 1024 RGB pixels per row; fetch it again"
                )
            sheet = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{str(file)!r} is damaged ({error}); fetch the collection again") from error
    return sheet.reshape(-1, 32, 32, 3)


def _read_label_list(file: Path) -> np.ndarray:
    try:
        return np.asarray(json.loads(file.read_text()), dtype=np.int64).reshape(-1)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{str(file)!r} cannot be read as a JSON list of labels ({error}); fetch the collection again") from error


READER = Reader("cifar_sheets", "CIFAR-10 PNG sheets (data_batch_1.png ... and test_batch.png)", _open)
