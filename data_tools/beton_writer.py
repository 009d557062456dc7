"""Writing one split as an FFCV ``.beton`` file (layout in fastssl.sources.beton), unit by unit, the same bytes for the same rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.outputs import copy_range, open_output
from data_tools.plan import SplitPlan
from fastssl.errors import DataError
from fastssl.sources.beton import ALLOCATION, FIELD, HEADER, IMAGE_FIELD, INT_FIELD, MAX_PAGE, MIN_PAGE, VERSION, record_dtype

SIDE_LIMIT = 0xFFFF  # height and width are 16-bit numbers
_RECORD = record_dtype([IMAGE_FIELD, INT_FIELD])


def page_size(largest: int) -> int:
    """The smallest page (a power of two within FFCV's limits) that holds a row of ``largest`` bytes.  DataError where none does."""
    page = MIN_PAGE
    while page < largest:
        page *= 2
    if page > MAX_PAGE:
        raise DataError(f"an image of {largest / 1e9:.1f} GB does not fit into a .beton page; convert with --max-side")
    return page


def place_rows(sizes: np.ndarray, offset: int, page: int) -> tuple[np.ndarray, int]:
    """Addresses int64 of rows of these sizes from ``offset`` on, none crossing a page, and the first free byte after them."""
    addresses, ends = np.empty(len(sizes), np.int64), np.cumsum(sizes, dtype=np.int64)
    row = 0
    while row < len(sizes):
        before = int(ends[row - 1]) if row else 0
        room = page - offset % page
        fit = int(np.searchsorted(ends, before + room, "right"))
        if fit == row:
            offset += room
            continue
        addresses[row:fit] = offset + ends[row:fit] - sizes[row:fit] - before
        offset += int(ends[fit - 1]) - before
        row = fit
    return addresses, offset


class BetonWriter:
    """``append`` units in order, then ``finish``.  ``mark`` lets another writer continue after a kill.

    The header is written last, so that an unfinished file is never mistaken for a whole one.  ``side`` keeps the allocation table until the end.
    """

    covered = True  # every byte of an image is in some row's hash; tables are checked when the file is opened

    def __init__(self, folder: Path, plan: SplitPlan, mark: dict[str, Any] | None = None):
        self._page, self._count = page_size(plan.largest_bytes), plan.count
        self._table = HEADER.itemsize + 2 * FIELD.itemsize
        self._row, self._offset = 0, -(-(self._table + plan.count * _RECORD.itemsize) // self._page) * self._page
        self.files: dict[str, Any] = {"beton": f"{plan.name}.beton"}
        self._side = folder.parent / f"{plan.name}.allocations"
        self._handle = open_output(folder / self.files["beton"], resume=bool(mark))
        try:
            self._allocations = open_output(self._side, resume=bool(mark))
            if mark:
                self._row, self._offset = int(mark["row"]), int(mark["offset"])
                self._handle.truncate(self._offset)
                self._allocations.seek(self._row * ALLOCATION.itemsize)
                self._allocations.truncate()
        except OSError:
            self.close()
            raise

    def append(self, rows: np.ndarray, payload: BinaryIO) -> None:
        """Add the rows of one unit (units.ROW), whose stored bytes follow each other in ``payload``."""
        sizes = rows["bytes"]
        addresses, end = place_rows(sizes, self._offset, self._page)
        starts = np.cumsum(sizes) - sizes
        # Rows that follow each other without a gap are copied in one piece.
        breaks = np.flatnonzero(np.diff(addresses - starts)) + 1
        for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
            self._handle.seek(int(addresses[first]))
            copy_range(payload, int(starts[first]), int(sizes[first:last].sum()), self._handle)
        records, allocations = np.zeros(len(rows), _RECORD), np.zeros(len(rows), ALLOCATION)
        image = records["f0"]
        image["mode"], image["width"], image["height"], image["data_ptr"] = rows["code"], rows["width"], rows["height"], addresses
        records["f1"] = rows["label"]
        allocations["sample_id"], allocations["ptr"], allocations["size"] = self._row + np.arange(len(rows)), addresses, sizes
        self._handle.seek(self._table + self._row * _RECORD.itemsize)
        self._handle.write(records.tobytes())
        self._allocations.write(allocations.tobytes())
        self._row, self._offset = self._row + len(rows), end

    def mark(self) -> dict[str, Any]:
        return {"row": self._row, "offset": self._offset}

    def flush(self) -> BinaryIO:
        """Hand everything to the system (the allocation table to the disk); returns the open file."""
        self._allocations.flush()
        os.fsync(self._allocations.fileno())
        self._handle.flush()
        return self._handle

    def finish(self) -> dict[str, Any]:
        """Pad the last page, write the tables and, last of all, the header; returns the files by role, relative to the folder."""
        table = -(-self._offset // self._page) * self._page
        header = np.zeros(1, HEADER)
        header[0] = (VERSION, 2, self._page, self._count, table)
        fields = np.zeros(2, FIELD)
        for field, type_id, name in zip(fields, (IMAGE_FIELD, INT_FIELD), (b"image", b"label"), strict=True):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name, np.uint8)
        self._allocations.close()
        with self._handle as handle, open(self._side, "rb") as allocations:
            handle.seek(table)
            copy_range(allocations, 0, self._count * ALLOCATION.itemsize, handle)
            handle.seek(HEADER.itemsize)
            handle.write(fields.tobytes())
            handle.seek(0)
            handle.write(header.tobytes())
        self._side.unlink()
        return self.files

    def close(self) -> None:
        """Give up: release the file handles."""
        self._handle.close()
        if hasattr(self, "_allocations"):
            self._allocations.close()
