"""The stored bytes of single rows of a converted dataset, whatever its format, as rows.parquet hashed them."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_tools.storage import JPEG, PNG, RAW
from fastssl.errors import DataError
from fastssl.sources.beton import open_beton
from fastssl.sources.manifest import Manifest, open_npy
from fastssl.sources.shards import SAMPLE

Reader = Callable[[int, int, int], tuple[int, bytes | memoryview]]


def open_stored(manifest: Manifest, split: str) -> Reader:
    """A function (row, height, width) -> (storage code, bytes), safe to call from several threads.  DataError where the files cannot be opened."""
    if manifest.format == "arrays":
        return _arrays(manifest, split)
    return _shards(manifest, split) if manifest.format == "dali" else _beton(manifest, split)


def _arrays(manifest: Manifest, split: str) -> Reader:
    info = manifest.split(split)
    shape = (info.count, info.max_height, info.max_width, manifest.channels)
    pixels = open_npy(manifest.root / info.files["pixels"], np.uint8, shape)

    def read(row: int, height: int, width: int) -> tuple[int, memoryview]:
        canvas = pixels[row]
        if canvas[height:].any() or canvas[:height, width:].any():
            raise ValueError(f"recorded as {height}x{width}, but there are pixels beyond it")
        return RAW, np.ascontiguousarray(canvas[:height, :width]).data.cast("B")

    return read


def _beton(manifest: Manifest, split: str) -> Reader:
    beton = open_beton(manifest.root / manifest.split(split).files["beton"])

    def read(row: int, height: int, width: int) -> tuple[int, memoryview]:
        if (int(beton.height_N[row]), int(beton.width_N[row])) != (height, width):
            raise ValueError(f"recorded as {height}x{width}, stored as {int(beton.height_N[row])}x{int(beton.width_N[row])}")
        start = int(beton.ptr_N[row])
        return int(beton.mode_N[row]), beton.data[start : start + int(beton.size_N[row])].data

    return read


def _shards(manifest: Manifest, split: str) -> Reader:
    info = manifest.split(split)
    samples = open_npy(manifest.root / info.files["samples"], SAMPLE, (info.count,))
    maps = [_map(manifest.root / name) for name in info.lists["shards"]]

    def read(row: int, height: int, width: int) -> tuple[int, bytes]:
        sample = samples[row]
        if (int(sample["height"]), int(sample["width"])) != (height, width):
            raise ValueError(f"recorded as {height}x{width}, indexed as {int(sample['height'])}x{int(sample['width'])}")
        start = int(sample["offset"])
        data = maps[int(sample["shard"])][start : start + int(sample["size"])]
        return (JPEG if data[:2] == b"\xff\xd8" else PNG), data

    return read


def _map(file: Path) -> mmap.mmap:
    try:
        with open(file, "rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise DataError(f"{str(file)!r} is missing or empty ({error}); convert the dataset again") from error
