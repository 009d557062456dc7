"""The total order of candidates of a class: score descending, then a seeded hash of the image id ascending.

The hash is a bijection of 64-bit ids, so that no two images tie, and is inverted to get the id back: 12 bytes hold score and id of a row.  It keeps the order
of files and workers from deciding among equal scores.
"""

from __future__ import annotations

import numpy as np

from fastssl.errors import DataError

_GOLDEN, _A, _B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64 (Steele, Lea, Flood, OOPSLA 2014)
_MASK = (1 << 64) - 1
_INVERSE_A, _INVERSE_B = pow(_A, -1, 1 << 64), pow(_B, -1, 1 << 64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_SIGN = np.uint32(0x80000000)


def hash64(id_N: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [N] hashes of uint64 ids: splitmix64's output function of id + (seed + 1) times its increment; one-to-one for each seed."""
    x = id_N.astype(np.uint64) + np.uint64((seed + 1) * _GOLDEN & _MASK)
    x ^= x >> np.uint64(30)
    x *= np.uint64(_A)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_B)
    x ^= x >> np.uint64(31)
    return x


def unhash64(hash_N: np.ndarray, seed: int) -> np.ndarray:
    """The ids of :func:`hash64`."""
    x = _unshift(hash_N.astype(np.uint64), 31) * np.uint64(_INVERSE_B)
    x = _unshift(x, 27) * np.uint64(_INVERSE_A)
    return _unshift(x, 30) - np.uint64((seed + 1) * _GOLDEN & _MASK)


def _unshift(x: np.ndarray, by: int) -> np.ndarray:
    """Undo ``x ^= x >> by``."""
    out = x.copy()
    for _ in range(64 // by):
        out = x ^ (out >> np.uint64(by))
    return out


def score_bits(score_N: np.ndarray) -> np.ndarray:
    """uint32 codes in the order of float32 scores (-0 counts as 0). Raises DataError for NaN, which has no place in an order."""
    score_N = np.ascontiguousarray(score_N, dtype=np.float32) + np.float32(0.0)  # -0 + 0 = 0
    if np.isnan(score_N).any():
        raise DataError(f"{int(np.isnan(score_N).sum())} of {score_N.size} scores are NaN; the scoring log never holds any: score again")
    bits = score_N.view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def bits_score(bits_N: np.ndarray) -> np.ndarray:
    """The float32 scores of :func:`score_bits`."""
    return np.where(bits_N & _SIGN, bits_N & ~_SIGN, ~bits_N).astype(np.uint32).view(np.float32)


def encode(bits_N: np.ndarray, id_N: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(high uint64, low uint32) [N]: rows in order of (high, low) descending are in the total order."""
    inverted = ~hash64(id_N, seed)
    return (bits_N.astype(np.uint64) << _HALF) | (inverted >> _HALF), (inverted & _LOW).astype(np.uint32)


def decode(high_N: np.ndarray, low_N: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(score float32, id uint64) [N] of :func:`encode`."""
    return bits_score((high_N >> _HALF).astype(np.uint32)), unhash64(hash_of(high_N, low_N), seed)


def hash_of(high_N: np.ndarray, low_N: np.ndarray) -> np.ndarray:
    """The hash inside an encoded row, uint64 [N]."""
    return ~(((high_N & _LOW) << _HALF) | low_N.astype(np.uint64))
