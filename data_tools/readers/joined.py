"""Splits made of other splits: several one after the other, or chosen rows of one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_tools.collection import UNKNOWN, RawSplit, digest_of, labels_digest


@dataclass(frozen=True)
class Joined:
    """``pieces`` one after the other; every row keeps the key that it has in its piece."""

    pieces: tuple[RawSplit, ...]

    @property
    def count(self) -> int:
        return sum(piece.count for piece in self.pieces)

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([np.asarray(piece.labels, np.int64) for piece in self.pieces]) if self.pieces else np.zeros(0, np.int64)

    def _place(self, row: int) -> tuple[RawSplit, int]:
        for piece in self.pieces:
            if 0 <= row < piece.count:
                return piece, row
            row -= piece.count
        raise IndexError(row)

    def key(self, row: int) -> str:
        piece, own = self._place(row)
        return piece.key(own)

    def read(self, row: int) -> bytes | np.ndarray:
        piece, own = self._place(row)
        return piece.read(own)

    def part(self, start: int, stop: int) -> RawSplit:
        parts, first = [], 0
        for piece in self.pieces:
            low, high = max(start - first, 0), min(stop - first, piece.count)
            if low < high:
                parts.append(piece.part(low, high))
            first += piece.count
        return parts[0] if len(parts) == 1 else Joined(tuple(parts))

    def stamp(self) -> str:
        return digest_of(*(piece.stamp() for piece in self.pieces))


@dataclass(frozen=True)
class Picked:
    """Rows ``rows`` (int64, any order) of ``base``."""

    base: RawSplit
    rows: np.ndarray

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        return np.asarray(self.base.labels)[self.rows]

    def key(self, row: int) -> str:
        return self.base.key(int(self.rows[row]))

    def read(self, row: int) -> bytes | np.ndarray:
        return self.base.read(int(self.rows[row]))

    def part(self, start: int, stop: int) -> RawSplit:
        """As pieces of consecutive rows, so that no more of ``base`` than these rows is handed on."""
        rows = self.rows[start:stop]
        cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        return Joined(tuple(self.base.part(int(rows[low]), int(rows[high - 1]) + 1) for low, high in zip(cuts[:-1], cuts[1:], strict=True) if high > low))

    def stamp(self) -> str:
        return digest_of(self.base.stamp(), labels_digest(self.rows))


@dataclass(frozen=True)
class Relabelled:
    """``base`` with other labels (int64 [count])."""

    base: RawSplit
    labels: np.ndarray

    @property
    def count(self) -> int:
        return self.base.count

    def key(self, row: int) -> str:
        return self.base.key(row)

    def read(self, row: int) -> bytes | np.ndarray:
        return self.base.read(row)

    def part(self, start: int, stop: int) -> RawSplit:
        return Relabelled(self.base.part(start, stop), self.labels[start:stop].copy())

    def stamp(self) -> str:
        return digest_of(self.base.stamp(), labels_digest(self.labels))


def join(*splits: RawSplit | None) -> RawSplit:
    """The given splits, None left out, as one."""
    pieces = tuple(split for split in splits if split is not None)
    return pieces[0] if len(pieces) == 1 else Joined(pieces)


def without_labels(split: RawSplit) -> RawSplit:
    """The same rows with every label unknown."""
    return Relabelled(split, np.full(split.count, UNKNOWN, np.int64))
