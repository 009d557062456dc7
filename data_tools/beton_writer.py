"""Writing one split as an FFCV ``.beton`` file (layout in fastssl.sources.beton), one process, the same bytes for the same input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import simplejpeg

from data_tools.arrays_writer import open_output
from data_tools.readers import Picture
from fastssl.errors import DataError
from fastssl.sources.beton import ALLOCATION, FIELD, HEADER, IMAGE_FIELD, INT_FIELD, MAX_PAGE, MIN_PAGE, MODE_JPG, MODE_RAW, VERSION, record_dtype

MODES = ("auto", "raw", "jpg")
_RECORD = record_dtype([IMAGE_FIELD, INT_FIELD])


class BetonWriter:
    """``add`` rows in order, then ``finish``.

    ``mode`` auto keeps the bytes of JPEG originals and stores everything else as raw pixels; raw stores pixels always; jpg keeps JPEG originals and
    encodes the rest with ``quality``.  One-channel images are stored as replicated RGB, because a beton has no grey images.
    """

    def __init__(self, folder: Path, split: str, count: int, extents: np.ndarray, mode: str = "auto", quality: int = 95):
        if extents.max() > 0xFFFF:
            raise DataError(f"an image of {int(extents.max())} pixels is too large for a .beton file (65535 at most per side)")
        self._mode, self._quality = mode, quality
        largest = int(np.prod(extents.astype(np.int64), axis=1).max()) * 3
        self._page = MIN_PAGE
        while self._page < largest:
            self._page *= 2
        if self._page > MAX_PAGE:
            raise DataError(f"an image of {largest / 1e9:.1f} GB does not fit into a .beton page; scale the images down first")
        self._records = np.zeros(count, _RECORD)
        self._allocations = np.zeros(count, ALLOCATION)
        self._row = 0
        table_end = HEADER.itemsize + 2 * FIELD.itemsize + self._records.nbytes
        self._start = self._offset = -(-table_end // self._page) * self._page
        self.files = {"beton": f"{split}.beton"}
        self._handle = open_output(folder / self.files["beton"])

    def add(self, picture: Picture, label: int) -> tuple[np.ndarray, int]:
        """Store one image; returns the pixels as a reader will see them and the number of stored bytes."""
        pixels = picture.pixels
        height, width, channels = pixels.shape
        code, data, seen = self._encode(picture)
        if self._offset // self._page != (self._offset + len(data) - 1) // self._page:
            self._offset = -(-self._offset // self._page) * self._page  # no sample may cross a page
        self._handle.seek(self._offset)
        self._handle.write(data)
        self._records["f0"][self._row] = (code, width, height, self._offset)
        self._records["f1"][self._row] = label
        self._allocations[self._row] = (self._row, self._offset, len(data))
        self._offset += len(data)
        self._row += 1
        return seen[..., :channels], len(data)

    def _encode(self, picture: Picture) -> tuple[int, bytes, np.ndarray]:
        pixels = picture.pixels
        if self._mode != "raw" and picture.jpeg is not None and len(picture.jpeg) <= self._page:
            return MODE_JPG, picture.jpeg, pixels
        rgb = np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        if self._mode == "jpg" and picture.jpeg is None:
            data = simplejpeg.encode_jpeg(rgb, self._quality, "RGB", "444")
            if len(data) <= self._page:
                return MODE_JPG, data, simplejpeg.decode_jpeg(data, "RGB")
        return MODE_RAW, rgb.tobytes(), pixels

    def finish(self) -> dict[str, str]:
        """Pad the last page, write the tables and, last of all, the header; returns the files by role, relative to the folder."""
        table = -(-self._offset // self._page) * self._page
        header = np.zeros(1, HEADER)
        header[0] = (VERSION, 2, self._page, len(self._records), table)
        fields = np.zeros(2, FIELD)
        for field, type_id, name in zip(fields, (IMAGE_FIELD, INT_FIELD), (b"image", b"label"), strict=True):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name, np.uint8)
        with self._handle as handle:
            handle.seek(table)
            handle.write(self._allocations.tobytes())
            handle.seek(HEADER.itemsize)
            handle.write(fields.tobytes())
            handle.write(self._records.tobytes())
            handle.seek(0)
            handle.write(header.tobytes())
        return self.files

    def close(self) -> None:
        """Give up: release the file handle."""
        self._handle.close()
