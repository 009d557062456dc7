"""Source over ``.beton`` files, native engine: memory map, no ffcv package, JPEG decoding outside the interpreter lock."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastssl.errors import DataError
from fastssl.sources.base import check_map, check_rows
from fastssl.sources.beton import MODE_JPG, MODE_RAW, BetonFile, open_beton
from fastssl.sources.jpeg import decode_into, reduced_sizes, reductions
from fastssl.sources.manifest import Manifest, load_labels, load_sizes
from fastssl.types import RawBatch

BAD_PIXEL = 127  # mid-grey: what a row shows whose JPEG cannot be decoded
_GATHER_BELOW = 16384  # bytes: smaller raw images are gathered by one call, larger ones copied one by one without an intermediate

Item = TypeVar("Item")


class FFCVSource:
    """Rows of a beton decoded into the caller's buffers by ``workers`` threads, of which the calling thread is one.

    Grey datasets (manifest says 1 channel) store replicated RGB, because a beton has no grey images; one channel is handed back.
    A row whose JPEG is corrupt, or whose decoded size differs from the recorded one, is delivered as mid-grey 127 of the recorded size: never as whatever the
    buffer held before.  Such rows are counted in ``bad_rows`` (distinct rows; ``bad_row_ids`` lists them) and warned about once.

    ``scaled_decode`` > 0 decodes JPEGs reduced where ``view_size`` allows it (rule: fastssl/sources/jpeg.py); extents and ``canvas`` are then those of the
    reduced images.
    """

    def __init__(self, manifest: Manifest, split: str = "train", *, workers: int = 1, view_size: int = 0, scaled_decode: float = 0.0):
        info = manifest.split(split)
        if "beton" not in info.files:
            raise DataError(f"split {split!r} of {str(manifest.root)!r} names no .beton file; convert the dataset again")
        labels = load_labels(manifest, split)
        beton = open_beton(manifest.root / info.files["beton"])
        if beton.num_rows != info.count:
            raise DataError(f"{str(beton.path)!r} has {beton.num_rows} rows, dataset.json says {info.count}; convert the dataset again")
        if beton.labels_N is None or not np.array_equal(beton.labels_N, labels):
            raise DataError(f"{str(beton.path)!r} carries other labels than {info.labels!r}; convert the dataset again")
        if int(beton.height_N.max()) > info.max_height or int(beton.width_N.max()) > info.max_width:
            raise DataError(f"{str(beton.path)!r} has images larger than dataset.json says; convert the dataset again")
        canvas = (info.max_height, info.max_width, manifest.channels)
        self._setup(beton, labels, canvas, workers, view_size, scaled_decode, load_sizes(manifest, split))

    @classmethod
    def from_file(cls, path: str | Path, *, workers: int = 1, view_size: int = 0, scaled_decode: float = 0.0) -> FFCVSource:
        """A bare beton, anyone's, with an RGB image field; labels from its int field, -1 when it has none."""
        self = cls.__new__(cls)
        beton = open_beton(path)
        labels = np.full(beton.num_rows, -1, np.int64) if beton.labels_N is None else beton.labels_N
        self._setup(beton, labels, (int(beton.height_N.max()), int(beton.width_N.max()), 3), workers, view_size, scaled_decode, None)
        return self

    def _setup(
        self,
        beton: BetonFile,
        labels: np.ndarray,
        canvas: tuple[int, int, int],
        workers: int,
        view_size: int,
        scaled_decode: float,
        own_sizes: np.ndarray | None,
    ) -> None:
        self.num_rows, self.canvas, self.labels_N = beton.num_rows, canvas, labels
        self.workers = workers
        stored = np.stack([beton.height_N, beton.width_N], axis=1)
        factor_N = np.where(beton.mode_N == MODE_JPG, reductions(stored, view_size, scaled_decode), 1)
        self.extents_N2 = stored
        if (factor_N > 1).any():
            self.extents_N2 = reduced_sizes(stored, factor_N)
            self.canvas = (int(self.extents_N2[:, 0].max()), int(self.extents_N2[:, 1].max()), canvas[2])
        own = stored if own_sizes is None else own_sizes
        self.sizes_N2: np.ndarray | None = None if np.array_equal(own, self.extents_N2) else own
        self.bad_row_ids: set[int] = set()
        self._beton: BetonFile | None = beton
        self._lock = threading.Lock()
        self._scratch = threading.local()
        self._scratch_bytes = int(self.extents_N2.astype(np.int64).prod(axis=1).max()) * 3
        one_size = (stored == stored[0]).all()
        self._gathers = bool(one_size and (beton.mode_N == MODE_RAW).all() and self._scratch_bytes < _GATHER_BELOW)
        self._pool = ThreadPoolExecutor(workers - 1, thread_name_prefix="fastssl-decode") if workers > 1 else None

    @property
    def bad_rows(self) -> int:
        """Number of distinct rows delivered as grey because they could not be decoded."""
        return len(self.bad_row_ids)

    def fill(self, rows: np.ndarray, out: RawBatch) -> None:
        """See Source.fill."""
        beton = self._beton
        if beton is None:
            raise DataError("this source is closed; open it again before reading rows")
        rows = check_rows(rows, self.num_rows, self.canvas, out)
        check_map(beton.mapped, beton.path)
        pixels, extents = out.pixels_BHWC.numpy()[: len(rows)], out.extent_B2.numpy()[: len(rows)]
        np.take(self.extents_N2, rows, axis=0, out=extents, mode="clip")
        if len(rows):
            self._fill_pixels(beton, rows, extents, pixels)

    def _fill_pixels(self, beton: BetonFile, rows: np.ndarray, extents: np.ndarray, pixels: np.ndarray) -> None:
        if self._gathers:
            self._gather_raw(beton, rows, pixels)
            return
        row_list, extent_list = rows.tolist(), extents.tolist()
        self._share(lambda slot: self._fill_slot(beton, row_list[slot], extent_list[slot], pixels[slot]), self._longest_first(beton, rows).tolist())

    def _longest_first(self, beton: BetonFile, rows: np.ndarray) -> np.ndarray:
        """Slots in the order in which they are handed to threads: with the long ones last, all but one thread would idle at the end."""
        return np.argsort(-beton.size_N[rows], kind="stable") if self._pool is not None else np.arange(len(rows))

    def _share(self, work: Callable[[Item], Any], items: list[Item]) -> None:
        """``work`` on each item, the next one to whichever thread is free; returns, or raises its first error, when all threads have let go of the buffers."""
        left = iter(items)

        def drain(left: Iterable[Item]) -> None:
            for item in left:
                work(item)

        helpers = min(self.workers, len(items)) - 1
        jobs = [self._pool.submit(drain, left) for _ in range(helpers)] if self._pool is not None else []
        try:
            drain(left)
        finally:
            errors = [job.exception() for job in jobs]
        for error in errors:
            if error is not None:
                raise error

    def _gather_raw(self, beton: BetonFile, rows: np.ndarray, pixels: np.ndarray) -> None:
        # Every byte offset is the start of a window of one image; indexing that view by address copies all rows in one call.
        height, width = int(beton.height_N[0]), int(beton.width_N[0])
        windows = np.lib.stride_tricks.sliding_window_view(beton.data, height * width * 3)
        images = windows[beton.ptr_N[rows]].reshape(len(rows), height, width, 3)
        pixels[:, :height, :width] = images[..., : self.canvas[2]]

    def _fill_slot(self, beton: BetonFile, row: int, extent: list[int], slot: np.ndarray) -> None:
        start = int(beton.ptr_N[row])
        data = beton.data[start : start + int(beton.size_N[row])]
        height, width = extent
        if beton.mode_N[row] == MODE_RAW:
            slot[:height, :width] = data.reshape(height, width, 3)[..., : self.canvas[2]]
            return
        try:
            decode_into(data, slot, (int(beton.height_N[row]), int(beton.width_N[row])), (height, width), self._buffer())
        except ValueError as error:
            slot[:height, :width] = BAD_PIXEL
            self._report(row, str(beton.path), str(error))

    def _buffer(self) -> np.ndarray:
        """This thread's scratch memory for one image."""
        buffer = getattr(self._scratch, "buffer", None)
        if buffer is None:
            buffer = self._scratch.buffer = np.empty(self._scratch_bytes, np.uint8)
        return buffer

    def _report(self, row: int, path: str, reason: str) -> None:
        with self._lock:
            first = not self.bad_row_ids
            self.bad_row_ids.add(row)
        if first:
            warnings.warn(
                f"{path!r}: row {row} cannot be decoded ({reason}); such rows are delivered as mid-grey images and counted in bad_rows. "
                "`fastssl-data verify` lists all of them.",
                RuntimeWarning,
                stacklevel=3,
            )

    def close(self) -> None:
        """Stop the decoding threads and drop the map (its file handle goes with the last reference)."""
        self._beton = None
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
