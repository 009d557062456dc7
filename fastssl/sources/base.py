"""The contract of everything that delivers canvases, with the door that opens a converted dataset."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from fastssl.errors import DataError, nearest
from fastssl.types import RawBatch

KINDS = ("auto", "arrays", "ffcv", "dali", "shards")
ENGINES = ("auto", "native", "ffcv")
_FORMAT_OF = {"shards": "dali"}  # two readers of one format


@runtime_checkable
class Source(Protocol):
    """Random access to decoded images.  A source keeps no position: the caller names the rows, so any order, resume point and world size are the caller's.

    ``canvas`` is (H, W, C) in pixels, large enough for every row; ``labels_N`` int64, -1 where unknown.  ``extents_N2`` int32 (height, width) of each row on
    the canvas; ``sizes_N2`` int32 (height, width) of the image itself where conversion or decoding reduces it, None where that is the extent.
    """

    num_rows: int
    canvas: tuple[int, int, int]
    labels_N: np.ndarray
    extents_N2: np.ndarray
    sizes_N2: np.ndarray | None

    def fill(self, rows: np.ndarray, out: RawBatch) -> None:
        """Write rows[i] into ``out.pixels_BHWC[i]`` (top-left corner) and its (height, width) into ``out.extent_B2[i]``, nothing else.

        ``rows`` int64 [n] with n <= len(out), any order, repeats allowed; safe to call from several threads with different ``out``.
        Raises DataError for rows outside 0..num_rows-1, too small buffers and a closed source.
        """

    def close(self) -> None:
        """Release files and threads; calling it twice is harmless."""


def open_source(
    path: str | Path,
    split: str = "train",
    *,
    kind: str = "auto",
    workers: int = 1,
    device: str | torch.device | None = None,
    engine: str = "auto",
    view_size: int = 0,
    scaled_decode: float = 0.0,
) -> Source:
    """Open one split of a converted dataset folder, or a bare ``.beton`` file (then ``split`` is ignored).

    ``kind`` "auto" takes the folder's own format; a folder of format dali is read by "shards" (no DALI needed; also what auto takes, so that pixels do not
    depend on what is installed) or "dali".  ``workers`` decoding threads.  ``device``: arrays keep the whole split there, so that ``fill`` is one
    index_select; dali decodes there.  ``engine``: who reads .beton files, "auto" = native.  ``scaled_decode`` > 0 decodes the images of .beton files and shards
    reduced where views of at most ``view_size`` pixels a side allow it (rule: fastssl/sources/jpeg.py); pixels that are stored raw stay as they are.
    Raises DataError for anything that cannot be opened as asked.
    """
    from fastssl.sources.arrays import ArraysSource
    from fastssl.sources.manifest import load_manifest

    if kind not in KINDS:
        raise DataError(f"unknown source kind {kind!r}{nearest(kind, KINDS)}; known: {list(KINDS)}")
    if scaled_decode < 0 or view_size < 0:
        raise DataError(f"data.scaled_decode is 0 (off) or above, not {scaled_decode} (for views of {view_size} pixels)")
    if workers < 1:
        raise DataError(f"a source needs at least 1 worker, not {workers}")
    if Path(path).suffix == ".beton":
        if kind == "arrays":
            raise DataError(f"{str(path)!r} is a .beton file, not an arrays dataset; use kind 'ffcv' or 'auto'")
        if device is not None:
            raise DataError("device-resident data needs a dataset in the arrays format; a .beton file is decoded on the host")
        return beton_engine(engine).from_file(path, workers=workers, view_size=view_size, scaled_decode=scaled_decode)
    manifest = load_manifest(path)
    wanted = _FORMAT_OF.get(kind, kind)
    if wanted not in ("auto", manifest.format):
        raise DataError(f"dataset {str(path)!r} has the format {manifest.format!r}, not {wanted!r}; use 'auto' or convert it with --format {wanted}")
    if manifest.format == "arrays":
        return ArraysSource(manifest, split, device=device)
    if kind == "dali":
        if scaled_decode:
            raise DataError(f"data.scaled_decode={scaled_decode:g}: DALI decodes whole images; read the same shards with data.source=shards, or set it to 0")
        from fastssl.sources.dali import DaliSource

        return DaliSource(manifest, split, workers=workers, device=device)
    if device is not None:
        raise DataError(f"device-resident data needs the arrays format, {str(path)!r} is {manifest.format!r}; convert it with --format arrays")
    if manifest.format == "dali":
        from fastssl.sources.shards import ShardsSource

        return ShardsSource(manifest, split, workers=workers, view_size=view_size, scaled_decode=scaled_decode)
    return beton_engine(engine)(manifest, split, workers=workers, view_size=view_size, scaled_decode=scaled_decode)


def beton_engine(engine: str) -> Any:
    """The class that reads .beton files: "native", "ffcv" (the ffcv package's compiled pipeline) or "auto": native.

    By benchmarks/bench_engines.py the two deliver the same pixels; native is faster for small raw images and starts at once; ffcv saves up to a twelfth of the
    processor time of JPEGs on a wider canvas, but compiles for some seconds in every process.
    """
    if engine not in ENGINES:
        raise DataError(f"unknown engine {engine!r}{nearest(engine, ENGINES)}; known: {list(ENGINES)}")
    if engine == "ffcv":
        from fastssl.sources.ffcv_loader import FFCVLoaderSource

        return FFCVLoaderSource
    from fastssl.sources.ffcv import FFCVSource

    return FFCVSource


def check_map(mapped: mmap.mmap, file: Path) -> None:
    """DataError for a mapped file that has become shorter since it was opened: reading beyond its end would kill the process without a word."""
    if mapped.size() < len(mapped):
        raise DataError(f"{str(file)!r} was cut short while in use: {mapped.size()} bytes are left of {len(mapped)}; copy or convert the dataset again")


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
