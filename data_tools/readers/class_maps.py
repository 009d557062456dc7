"""Class map files: class names in label order, and classes grouped into superclasses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_tools.readers.listed import lines_of
from fastssl.errors import DataError, nearest


def class_names(file: str | Path) -> tuple[str, ...]:
    """Names in label order: one per line, ``name number`` or ``number name`` lines (blank or comma between; numbers from 0 or 1, each once), a JSON list of
    names, or a JSON object of name -> number or number -> name.  DataError for anything else, for gaps and for names that occur twice."""
    file = Path(file)
    if file.suffix == ".json":
        found = _read_json(file)
        if isinstance(found, list):
            return _checked([str(name) for name in found], file)
        pairs = [(str(name), number) for name, number in found.items()]
        if pairs and all(isinstance(number, str) for _, number in pairs):
            pairs = [(str(number), name) for name, number in found.items()]
        ordered = _by_number(pairs)
        if ordered is None:
            raise DataError(f"class map {str(file)!r} does not number its {len(pairs)} classes 0..{len(pairs) - 1}, each once; correct it")
        return _checked(ordered, file)
    lines = list(lines_of(file))
    for cut, name_first in ((str.rpartition, True), (str.partition, False)):
        for mark in (",", "\t", " "):
            parts = [cut(line, mark) for line in lines]
            if all(middle for _, middle, _ in parts):
                pairs = [(first, last) if name_first else (last, first) for first, _, last in parts]
                ordered = _by_number(pairs)
                if ordered is not None and len(set(ordered)) == len(ordered):
                    return _checked(ordered, file)
    return _checked(lines, file)


def _by_number(pairs: Sequence[tuple[str, object]]) -> list[str] | None:
    """Names ordered by their numbers, None unless these are 0..n-1 or 1..n."""
    try:
        numbers = [int(str(number)) for _, number in pairs]
    except ValueError:
        return None
    low = min(numbers, default=0)
    if low not in (0, 1) or sorted(numbers) != list(range(low, low + len(numbers))):
        return None
    return [pairs[i][0].strip() for i in np.argsort(numbers).tolist()]


def _checked(names: Sequence[str], file: Path) -> tuple[str, ...]:
    if not names:
        raise DataError(f"class map {str(file)!r} names no class; correct it")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None) if len(set(names)) != len(names) else None
    if twice is not None:
        raise DataError(f"class map {str(file)!r} names the class {twice!r} twice; correct it")
    return tuple(names)


def superclasses(file: str | Path, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(superclass of every class int64 [classes], superclass names) from a map of ``len(names)`` classes.

    Lines in class order with one number or name each, or ``class superclass`` lines where class is one of ``names`` or its number from 0; JSON lists and
    objects alike.  Numbers (from 0 or 1, none missing) are taken as they are, names are numbered as they first occur.
    """
    file = Path(file)
    raw = _read_json(file) if file.suffix == ".json" else None
    if isinstance(raw, dict):
        pairs = [(str(name), str(group)) for name, group in raw.items()]
    elif raw is not None:
        pairs = [(str(i), str(group)) for i, group in enumerate(raw)]
    else:
        lines = list(lines_of(file))
        fields = [line.replace(",", " ").split(None, 1) for line in lines]
        double = bool(fields) and all(len(field) == 2 for field in fields)
        pairs = [(field[0], field[1].strip()) for field in fields] if double else [(str(i), line) for i, line in enumerate(lines)]
    number = {name: i for i, name in enumerate(names)}
    groups: list[str] = [""] * len(names)
    for name, group in pairs:
        label = number.get(name, int(name) if name.isdigit() else -1)
        if not 0 <= label < len(names):
            raise DataError(f"class map {str(file)!r} names {name!r}, which is none of the {len(names)} classes{nearest(name, number)}: wrong class map")
        groups[label] = group
    if "" in groups:
        empty = groups.index("")
        raise DataError(f"class map {str(file)!r} has {len(pairs)} entries and none for class {empty} ({names[empty]}): {len(names)} are needed")
    if all(group.isdigit() for group in groups):
        table = np.array([int(group) for group in groups], np.int64)
        table -= min(1, int(table.min()))
        missing = np.setdiff1d(np.arange(table.max() + 1), table)
        if len(missing):
            raise DataError(f"class map {str(file)!r} has superclasses up to {table.max()}, but no class in number {missing[0]}: wrong class map")
        return table, tuple(f"superclass {i}" for i in range(int(table.max()) + 1))
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return np.array([order[group] for group in groups], np.int64), tuple(order)


def names_or_numbers(options: Mapping[str, str], root: Path, labels: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Class names of integer labels: option ``classes=FILE``, else classes.txt in ``root``, else the numbers themselves up to the largest label."""
    file = Path(options["classes"]) if "classes" in options else root / "classes.txt"
    if "classes" in options or file.is_file():
        return class_names(file)
    highest = max((int(part.max()) for part in labels if len(part)), default=-1)
    return tuple(str(i) for i in range(highest + 1))


def _read_json(file: Path) -> list | dict:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"class map {str(file)!r} cannot be read ({error}); correct it") from error
    if not isinstance(found, list | dict):
        raise DataError(f"class map {str(file)!r} holds neither a JSON list nor a JSON object; correct it")
    return found
