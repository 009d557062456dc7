"""Source over plain uint8 arrays: a read-only memory map on the host, or the whole split resident on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.errors import DataError
from fastssl.sources.base import check_map, check_rows
from fastssl.sources.manifest import Manifest, load_labels, load_sizes, open_npy
from fastssl.types import RawBatch

_SLAB = 256 << 20  # bytes on their way to the device at a time


class ArraysSource:
    """Rows of ``<split>.pixels.npy`` (uint8 [N, H, W, C]) gathered straight into the caller's buffers.

    With ``device`` the pixels are copied there once (``nbytes`` bytes) and ``fill`` becomes an index_select on that device; ``out`` must live there too.
    """

    def __init__(self, manifest: Manifest, split: str = "train", device: str | torch.device | None = None):
        info = manifest.split(split)
        self.num_rows = info.count
        self.canvas = (info.max_height, info.max_width, manifest.channels)
        self.labels_N = load_labels(manifest, split)
        self.sizes_N2 = load_sizes(manifest, split)
        if "pixels" not in info.files:
            raise DataError(f"split {split!r} of {str(manifest.root)!r} names no pixel file; convert the dataset again")
        pixels: Any = open_npy(manifest.root / info.files["pixels"], np.uint8, (info.count, *self.canvas))
        if "extents" in info.files:
            extents = open_npy(manifest.root / info.files["extents"], np.int32, (info.count, 2), mmap=False)
            if extents.min() < 1 or (extents > np.asarray(self.canvas[:2])).any():
                raise DataError(f"{str(manifest.root / info.files['extents'])!r} has extents outside 1..{self.canvas[:2]}; convert the dataset again")
        else:
            extents = np.tile(np.asarray(self.canvas[:2], dtype=np.int32), (info.count, 1))
        self.nbytes = pixels.nbytes
        self.device = torch.device("cpu" if device is None else device)
        self._pixels: Any = pixels  # np.memmap, whose own attributes NumPy's stubs do not know
        self.extents_N2 = extents
        self._resident: tuple[Tensor, Tensor] | None = None
        if device is not None:
            self._resident = (_to_device(pixels, self.device), torch.from_numpy(extents).to(self.device))
            self._pixels = None
        self._closed = False

    def fill(self, rows: np.ndarray | Tensor, out: RawBatch) -> None:
        """See Source.fill.  A device-resident source also takes ``rows`` as an int64 tensor on its device; those are not range-checked (no host sync)."""
        resident, pixels = self._resident, self._pixels
        if self._closed:
            raise DataError("this source is closed; open it again before reading rows")
        if resident is not None:
            self._fill_resident(rows, out, *resident)
            return
        assert pixels is not None
        rows = check_rows(np.asarray(rows), self.num_rows, self.canvas, out)
        check_map(pixels._mmap, Path(pixels.filename))
        height, width, _ = self.canvas
        target, extent = out.pixels_BHWC[: len(rows)].numpy(), out.extent_B2[: len(rows)].numpy()
        if target.flags.c_contiguous and target.shape[1:] == self.canvas:
            # mode="clip" lets numpy write into `out` without a bounce buffer; the rows were range-checked above.
            np.take(pixels, rows, axis=0, out=target, mode="clip")
        else:
            target[:, :height, :width] = pixels[rows]
        np.take(self.extents_N2, rows, axis=0, out=extent, mode="clip")

    def _fill_resident(self, rows: np.ndarray | Tensor, out: RawBatch, pixels: Tensor, extents: Tensor) -> None:
        if not isinstance(rows, Tensor):
            checked = check_rows(rows, self.num_rows, self.canvas, out, device_type=pixels.device.type)
            rows = torch.from_numpy(checked).to(pixels.device, non_blocking=True)
        height, width, _ = self.canvas
        count = rows.shape[0]
        target = out.pixels_BHWC[:count]
        if target.shape[1:] == pixels.shape[1:]:
            torch.index_select(pixels, 0, rows, out=target)
        else:
            target[:, :height, :width].copy_(pixels.index_select(0, rows))
        torch.index_select(extents, 0, rows, out=out.extent_B2[:count])

    def close(self) -> None:
        """Drop the map (its file handle goes with the last reference) or the resident copy."""
        self._closed = True
        self._pixels = None
        self._resident = None


def _to_device(pixels: np.ndarray, device: torch.device) -> Tensor:
    """A copy of the map on ``device``, made in pieces: the host never holds the whole of it."""
    out = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    rows = max(1, _SLAB // max(1, pixels[0].nbytes))
    for first in range(0, len(pixels), rows):
        out[first : first + rows].copy_(torch.from_numpy(np.array(pixels[first : first + rows])))  # a copy, because torch warns about read-only maps
    return out
