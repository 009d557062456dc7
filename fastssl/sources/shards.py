"""Source over WebDataset tar shards (or plain files), found by our own sample index and decoded without DALI.

``<split>.samples.npy`` has one record per row: which file of the manifest's ``shards`` list, offset and size of the encoded image in it in bytes, height and
width of the decoded image in pixels, and the CRC-32 of the bytes (0 = unknown).  A plain image file is a shard with one sample at offset 0.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from fastssl.errors import DataError
from fastssl.sources.base import check_rows
from fastssl.sources.encoded import BAD_PIXEL, BadRows, decode_into
from fastssl.sources.jpeg import reduced_sizes, reductions
from fastssl.sources.manifest import Manifest, load_labels, load_sizes, open_npy
from fastssl.types import RawBatch

SAMPLE = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("height", "<i4"), ("width", "<i4"), ("crc", "<u4")])
_OPEN_FILES = 64


class ShardsSource:
    """Rows decoded into the caller's buffers by ``workers`` threads, of which the calling thread is one; random access, nothing is read in sequence.

    A row whose bytes do not have the recorded checksum, cannot be decoded, or decode to another size is delivered as mid-grey 127 of the recorded size.  Such
    rows are counted in ``bad_rows`` (distinct rows; ``bad_row_ids`` lists them) and warned about once.

    ``scaled_decode`` > 0 decodes images reduced where ``view_size`` allows it (rule: fastssl/sources/jpeg.py); extents and ``canvas`` are then those of the
    reduced images.  What is no JPEG is decoded whole and averaged to the same size.
    """

    def __init__(self, manifest: Manifest, split: str = "train", *, workers: int = 1, view_size: int = 0, scaled_decode: float = 0.0):
        info = manifest.split(split)
        if "samples" not in info.files or not info.lists.get("shards"):
            raise DataError(f"split {split!r} of {str(manifest.root)!r} names no shards and samples; convert the dataset again")
        self.num_rows = info.count
        self.canvas = (info.max_height, info.max_width, manifest.channels)
        self.labels_N = load_labels(manifest, split)
        self.sizes_N2 = load_sizes(manifest, split)
        self.workers = workers
        paths = [manifest.root / name for name in info.lists["shards"]]
        index = manifest.root / info.files["samples"]
        self._samples = open_npy(index, SAMPLE, (info.count,), mmap=False)
        _check_samples(self._samples, paths, self.canvas, index)
        self._stored_N2 = np.stack([self._samples["height"], self._samples["width"]], axis=1).astype(np.int32)
        self._factor_N = reductions(self._stored_N2, view_size, scaled_decode)
        self.extents_N2 = self._stored_N2
        if (self._factor_N > 1).any():
            self.extents_N2 = reduced_sizes(self._stored_N2, self._factor_N)
            self.canvas = (int(self.extents_N2[:, 0].max()), int(self.extents_N2[:, 1].max()), manifest.channels)
            self.sizes_N2 = self._stored_N2 if self.sizes_N2 is None else self.sizes_N2
        self._files = _Files(paths)
        self._bad = BadRows(str(index))
        self._pool = ThreadPoolExecutor(workers - 1, thread_name_prefix="fastssl-decode") if workers > 1 else None
        self._closed = False

    @property
    def bad_row_ids(self) -> set[int]:
        """The rows that were delivered as grey because they could not be decoded."""
        return self._bad.ids

    @property
    def bad_rows(self) -> int:
        """Number of distinct rows delivered as grey because they could not be decoded."""
        return len(self._bad.ids)

    def fill(self, rows: np.ndarray, out: RawBatch) -> None:
        """See Source.fill."""
        if self._closed:
            raise DataError("this source is closed; open it again before reading rows")
        rows = check_rows(rows, self.num_rows, self.canvas, out)
        out.extent_B2.numpy()[: len(rows)] = self.extents_N2[rows]
        self._decode_all(rows, out.pixels_BHWC.numpy())

    def _decode_all(self, rows: np.ndarray, pixels: np.ndarray) -> None:
        """rows[i] into pixels[i], the work shared by the decoding threads."""
        left = iter(enumerate(rows.tolist()))

        def drain() -> None:
            for place, row in left:  # whoever is free takes the next one
                self._decode_row(row, self._read(row), pixels[place])

        jobs = [self._pool.submit(drain) for _ in range(min(self.workers, len(rows)) - 1)] if self._pool is not None else []
        try:
            drain()
        finally:
            wait(jobs)  # nobody may write to the buffers after this call, whatever happened
        for job in jobs:
            job.result()

    def _decode_row(self, row: int, data: bytes, slot: np.ndarray) -> bool:
        """Whether the image is sound; if not, the slot shows grey and the row is counted."""
        height, width = self.extents_N2[row].tolist()
        try:
            self._check_bytes(row, data)
            decode_into(data, slot, tuple(self._stored_N2[row].tolist()), int(self._factor_N[row]))
        except ValueError as error:
            slot[:height, :width] = BAD_PIXEL
            self._bad.add(row, str(error))
            return False
        return True

    def _read(self, row: int) -> bytes:
        """The encoded image as it lies in its file; shorter than recorded if the file ends before it."""
        sample = self._samples[row]
        return self._files.read(int(sample["shard"]), int(sample["offset"]), int(sample["size"]))

    def _check_bytes(self, row: int, data: bytes) -> None:
        sample = self._samples[row]
        if len(data) != sample["size"]:
            raise ValueError(f"its file ends after {len(data)} of {sample['size']} bytes")
        if sample["crc"] and zlib.crc32(data) != sample["crc"]:
            raise ValueError("its bytes do not have the recorded checksum")

    def close(self) -> None:
        """Stop the decoding threads and close the files."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        self._files.close()


