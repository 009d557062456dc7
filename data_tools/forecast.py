"""What a conversion will take, from a few images spread over the source: bytes, seconds, and whether the disk has room."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.collection import Collection
from data_tools.images import Rules
from data_tools.progress import duration
from data_tools.storage import Storage
from data_tools.units import Task, convert_rows
from fastssl.errors import DataError

SAMPLE = 32  # images looked at per split


@dataclass(frozen=True)
class Forecast:
    """``images`` to convert, ``size`` in bytes of the finished data files, ``seconds`` for all workers together; estimates from ``sampled`` images."""

    images: int
    size: int
    seconds: float
    sampled: int

    def __str__(self) -> str:
        return f"about {self.images} images, {self.size / 1e9:.2f} GB, {duration(self.seconds)} (from {self.sampled} sampled images)"


def forecast(raw: Collection, rules: Rules, storage: Storage, workers: int, *, padded: bool) -> Forecast:
    """Convert a few images of each split in memory.  ``padded``: all rows take the room of the largest (arrays)."""
    size, seconds, sampled, images = 0.0, 0.0, 0, 0
    for split in raw.splits.values():
        if not split.count:
            continue
        rows = np.unique(np.linspace(0, split.count - 1, min(SAMPLE, split.count)).astype(np.int64)).tolist()
        start = time.perf_counter()
        units = [convert_rows(Task("forecast", Path(), split.part(row, row + 1), row, rules, storage), lambda data: None) for row in rows]
        seconds += (time.perf_counter() - start) / len(rows) * split.count / workers
        found = np.concatenate([unit.rows for unit in units])
        images += split.count
        sampled += len(rows)
        if len(found):
            one = int(found["height"].max()) * int(found["width"].max()) * storage.stored_channels if padded else float(found["bytes"].mean())
            size += one * len(found) / len(rows) * split.count
    return Forecast(images, int(size), seconds, sampled)


def check_space(expected: Forecast, folder: Path, have: int) -> None:
    """DataError when the disk of ``folder`` has clearly too little room; ``have`` bytes of the result lie there already."""
    need, free = expected.size * 0.9 - have, shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"the disk is too small: this needs about {expected.size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; choose another disk, "
            "reduce images with --max-side, or use --format ffcv or dali, which store JPEG bytes"
        )
