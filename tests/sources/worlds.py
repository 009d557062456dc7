"""The same small collections in every storage format, and every way to open them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from data_tools.convert import convert
from fastssl.sources import Source, open_source
from tests.data_tools.collections import idx_folder, photo_folders

HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
HAS_FFCV = importlib.util.find_spec("ffcv") is not None

OPENERS = {
    "grey arrays": ("grey-arrays", {}),
    "grey resident": ("grey-arrays", {"device": "cpu"}),
    "grey raw beton": ("grey-raw", {}),
    "grey shards": ("grey-shards", {}),
    "photo arrays": ("photo-arrays", {}),
    "photo raw beton": ("photo-raw", {"workers": 2}),
    "photo jpeg beton": ("photo-auto", {}),
    "photo jpeg beton 3 workers": ("photo-auto", {"workers": 3}),
    "bare beton": ("photo-auto/train.beton", {}),
    "photo shards": ("photo-shards", {"kind": "shards"}),
    "photo shards 3 workers": ("photo-shards", {"workers": 3}),
}
if HAS_FFCV:
    OPENERS["photo ffcv engine"] = ("photo-auto", {"engine": "ffcv", "workers": 2})
if HAS_DALI:
    OPENERS["grey dali"] = ("grey-shards", {"kind": "dali"})
    OPENERS["photo dali"] = ("photo-shards", {"kind": "dali", "workers": 2})
KINDS = list(OPENERS)
# Levels that a JPEG may differ: DALI and the ffcv package bring their own libjpeg. Everything else gives the very pixels that were converted.
TOLERANCE = {"photo dali": 2, "photo ffcv engine": 2}


def photo_keys(root: Path, split: str = "train") -> list[str]:
    """The files of a class-folder tree in row order, relative to it."""
    return sorted(str(file.relative_to(root)) for file in (root / split).glob("*/*"))


def photo(file: Path) -> np.ndarray:
    """The pixels that training must see of a file: uint8 [H, W, 3]."""
    if file.suffix == ".jpg":
        return simplejpeg.decode_jpeg(file.read_bytes(), "RGB")
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def photos(root: Path, split: str = "train") -> list[np.ndarray]:
    return [photo(root / key) for key in photo_keys(root, split)]


def greys(root: Path) -> list[np.ndarray]:
    """The training images of an IDX folder, uint8 [8, 8, 1]."""
    return list(np.fromfile(root / "train-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 8, 8, 1))


def built(root: Path) -> tuple[Path, dict[str, list[np.ndarray]]]:
    """Converts both collections in ``root`` to every format; also returns the true pictures, read here without the project's readers."""
    raws = {"grey": idx_folder(root / "grey"), "photo": photo_folders(root / "photo")}
    for name, raw in raws.items():
        convert(raw, root / f"{name}-arrays")
        convert(raw, root / f"{name}-raw", format="ffcv", mode="raw")
        convert(raw, root / f"{name}-auto", format="ffcv")
        convert(raw, root / f"{name}-shards", format="dali")
    return root, {"grey": greys(raws["grey"]), "photo": photos(raws["photo"])}


def opened(root: Path, kind: str) -> Source:
    path, options = OPENERS[kind]
    return open_source(root / path, **options)
