"""Source over ``.beton`` files, native engine: memory map, no ffcv package, JPEG decoding outside the interpreter lock."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg

from fastssl.errors import DataError
from fastssl.sources.base import check_rows
from fastssl.sources.beton import MODE_JPG, MODE_RAW, BetonFile, open_beton
from fastssl.sources.manifest import Manifest, load_labels
from fastssl.types import RawBatch

BAD_PIXEL = 127  # mid-grey: what a row shows whose JPEG cannot be decoded


class FFCVSource:
    """Rows of a beton decoded into the caller's buffers by ``workers`` threads (the calling thread alone when 1).

    Grey datasets (manifest says 1 channel) store replicated RGB, because a beton has no grey images; one channel is handed back.
    A row whose JPEG is corrupt, or whose decoded size differs from the recorded one, is delivered as mid-grey 127 of the recorded size: never as whatever the
    buffer held before.  Such rows are counted in ``bad_rows`` (distinct rows; ``bad_row_ids`` lists them) and warned about once.
    """

    def __init__(self, manifest: Manifest, split: str = "train", *, workers: int = 1):
        info = manifest.split(split)
        if "beton" not in info.files:
            raise DataError(f"split {split!r} of {str(manifest.root)!r} names no .beton file; convert the dataset again")
        labels = load_labels(manifest, split)
        beton = open_beton(manifest.root / info.files["beton"])
        if beton.num_rows != info.count:
            raise DataError(f"{str(beton.path)!r} has {beton.num_rows} rows, dataset.json says {info.count}; convert the dataset again")
        if beton.labels_N is None or not np.array_equal(beton.labels_N, labels):
            raise DataError(f"{str(beton.path)!r} carries other labels than {info.labels!r}; convert the dataset again")
        self._setup(beton, labels, (info.max_height, info.max_width, manifest.channels), workers)
        if int(beton.height_N.max()) > info.max_height or int(beton.width_N.max()) > info.max_width:
            raise DataError(f"{str(beton.path)!r} has images larger than dataset.json says; convert the dataset again")

    @classmethod
    def from_file(cls, path: str | Path, *, workers: int = 1) -> FFCVSource:
        """A bare beton, anyone's, with an RGB image field; labels from its int field, -1 when it has none."""
        self = cls.__new__(cls)
        beton = open_beton(path)
        labels = np.full(beton.num_rows, -1, np.int64) if beton.labels_N is None else beton.labels_N
        self._setup(beton, labels, (int(beton.height_N.max()), int(beton.width_N.max()), 3), workers)
        return self

    def _setup(self, beton: BetonFile, labels: np.ndarray, canvas: tuple[int, int, int], workers: int) -> None:
        self.num_rows, self.canvas, self.labels_N = beton.num_rows, canvas, labels
        self.workers = workers
        self.bad_row_ids: set[int] = set()
        self._beton: BetonFile | None = beton
        self._lock = threading.Lock()
        self._scratch = threading.local()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="fastssl-decode") if workers > 1 else None
        one_size = (beton.height_N == beton.height_N[0]).all() and (beton.width_N == beton.width_N[0]).all()
        self._uniform_raw = bool(one_size and (beton.mode_N == MODE_RAW).all())

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
        pixels, extent = out.pixels_BHWC.numpy(), out.extent_B2.numpy()
        extent[: len(rows), 0] = beton.height_N[rows]
        extent[: len(rows), 1] = beton.width_N[rows]
        if self._uniform_raw:
            self._gather_raw(beton, rows, pixels)
        elif self._pool is None or len(rows) < 2:
            self._decode(beton, rows, pixels)
        else:
            pieces = np.array_split(np.arange(len(rows)), min(self.workers, len(rows)))
            jobs = [self._pool.submit(self._decode, beton, rows[piece], pixels[piece[0] : piece[-1] + 1]) for piece in pieces]
            for job in jobs:
                job.result()

    def _gather_raw(self, beton: BetonFile, rows: np.ndarray, pixels: np.ndarray) -> None:
        # Every byte offset is the start of a window of one image; indexing that view by address copies all rows in one call.
        height, width = int(beton.height_N[0]), int(beton.width_N[0])
        length = height * width * 3
        windows = np.lib.stride_tricks.sliding_window_view(beton.data, length)
        images = windows[beton.ptr_N[rows]].reshape(len(rows), height, width, 3)
        pixels[: len(rows), :height, :width] = images[..., : self.canvas[2]]

    def _decode(self, beton: BetonFile, rows: np.ndarray, pixels: np.ndarray) -> None:
        for slot, row in zip(pixels, rows.tolist(), strict=False):
            height, width = int(beton.height_N[row]), int(beton.width_N[row])
            start = int(beton.ptr_N[row])
            data = beton.data[start : start + int(beton.size_N[row])]
            if beton.mode_N[row] == MODE_RAW:
                slot[:height, :width] = data.reshape(height, width, 3)[..., : self.canvas[2]]
            elif beton.mode_N[row] == MODE_JPG:
                self._decode_jpeg(data, row, slot, height, width)

    def _decode_jpeg(self, data: np.ndarray, row: int, slot: np.ndarray, height: int, width: int) -> None:
        direct = slot.shape[1:] == (width, 3) and slot.flags.c_contiguous
        try:
            if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
                raise ValueError("size differs from the recorded one")
            buffer = slot[:height] if direct else self._buffer(height * width * 3)
            image = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
            if not direct:
                slot[:height, :width] = image[..., : self.canvas[2]]
        except ValueError as error:
            slot[:height, :width] = BAD_PIXEL
            self._report(row, beton_path=str(self._beton.path) if self._beton else "", reason=str(error))

    def _buffer(self, size: int) -> np.ndarray:
        buffer = getattr(self._scratch, "buffer", None)
        if buffer is None or buffer.size < size:
            buffer = self._scratch.buffer = np.empty(size, np.uint8)
        return buffer[:size]

    def _report(self, row: int, beton_path: str, reason: str) -> None:
        with self._lock:
            first = not self.bad_row_ids
            self.bad_row_ids.add(row)
        if first:
            warnings.warn(
                f"{beton_path!r}: row {row} cannot be decoded ({reason}); such rows are delivered as mid-grey images and counted in bad_rows. "
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
