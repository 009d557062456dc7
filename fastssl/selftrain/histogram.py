"""Score histograms per class: where a class's K-th row lies, found by counting, so that a second pass keeps hardly more rows than it needs."""

from __future__ import annotations

import numpy as np

from fastssl.errors import DataError
from fastssl.selftrain.ranking import bits_score, score_bits

BINS = 4096
LOW, HIGH = -24.0, 24.0  # log-odds; a row outside counts in the first or last bin
_SCALE = np.float32(BINS / (HIGH - LOW))


def bin_of(score: np.ndarray) -> np.ndarray:
    """int16 bin of each float32 score, any shape; never decreases as scores grow. Raises DataError for NaN."""
    place = (np.clip(score.astype(np.float32, copy=False), np.float32(LOW), np.float32(HIGH)) - np.float32(LOW)) * _SCALE
    if np.isnan(place).any():
        raise DataError(f"{int(np.isnan(place).sum())} scores are NaN; the scoring log never holds any: score again")
    return np.minimum(place, BINS - 1, out=place).astype(np.int16)


def edges() -> np.ndarray:
    """Lower ends of the bins and the end of the last one, float64 [BINS + 1]."""
    return np.linspace(LOW, HIGH, BINS + 1)


def _lowest() -> np.ndarray:
    """float32 [BINS]: the lowest score that falls into each bin or a higher one, found by bisection over all float32 numbers in order."""
    ends = score_bits(np.array([-np.inf, np.inf], dtype=np.float32)).astype(np.int64)
    low, high = np.full(BINS, ends[0]), np.full(BINS, ends[1])
    while (open_B := low < high).any():
        middle = (low + high) // 2
        reaches = bin_of(bits_score(middle.astype(np.uint32))) >= np.arange(BINS)
        high, low = np.where(open_B & reaches, middle, high), np.where(open_B & ~reaches, middle + 1, low)
    return bits_score(low.astype(np.uint32))


class Histogram:
    """Rows by class and bin, int64 [classes, BINS]. Histograms of parts add up to that of the whole."""

    def __init__(self, classes: int):
        self.counts_CB = np.zeros((classes, BINS), dtype=np.int64)

    @property
    def nbytes(self) -> int:
        return self.counts_CB.nbytes

    def add(self, cls: np.ndarray, score: np.ndarray) -> None:
        """Count rows; both of one shape."""
        cell = cls.astype(np.int64) * BINS + bin_of(score)
        flat = self.counts_CB.reshape(-1)
        if cell.size * 4 < flat.size:
            np.add.at(flat, cell.reshape(-1), 1)
        else:
            flat += np.bincount(cell.reshape(-1), minlength=flat.size)

    def merge(self, other: Histogram) -> None:
        """Add the other's counts."""
        self.counts_CB += other.counts_CB

    def bar(self, k_C: np.ndarray) -> np.ndarray:
        """float32 [classes]: the lowest score of each class's :meth:`cut` bin; rows below it are in no list."""
        return _lowest()[self.cut(k_C)]

    def cut(self, k_C: np.ndarray) -> np.ndarray:
        """int16 [classes]: the bin of each class's k-th best row (0 if it has fewer). Rows of lower bins are in no list; those of this one may be."""
        at_least_CB = np.cumsum(self.counts_CB[:, ::-1], axis=1)[:, ::-1]  # rows in this bin or above
        return np.maximum((at_least_CB >= np.maximum(k_C, 1)[:, None]).sum(axis=1) - 1, 0).astype(np.int16)
