"""Class histograms as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len

_EACH = 40  # up to so many classes are shown one by one
_GROUPS = 20
_BLOCKS = " ▏▎▍▌▋▊▉█"


def bars(names: Sequence[str], counts: Sequence[int] | np.ndarray, width: int = 40) -> list[str]:
    """One line per class with a bar, its longest ``width`` characters; with more than 40 classes 20 groups of classes from the largest to the smallest."""
    counts = np.asarray(counts, np.int64)
    if not len(counts):
        return []
    top = max(1, int(counts.max()))
    if len(counts) <= _EACH:
        room = max(cell_len(name[:24]) for name in names)
        shown = [name[:24] + " " * (room - cell_len(name[:24])) for name in names]
        return [f"{name} {count:>{len(str(top))}} {_bar(count / top, width)}" for name, count in zip(shown, counts.tolist(), strict=True)]
    order = np.sort(counts)[::-1]
    lines, first = [], 0
    for group in np.array_split(order, _GROUPS):
        last, low, high = first + len(group), int(group[-1]), int(group[0])
        span = f"{low}" if low == high else f"{low}..{high}"
        lines.append(f"classes {first + 1}-{last} by size: {span:>15} {_bar(float(group.mean()) / top, width)}".rstrip())
        first = last
    return lines


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(1, eighths)  # what is there is seen
    return "█" * (eighths // 8) + (_BLOCKS[eighths % 8] if eighths % 8 else "")
