"""Where the files in an uncompressed tar archive lie, and splits that read them there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data_tools.collection import Keys, SourceChanged, digest_of, labels_digest
from fastssl.errors import DataError

BLOCK = 512
_GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE = b"g", b"L", b"K", b"S"
_PAX = (b"x", b"X")
_FILE = (b"0", b"\0", b"7")


class Member(NamedTuple):
    """A file in an archive: its name and the place of its bytes."""

    name: str
    offset: int
    size: int


def members(archive: str | Path, first: int = 0, length: int | None = None) -> Iterator[Member]:
    """Every regular file of a tar archive, in its order, from the headers alone; nothing is kept in memory.

    ``first`` and ``length`` (bytes) bound an archive that lies inside another one.  Understands ustar, GNU and pax names and sizes.
    DataError for compressed, truncated and damaged archives: one that ends in the middle would lose images without anybody noticing.
    """
    where = f"tar archive {str(archive)!r}" + (f" (inner archive at byte {first})" if first else "")
    try:
        with open(archive, "rb") as handle:
            end = handle.seek(0, 2) if length is None else first + length
            yield from _walk(handle, first, end, where)
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error.strerror or error})") from error


def _walk(handle: BinaryIO, place: int, end: int, where: str) -> Iterator[Member]:
    begin, long_name = place, ""
    pax: dict[str, str] = {}
    while True:
        header = _at(handle, place, BLOCK)
        if place + BLOCK > end or len(header) < BLOCK:
            raise DataError(f"{where} is truncated after {place - begin} bytes (a tar archive ends with blocks of zeros); fetch it again")
        if not any(header):
            return
        try:
            name, size, kind = _header(header)
            size = int(pax.get("size", size))
        except ValueError as error:
            raise DataError(f"{where} is {_why(header, place == begin)} ({error}, byte {place}); it must be a plain .tar") from error
        data = place + BLOCK
        if data + size > end:
            raise DataError(f"{where} is truncated: {name!r} needs {size} bytes, {max(0, end - data)} are left; fetch it again")
        if kind == _LONG_NAME:
            long_name = _at(handle, data, size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind in _PAX:
            pax = _pax_fields(_at(handle, data, size), where)
        elif kind == _SPARSE:
            raise DataError(f"{where}: {name!r} is stored as a sparse file; pack the archive again without --sparse")
        elif kind not in (_GLOBAL, _LONG_LINK):
            if kind in _FILE and not name.endswith("/"):
                yield Member(str(pax.get("path", long_name or name)), data, size)
            long_name, pax = "", {}
        place = data + (size + BLOCK - 1) // BLOCK * BLOCK


def _header(block: bytes) -> tuple[str, int, bytes]:
    """(name, size, type) of a header block (POSIX.1-1988 ustar; GNU's numbers in base 256).  ValueError where its checksum does not fit.

    tarfile's own parser reads all 16 fields and takes four times as long.
    """
    stated = _number(block[148:156])
    rest = block[:148] + block[156:]
    # Old programs added the bytes as signed ones.
    if stated != 256 + sum(rest) and stated != 256 + sum(rest) - 256 * sum(byte > 127 for byte in rest):
        raise ValueError("bad checksum")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), _number(block[124:136]), block[156:157]


def _number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _at(handle: BinaryIO, place: int, size: int) -> bytes:
    handle.seek(place)
    return handle.read(size)


def _pax_fields(data: bytes, where: str) -> dict[str, str]:
    """``length key=value`` records."""
    found: dict[str, str] = {}
    try:
        while data.rstrip(b"\0"):
            length = int(data[: data.index(b" ")])
            key, _, value = data[data.index(b" ") + 1 : length - 1].partition(b"=")
            if not key or length < 5:
                raise ValueError("empty record")
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
            data = data[length:]
        int(found.get("size", "0"))
    except ValueError as error:
        raise DataError(f"{where} has a damaged pax header ({error}); fetch it again") from error
    return found


def _why(header: bytes, first: bool) -> str:
    if first and header[:2] == b"\x1f\x8b":
        return "compressed with gzip; gunzip it first"
    if first and header[:3] in (b"BZh", b"\xfd7z") or header[:4] == b"\x28\xb5\x2f\xfd":
        return "compressed; decompress it first"
    return "no tar archive" if first else "damaged"


@dataclass(frozen=True)
class TarSplit:
    """Row i is ``size_N[i]`` bytes at ``offset_N[i]`` of archive ``archives[archive_N[i]]`` below ``root``; its key is ``archive/member``."""

    root: str
    archives: tuple[str, ...]
    names: Keys
    archive_N: np.ndarray
    offset_N: np.ndarray
    size_N: np.ndarray
    labels: np.ndarray
    state: str = ""

    @property
    def count(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        return f"{self.archives[int(self.archive_N[row])]}/{self.names[row]}"

    def read(self, row: int) -> bytes:
        archive, size = f"{self.root}/{self.archives[int(self.archive_N[row])]}", int(self.size_N[row])
        return read_at(archive, int(self.offset_N[row]), size)

    def part(self, start: int, stop: int) -> TarSplit:
        rows = slice(start, stop)
        used, archive_N = np.unique(self.archive_N[rows], return_inverse=True)
        archives = tuple(self.archives[int(i)] for i in used)
        columns = (self.offset_N[rows].copy(), self.size_N[rows].copy(), self.labels[rows].copy())
        return TarSplit(self.root, archives, self.names.part(start, stop), archive_N, *columns)

    def stamp(self) -> str:
        return digest_of(*self.archives, self.names.digest(), *map(labels_digest, (self.archive_N, self.offset_N, self.size_N, self.labels)), self.state)

    def ordered(self, rows: np.ndarray) -> TarSplit:
        """The same split with its rows in another order (or fewer of them)."""
        names = Keys.of(self.names[int(row)] for row in rows)
        columns = (self.archive_N[rows], self.offset_N[rows], self.size_N[rows], self.labels[rows])
        return TarSplit(self.root, self.archives, names, *columns, self.state)


def read_at(file: str | Path, offset: int, size: int) -> bytes:
    """``size`` bytes of a file.  Raises SourceChanged where they are not there any more."""
    try:
        with open(file, "rb", buffering=0) as handle:
            handle.seek(offset)
            data = handle.read(size)
    except OSError as error:
        raise SourceChanged(f"{str(file)!r} cannot be read any more ({error.strerror or error}); bring it back and run the same command") from error
    if len(data) != size:
        raise SourceChanged(f"{str(file)!r} has become shorter during conversion; bring it back and run the same command")
    return data
