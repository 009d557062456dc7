"""Splits whose images are named by a list file: lines, paths and labels become one compact FileSplit."""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_tools.collection import FileSplit, Keys
from fastssl.errors import DataError


def lines_of(file: Path) -> Iterator[str]:
    """The lines of a text file without blanks around them, empty ones left out.  DataError where it cannot be read."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape") as handle:
            for line in handle:
                if line := line.strip():
                    yield line
    except OSError as error:
        raise DataError(f"{str(file)!r} is missing or cannot be read ({error.strerror}); fetch the collection again") from error


def find_below(root: Path, folders: Iterable[str], marks: tuple[str, ...]) -> Path | None:
    """The first of ``root`` and ``root/folder`` that holds everything in ``marks``."""
    return next((place for place in (root, *(root / folder for folder in folders)) if all((place / mark).exists() for mark in marks)), None)


def listed_split(root: Path, rows: Iterable[tuple[str, int]], what: str) -> FileSplit:
    """Images ``root / path`` in the given order with their labels (-1 unknown).  DataError names the first image that ``what`` lists and that is not there."""
    labels, state = array("q"), hashlib.sha256()

    def keys() -> Iterator[str]:
        for path, label in rows:
            try:
                facts = os.stat(root / path)
            except (OSError, ValueError) as error:
                raise DataError(f"{what} names {path!r}, which is not below {str(root)!r}; fetch or unpack the collection again") from error
            state.update(struct.pack("<qq", facts.st_size, facts.st_mtime_ns))
            labels.append(label)
            yield path

    found = Keys.of(keys())
    if not len(found):
        raise DataError(f"{what} lists no images; fetch the collection again")
    return FileSplit(str(root), found, np.frombuffer(labels, np.int64), state.hexdigest())


def number_of(classes: dict[str, int], name: str, what: str) -> int:
    """The label of a class name.  DataError where ``what`` uses a name that is no class."""
    if name not in classes:
        raise DataError(f"{what} uses the class {name!r}, which is none of the collection's {len(classes)} classes: wrong class map or damaged list")
    return classes[name]


def fields_of(line: str, count: int, what: str) -> list[str]:
    """``count`` fields of a line, the last of which may hold blanks.  DataError for a shorter line."""
    fields = line.split(None, count - 1)
    if len(fields) != count:
        raise DataError(f"{what} has the line {line[:80]!r}, which should have {count} fields; fetch the collection again")
    return fields


def integer(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise DataError(f"{what} has {text[:40]!r} where a whole number should stand; fetch the collection again") from error
