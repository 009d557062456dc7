"""The interface between readers (what kind of collection lies there) and conversion (what becomes of it): splits with compact random access.

A reader finds rows; it decodes nothing and knows no image sizes.  Nothing here holds a Python object per image: keys are one byte buffer with offsets, labels
one int64 array, so that 100 million rows cost about 60 bytes each.  Work is handed to other threads and processes as ``part``s: a row range of a split as a
small split of its own.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from fastssl.errors import DataError

UNKNOWN = -1  # the label of a row whose class nobody knows


class BadImage(Exception):
    """This one row cannot be converted; the text is the reason, in a few words.  Conversion lists it in bad.parquet and goes on (or stops, if strict)."""


class SourceChanged(DataError):
    """The source is not what it was when it was opened (a file vanished or cannot be read any more); conversion stops and can be continued."""


@runtime_checkable
class RawSplit(Protocol):
    """Rows 0..count-1 of one split, in an order that is the same each time the source is opened.

    ``labels`` int64 [count] (array or memory map), -1 where unknown.  ``key(row)`` names a row for people and stays the same: a path below the source,
    an archive member, or ``split/number``.  ``read(row)`` gives ``bytes`` (one encoded image file, untouched) or uint8 pixels [H, W, C] with C = 1 or 3;
    it is safe to call from several threads.  It raises BadImage where only this row is at fault and SourceChanged where the source has gone.
    ``part(start, stop)`` is rows start..stop-1 as a split that is small to pickle and reopens files where it is used; its keys are those of the whole.
    ``stamp()`` is a digest (hex) of what can be known of the rows without reading images: keys, labels, file sizes and times where there are files.
    """

    @property
    def count(self) -> int: ...

    @property
    def labels(self) -> np.ndarray: ...

    def key(self, row: int) -> str: ...

    def read(self, row: int) -> bytes | np.ndarray: ...

    def part(self, start: int, stop: int) -> RawSplit: ...

    def stamp(self) -> str: ...


@dataclass(frozen=True)
class Collection:
    """A raw collection: ``kind`` of layout, ``name``, class names in label order, ``channels`` of the converted images (1 grey, 3 RGB), splits by name.

    ``official``: published label splits by name, as the labelled rows (int64) of ``train``; conversion writes them as label splits.
    """

    kind: str
    name: str
    classes: tuple[str, ...]
    channels: int
    splits: Mapping[str, RawSplit]
    official: Mapping[str, np.ndarray] = field(default_factory=dict)

    def stamp(self) -> str:
        """Digest (hex) of the whole source as it is now; another stamp means that a begun conversion cannot be continued."""
        digest = hashlib.sha256(repr((self.kind, self.name, self.classes, self.channels)).encode())
        for name, split in self.splits.items():
            digest.update(f"\n{name} {split.count} {split.stamp()}".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Reader:
    """One kind of collection.  ``open(source, options)`` gives the collection, None where ``source`` is of another kind, or DataError where it is of this
    kind but damaged.  ``options`` names the keys of ``--option KEY=VALUE`` that it understands; ``shape`` is one line for help and error messages.
    """

    kind: str
    shape: str
    open: Callable[[str, Mapping[str, str]], Collection | None]
    options: tuple[str, ...] = ()


class Keys:
    """Many strings in one uint8 buffer: string i is ``text[ends[i-1]:ends[i]]`` in UTF-8 (file names that are no UTF-8 survive by surrogate escapes)."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Keys:
        """From any iterable, one at a time."""
        text, ends = bytearray(), array("q")
        for name in names:
            text += name.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        return cls(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64) if ends else np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self.ends):
            raise IndexError(row)
        start = int(self.ends[row - 1]) if row else 0
        return self.text[start : int(self.ends[row])].tobytes().decode("utf-8", "surrogateescape")

    def part(self, start: int, stop: int) -> Keys:
        """Strings start..stop-1, copied."""
        first = int(self.ends[start - 1]) if start else 0
        last = int(self.ends[stop - 1]) if stop else 0
        return Keys(self.text[first:last].copy(), self.ends[start:stop] - first)

    def digest(self) -> str:
        """sha256 (hex) of all strings with their borders."""
        digest = hashlib.sha256(np.ascontiguousarray(self.text).data)
        digest.update(np.ascontiguousarray(self.ends, np.int64).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class FileSplit:
    """One image file per row: ``root / keys[row]``.  ``state`` is the reader's digest of sizes and times (see ``file_state``)."""

    root: str
    keys: Keys
    labels: np.ndarray
    state: str = ""

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.labels):
            raise DataError(f"{self.root!r}: {len(self.keys)} images but {len(self.labels)} labels")

    @property
    def count(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        return self.keys[row]

    def read(self, row: int) -> bytes:
        return read_bytes(f"{self.root}/{self.keys[row]}")

    def part(self, start: int, stop: int) -> FileSplit:
        return FileSplit(self.root, self.keys.part(start, stop), self.labels[start:stop].copy())

    def stamp(self) -> str:
        return digest_of(self.keys.digest(), labels_digest(self.labels), self.state)


@dataclass(frozen=True)
class ArraySplit:
    """Decoded rows: uint8 ``pixels`` [N, H, W, C], in memory or a memory map; the key of row i is ``prefix/first+i``.  ``state`` as in FileSplit."""

    pixels: np.ndarray
    labels: np.ndarray
    prefix: str
    first: int = 0
    state: str = field(default="")

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4 or self.pixels.shape[3] not in (1, 3):
            raise DataError(f"{self.prefix}: pixels are {self.pixels.dtype}{list(self.pixels.shape)}, expected uint8 [N, H, W, 1 or 3]")
        if len(self.pixels) != len(self.labels):
            raise DataError(f"{self.prefix}: {len(self.pixels)} images but {len(self.labels)} labels; fetch the collection again")

    @property
    def count(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        return f"{self.prefix}/{self.first + row}"

    def read(self, row: int) -> np.ndarray:
        return self.pixels[row]

    def part(self, start: int, stop: int) -> ArraySplit:
        return ArraySplit(np.array(self.pixels[start:stop]), self.labels[start:stop].copy(), self.prefix, self.first + start)

    def stamp(self) -> str:
        return digest_of(self.prefix, repr(self.pixels.shape), labels_digest(self.labels), self.state or _sampled(self.pixels))


def read_bytes(file: str | Path) -> bytes:
    """A whole file.  Raises SourceChanged where it cannot be read: a source that goes away is not a bad image."""
    try:
        with open(file, "rb", buffering=0) as handle:
            return handle.read()
    except OSError as error:
        raise SourceChanged(
            f"{str(file)!r} cannot be read any more ({error.strerror or error}): the source changed during conversion; bring it back and run the same command"
        ) from error


def file_state(file: str | Path) -> str:
    """Name, size and modification time of one source file, for ``state`` of splits that live in a few files."""
    try:
        facts = Path(file).stat()
    except OSError as error:
        raise DataError(f"{str(file)!r} cannot be read ({error.strerror})") from error
    return f"{Path(file).name} {facts.st_size} {facts.st_mtime_ns}"


def labels_digest(labels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(labels, np.int64).data).hexdigest()


def digest_of(*parts: str) -> str:
    """sha256 (hex) of a few strings, one per line."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _sampled(pixels: np.ndarray) -> str:
    """Digest of up to 256 rows spread over all: tells collections of one shape apart without reading everything."""
    rows = np.linspace(0, len(pixels) - 1, min(256, len(pixels))).astype(np.int64) if len(pixels) else np.zeros(0, np.int64)
    return hashlib.sha256(np.ascontiguousarray(pixels[rows]).data).hexdigest()