def _check_samples(samples: np.ndarray, paths: list[Path], canvas: tuple[int, int, int], index: Path) -> None:
    where = f"{str(index)!r}"
    if samples["shard"].min() < 0 or samples["shard"].max() >= len(paths):
        raise DataError(f"{where} names shard {samples['shard'].max()}, dataset.json lists {len(paths)}; convert the dataset again")
    high, wide = samples["height"], samples["width"]
    if min(samples["offset"].min(), samples["size"].min()) < 0 or min(high.min(), wide.min()) < 1 or high.max() > canvas[0] or wide.max() > canvas[1]:
        raise DataError(f"{where} has offsets or sizes out of range (images up to {canvas[0]}x{canvas[1]}); convert the dataset again")
    ends = np.zeros(len(paths), np.float64)  # sums of two int64 may not fit one; sizes of files are exact up to 8 PiB
    np.maximum.at(ends, samples["shard"], samples["offset"].astype(np.float64) + samples["size"])
    for path, end in zip(paths, ends.tolist(), strict=True):
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"shard {str(path)!r} cannot be read ({error.strerror}); copy or convert the dataset again") from error
        if size < end:
            raise DataError(f"shard {str(path)!r} is truncated ({size} bytes, its samples need {end:.0f}); copy or convert the dataset again")


class _Descriptor:
    """A file that closes itself with its last user, so that one thread may drop it while another reads."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        number, self.number = getattr(self, "number", -1), -1
        if number >= 0:
            os.close(number)


class _Files:
    """Reads pieces of many files through at most ``_OPEN_FILES`` descriptors, from any thread."""

    def __init__(self, paths: list[Path]):
        self._paths = paths
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """``size`` bytes of file ``number``, fewer at its end.  DataError where the storage refuses."""
        try:
            with self._lock:
                file = self._open.get(number)
                if file is None:
                    file = self._open[number] = _Descriptor(self._paths[number])
                    if len(self._open) > _OPEN_FILES:
                        self._open.popitem(last=False)
                self._open.move_to_end(number)
            data = os.pread(file.number, size, offset)
            while 0 < len(data) < size:
                more = os.pread(file.number, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
            return data
        except OSError as error:
            raise DataError(f"shard {str(self._paths[number])!r} cannot be read ({error.strerror}); check the storage") from error

    def close(self) -> None:
        with self._lock:
            self._open.clear()
