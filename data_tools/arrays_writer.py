"""Writing one split in the arrays format: uint8 canvases of one size, appended row by row to a .npy file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_tools.readers import Picture


def open_output(path: Path) -> BinaryIO:
    """Where all large files are opened for writing.  Plain appends, not a memory map: a full disk is then an OSError and not a crash."""
    return open(path, "wb")


def npy_bytes(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


class ArraysWriter:
    """``add`` rows in order, then ``finish``.  Pixels beyond an image's extent are zero."""

    def __init__(self, folder: Path, split: str, count: int, canvas: tuple[int, int, int], extents: np.ndarray):
        self._canvas = canvas
        self._varied = bool((extents != np.asarray(canvas[:2])).any())
        self._extents = extents
        self._folder, self._split = folder, split
        self.files = {"pixels": f"{split}.pixels.npy"}
        self._handle = open_output(folder / self.files["pixels"])
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *canvas)}
        try:
            np.lib.format.write_array_header_1_0(self._handle, header)
        except OSError:
            self._handle.close()
            raise

    def add(self, picture: Picture, label: int) -> tuple[np.ndarray, int]:
        """Store one image; returns the pixels as a reader will see them and the number of stored bytes."""
        pixels = picture.pixels
        stored = np.ascontiguousarray(pixels)
        if pixels.shape != self._canvas:
            stored = np.zeros(self._canvas, np.uint8)
            stored[: pixels.shape[0], : pixels.shape[1]] = pixels
        self._handle.write(stored.data)
        return pixels, stored.nbytes

    def finish(self) -> dict[str, str]:
        """Close the file and write the extents if the images differ in size; returns the files by role, relative to the folder."""
        self._handle.close()
        if self._varied:
            self.files["extents"] = f"{self._split}.extents.npy"
            with open_output(self._folder / self.files["extents"]) as handle:
                handle.write(npy_bytes(self._extents.astype(np.int32)))
        return self.files

    def close(self) -> None:
        """Give up: release the file handle."""
        self._handle.close()
