"""Label splits as text: a header of ``# key: value`` lines, then one row id (or a range ``first-last``) per line under [labeled], [validation], [unlabeled].

A split that can be read, compared line by line and sent around.  The unlabelled side is as a rule not written at all: the header says ``rest`` (every row of
the dataset's split that is neither labelled nor held out, ascending), which keeps a split of ImageNet as small as its labelled side.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.errors import DataError

TITLE = "# fastssl label split"
TEXT_VERSION = 2  # version 1 of label splits is JSON
SIDES = ("labeled", "validation", "unlabeled")
_TEXTS = ("name", "law", "dataset", "dataset_digest", "rows_digest", "of", "digest")


def render_split(raw: dict[str, Any]) -> str:
    """The text of a split: ``raw`` has the header's values, ``arguments`` (a dict) and int64 row arrays by side; ``unlabeled`` None means ``rest``, of which
    ``unlabeled_count`` is the number."""
    counts = {side: len(raw[side]) if raw[side] is not None else raw["unlabeled_count"] for side in SIDES}
    lines = [f"{TITLE} {TEXT_VERSION}", f"# name: {raw['name']}", f"# law: {raw['law']}", f"# seed: {raw['seed']}"]
    lines += [f"# arguments: {json.dumps(raw['arguments'], ensure_ascii=False, sort_keys=True)}"]
    lines += [f"# {key}: {_one_line(raw[key])}" for key in _TEXTS[2:-1]]
    lines += [f"# labeled: {counts['labeled']}", f"# validation: {counts['validation']}"]
    lines += [f"# unlabeled: {counts['unlabeled']} {'rest' if raw['unlabeled'] is None else 'listed'}", f"# digest: {raw['digest']}"]
    for side in SIDES:
        if raw[side] is not None and len(raw[side]):
            lines += [f"[{side}]", *(_ranges(raw[side]) if side == "unlabeled" else map(str, raw[side].tolist()))]
    return "\n".join(lines) + "\n"


def read_split_text(file: Path) -> dict[str, Any]:
    """The header's values and the row arrays of a text split, ``unlabeled`` None for ``rest``.  Raises DataError for a file that is no whole split."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"label split {str(file)!r} cannot be read ({error}); draw it again") from error
    if not lines or not lines[0].startswith(TITLE):
        raise DataError(
            f"{str(file)!r} is no label split: its first line is not {TITLE + ' ' + str(TEXT_VERSION)!r}; lists of others come in with `split import`"
        )
    if lines[0] != f"{TITLE} {TEXT_VERSION}":
        raise DataError(f"{str(file)!r} has format version {lines[0][len(TITLE) :].strip()!r}, this fastssl reads version {TEXT_VERSION}; draw the split again")
    try:
        return _parse(lines)
    except (KeyError, ValueError, OverflowError) as error:
        raise DataError(f"label split {str(file)!r} is damaged ({type(error).__name__}: {error}); draw the split again") from error


def rest_of(count: int, *taken: np.ndarray) -> np.ndarray:
    """Rows 0..count-1 that are in none of ``taken``, ascending; rows outside are ignored here."""
    free = np.ones(count, bool)
    for rows in taken:
        free[rows[(rows >= 0) & (rows < count)]] = False
    return np.flatnonzero(free)


def _parse(lines: list[str]) -> dict[str, Any]:
    header, start = {}, 1
    while start < len(lines) and lines[start].startswith("# "):
        key, colon, value = lines[start][2:].partition(":")
        if not colon or key in header:
            raise ValueError(f"line {start + 1} is no header line or repeats one: {lines[start]!r}")
        header[key] = value.strip()
        start += 1
    raw: dict[str, Any] = {key: header[key] for key in _TEXTS}
    raw |= {"format_version": TEXT_VERSION, "seed": int(header["seed"]), "arguments": json.loads(header["arguments"])}
    number, _, how = header["unlabeled"].partition(" ")
    if how not in ("rest", "listed"):
        raise ValueError(f"unlabeled: {header['unlabeled']!r} must say rest or listed")
    counts = {"labeled": int(header["labeled"]), "validation": int(header["validation"]), "unlabeled": int(number)}
    raw["unlabeled_count"] = counts["unlabeled"]
    sections: dict[str, list[str]] = {side: [] for side in SIDES}
    current: list[str] | None = None
    for place, line in enumerate(lines[start:], start + 1):
        if line.startswith("["):
            current = sections[line.strip("[]")]
        elif current is None:
            raise ValueError(f"line {place} stands before any section: {line!r}")
        else:
            current.append(line)
    for side in SIDES:
        derived = side == "unlabeled" and how == "rest"
        if derived and sections[side]:
            raise ValueError("the unlabelled rows are both derived and listed")
        raw[side] = None if derived else _rows(sections[side], counts[side], side)
    return raw


def _rows(lines: list[str], count: int, side: str) -> np.ndarray:
    """Rows of a section; ranges are counted before they are written out, so that a damaged file cannot ask for any amount of memory."""
    if not any("-" in line for line in lines):
        rows = np.array(list(map(int, lines)), np.int64)
    else:
        pieces = [(int(first), int(last or first)) for first, _, last in (line.partition("-") for line in lines)]
        if any(last < first for first, last in pieces) or sum(last - first + 1 for first, last in pieces) != count:
            raise ValueError(f"{side} does not have the {count} rows that the header says")
        rows = np.concatenate([np.arange(first, last + 1) for first, last in pieces])
    if len(rows) != count:
        raise ValueError(f"{side} has {len(rows)} rows, the header says {count}")
    return rows


def _ranges(rows: np.ndarray) -> list[str]:
    """Runs of consecutive rows as ``first-last``, single rows as they are."""
    borders = np.flatnonzero(np.diff(rows) != 1) + 1
    firsts, lasts = rows[np.concatenate([[0], borders])], rows[np.concatenate([borders - 1, [len(rows) - 1]])]
    return [f"{first}-{last}" if last > first else str(first) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
