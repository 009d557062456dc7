"""Writing one split in the arrays format: uint8 canvases of one size in a .npy file, appended unit by unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.outputs import copy_range, npy_bytes, npy_header, open_output
from data_tools.plan import SplitPlan

__all__ = ["ArraysWriter", "npy_bytes", "open_output"]


class ArraysWriter:
    """``append`` units in order, then ``finish``.  Pixels beyond an image's extent are zero.  ``mark`` (rows written) lets another writer continue."""

    covered = True  # every byte of the pixels is in some row's hash or is padding

    def __init__(self, folder: Path, plan: SplitPlan, mark: dict[str, Any] | None = None):
        self._canvas = (plan.max_height, plan.max_width, plan.channels)
        self._varied, self._row, self._count = plan.varied, 0, plan.count
        self.files: dict[str, Any] = {"pixels": f"{plan.name}.pixels.npy"}
        path = folder / self.files["pixels"]
        header = npy_header(np.dtype(np.uint8), (plan.count, *self._canvas))
        self._handle = open_output(path, resume=True) if mark else open_output(path)
        try:
            if mark:
                self._row = int(mark["row"])
                self._handle.seek(len(header) + self._row * int(np.prod(self._canvas)))
                self._handle.truncate()
            else:
                self._handle.write(header)
        except OSError:
            self._handle.close()
            raise

    def append(self, rows: np.ndarray, payload: BinaryIO) -> None:
        """Add the rows of one unit (units.ROW), whose stored bytes follow each other in ``payload``."""
        if not self._varied:
            copy_range(payload, 0, int(rows["bytes"].sum()), self._handle)
        else:
            payload.seek(0)
            for height, width in zip(rows["height"].tolist(), rows["width"].tolist(), strict=True):
                canvas = np.zeros(self._canvas, np.uint8)
                canvas[:height, :width] = np.frombuffer(payload.read(height * width * self._canvas[2]), np.uint8).reshape(height, width, self._canvas[2])
                self._handle.write(canvas.data)
        self._row += len(rows)

    def mark(self) -> dict[str, Any]:
        return {"row": self._row}

    def flush(self) -> BinaryIO:
        """Hand everything to the system; returns the open file."""
        self._handle.flush()
        return self._handle

    def finish(self) -> dict[str, Any]:
        """Close the file; returns the files by role, relative to the folder."""
        self._handle.close()
        return self.files

    def close(self) -> None:
        """Give up: release the file handle."""
        self._handle.close()
