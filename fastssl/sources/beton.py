"""Layout and reading of FFCV's ``.beton`` files (format version 2), without the ffcv package.

A file is, in this order: header (24 bytes); one descriptor of 1041 bytes per field; a table with one C-aligned record per sample (image field: mode,
width, height, address; int field: the number itself); padding up to a page; pages of sample data; the allocation table (sample, address, size in bytes).
All integers are little-endian.  Addresses count from the start of the file; no sample crosses a page.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastssl.errors import DataError

VERSION = 2
HEADER = np.dtype([("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table_ptr", "<u8")], align=True)
FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
INT_FIELD, IMAGE_FIELD = 1, 2
MODE_JPG, MODE_RAW = 0, 1
MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 31  # FFCV's own limits: huge-page size, below 2**32

_BLOB = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_RECORDS: dict[int, np.dtype] = {0: np.dtype("<f8"), INT_FIELD: np.dtype("<i8"), IMAGE_FIELD: IMAGE, 3: _BLOB, 4: np.dtype("<u8"), 5: _BLOB, 6: np.dtype("<u8")}


def record_dtype(type_ids: list[int]) -> np.dtype:
    """The aligned record of one sample for fields of these types, with names f0, f1, ..."""
    return np.dtype([(f"f{i}", _RECORDS[t]) for i, t in enumerate(type_ids)], align=True)


@dataclass
class BetonFile:
    """An opened beton: ``mapped`` its memory map, ``data`` the map as uint8, per-row arrays of mode, height, width, address and size, labels or None."""

    path: Path
    mapped: mmap.mmap
    data: np.ndarray
    page_size: int
    field_names: tuple[str, ...]
    mode_N: np.ndarray
    height_N: np.ndarray
    width_N: np.ndarray
    ptr_N: np.ndarray
    size_N: np.ndarray
    labels_N: np.ndarray | None

    @property
    def num_rows(self) -> int:
        return len(self.mode_N)


def open_beton(path: str | Path) -> BetonFile:
    """Map a beton that has one RGB image field (with, optionally, an int field: ``label`` if so named, else the first).

    Of several image fields the one named ``image`` is read, else the first.

    Raises DataError for a missing file, a wrong header, a truncated file, unknown fields and rows that point outside the file.
    """
    path = Path(path)
    where = f"{str(path)!r}"
    try:
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size < HEADER.itemsize:
                raise DataError(f"{where} is {size} bytes long, too short for a .beton header; write it again")
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{where} cannot be opened ({error.strerror}); check data.path") from error
    data = np.frombuffer(mapped, dtype=np.uint8)
    header = np.frombuffer(mapped, HEADER, count=1)[0]
    if int(header["version"]) != VERSION or not 1 <= int(header["num_fields"]) <= 64:
        raise DataError(f"{where} is not a .beton file of format version {VERSION} (its header says version {int(header['version'])}); write it again")
    fields_end = HEADER.itemsize + int(header["num_fields"]) * FIELD.itemsize
    if fields_end > size:
        raise DataError(f"{where} is truncated inside its field table ({size} bytes); write it again")
    fields = np.frombuffer(mapped, FIELD, count=int(header["num_fields"]), offset=HEADER.itemsize)
    type_ids = fields["type_id"].tolist()
    names = tuple(bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in fields["name"])
    if IMAGE_FIELD not in type_ids or any(t not in _RECORDS for t in type_ids):
        have = dict(zip(names, type_ids, strict=True))
        raise DataError(f"{where} has fields (name: type) {have}; fastssl reads FFCV's built-in fields and needs one RGB image field (type {IMAGE_FIELD})")
    record = record_dtype(type_ids)
    count, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if count == 0:
        raise DataError(f"{where} has no samples; write it again from a source with images")
    # A writer puts the table's address into the header last, so zero or an address beyond the end means an unfinished or cut file.
    if fields_end + count * record.itemsize > size or not fields_end <= table < size or (size - table) % ALLOCATION.itemsize:
        raise DataError(f"{where} is truncated ({size} bytes, its allocation table should begin at {table}); write or copy it again")
    records = np.frombuffer(mapped, record, count=count, offset=fields_end)
    images = [i for i, t in enumerate(type_ids) if t == IMAGE_FIELD]
    image = records[f"f{next((i for i in images if names[i] == 'image'), images[0])}"]
    ints = [i for i, t in enumerate(type_ids) if t == INT_FIELD]
    label = next((i for i in ints if names[i] == "label"), ints[0] if ints else None)
    beton = BetonFile(
        path=path,
        mapped=mapped,
        data=data,
        page_size=int(header["page_size"]),
        field_names=names,
        mode_N=image["mode"].copy(),
        height_N=image["height"].astype(np.int32),
        width_N=image["width"].astype(np.int32),
        ptr_N=image["data_ptr"].astype(np.int64),
        size_N=np.zeros(count, np.int64),
        labels_N=None if label is None else records[f"f{label}"].astype(np.int64),
    )
    _locate(beton, np.frombuffer(mapped, ALLOCATION, offset=table), table, where)
    return beton


def _locate(beton: BetonFile, allocations: np.ndarray, end: int, where: str) -> None:
    """Fill ``size_N`` from the allocation table and refuse rows that the table or the file does not hold."""
    order = np.argsort(allocations["ptr"], kind="stable")
    starts, sizes = allocations["ptr"][order].astype(np.int64), allocations["size"][order].astype(np.int64)
    place = np.searchsorted(starts, beton.ptr_N).clip(max=max(len(starts) - 1, 0))
    if not len(starts) or (starts[place] != beton.ptr_N).any():
        row = int(np.flatnonzero(starts[place] != beton.ptr_N)[0]) if len(starts) else 0
        raise DataError(f"{where}: row {row} points to data that the allocation table does not list (truncated or damaged file); write it again")
    beton.size_N[:] = sizes[place]
    wrong = (beton.ptr_N < 0) | (beton.size_N < 0) | (beton.size_N > end - beton.ptr_N) | (beton.height_N < 1) | (beton.width_N < 1) | (beton.mode_N > MODE_RAW)
    raw_bytes = beton.height_N.astype(np.int64) * beton.width_N * 3
    wrong |= (beton.mode_N == MODE_RAW) & (raw_bytes != beton.size_N)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{where}: the record of row {row} is damaged (mode, size or address out of range); write it again")
