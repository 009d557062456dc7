"""The contract of everything that delivers canvases, with the door that opens a converted dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from fastssl.errors import DataError, nearest
from fastssl.types import RawBatch

KINDS = ("auto", "arrays", "ffcv")


@runtime_checkable
class Source(Protocol):
    """Random access to decoded images.  A source keeps no position: the caller names the rows, so any order, resume point and world size are the caller's.

    ``canvas`` is (H, W, C) in pixels, large enough for every row; ``labels_N`` int64, -1 where unknown.
    """

    num_rows: int
    canvas: tuple[int, int, int]
    labels_N: np.ndarray

    def fill(self, rows: np.ndarray, out: RawBatch) -> None:
        """Write rows[i] into ``out.pixels_BHWC[i]`` (top-left corner) and its (height, width) into ``out.extent_B2[i]``, nothing else.

        ``rows`` int64 [n] with n <= len(out), any order, repeats allowed; safe to call from several threads with different ``out``.
        Raises DataError for rows outside 0..num_rows-1, too small buffers and a closed source.
        """

    def close(self) -> None:
        """Release files and threads; calling it twice is harmless."""


def open_source(path: str | Path, split: str = "train", *, kind: str = "auto", workers: int = 1, device: str | torch.device | None = None) -> Source:
    """Open one split of a converted dataset folder, or a bare ``.beton`` file (then ``split`` is ignored).

    ``kind`` "auto" takes the folder's own format; ``workers`` decoding threads (ffcv); ``device`` keeps the whole split on that device (arrays only) so that
    ``fill`` is one index_select there.  Raises DataError for anything that cannot be opened as asked.
    """
    from fastssl.sources.arrays import ArraysSource
    from fastssl.sources.ffcv import FFCVSource
    from fastssl.sources.manifest import load_manifest

    if kind not in KINDS:
        raise DataError(f"unknown source kind {kind!r}{nearest(kind, KINDS)}; known: {list(KINDS)}")
    if workers < 1:
        raise DataError(f"a source needs at least 1 worker, not {workers}")
    if Path(path).suffix == ".beton":
        if kind == "arrays":
            raise DataError(f"{str(path)!r} is a .beton file, not an arrays dataset; use kind 'ffcv' or 'auto'")
        if device is not None:
            raise DataError("device-resident data needs a dataset in the arrays format; a .beton file is decoded on the host")
        return FFCVSource.from_file(path, workers=workers)
    manifest = load_manifest(path)
    if kind not in ("auto", manifest.format):
        raise DataError(f"dataset {str(path)!r} has the format {manifest.format!r}, not {kind!r}; use 'auto' or convert it with --format {kind}")
    if manifest.format == "arrays":
        return ArraysSource(manifest, split, device=device)
    if device is not None:
        raise DataError(f"device-resident data needs the arrays format, {str(path)!r} is {manifest.format!r}; convert it with --format arrays")
    return FFCVSource(manifest, split, workers=workers)


def check_rows(rows: np.ndarray, num_rows: int, canvas: tuple[int, int, int], out: RawBatch, *, device_type: str = "cpu") -> np.ndarray:
    """``rows`` as contiguous int64 after checking them against the source and the buffers; shared by all sources."""
    rows = np.ascontiguousarray(rows, dtype=np.int64).reshape(-1)
    if out.pixels_BHWC.device.type != device_type:
        raise DataError(f"this source writes to {device_type} memory, the batch is on {out.pixels_BHWC.device}; allocate RawBatch on {device_type}")
    capacity, height, width, channels = out.pixels_BHWC.shape
    if rows.size > capacity:
        raise DataError(f"{rows.size} rows do not fit into a batch of {capacity}")
    if height < canvas[0] or width < canvas[1] or channels != canvas[2]:
        raise DataError(f"batch canvas {(height, width, channels)} is too small for the source's {canvas}; allocate RawBatch with the source's canvas")
    if rows.size and (rows.min() < 0 or rows.max() >= num_rows):
        bad = int(rows.max() if rows.max() >= num_rows else rows.min())
        raise DataError(f"row {bad} does not exist; the source has rows 0..{num_rows - 1}")
    return rows
