"""Philox4x32-10, the counter-based random generator (Salmon et al., SC 2011), in integer tensor operations.

A number is a pure function of (seed, stream, view, draw, index): nothing is consumed, so batch splits, order, workers, world size and
resume cannot change it, and every device computes the same integers.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit output words for each counter block.

    ``counter`` holds int64 tensors with values in [0, 2^32) that broadcast together; ``key`` two integers in [0, 2^32).
    Returns int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, so the high word survives an arithmetic shift followed by a mask
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ (c1 ^ k0), p1 & _MASK, ((p0 >> 32) & _MASK) ^ (c3 ^ k1), p0 & _MASK
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: int, stream: int, view: int, draw_B: Tensor, count: int) -> Tensor:
    """[B, count] int64 words in [0, 2^32): numbers 0..count-1 of each (seed, stream, view, draw).

    Key = the seed's low 64 bits; counter = (number // 4, stream * 65536 + view, draw low word, draw high word).
    ``stream`` and ``view`` must lie in [0, 65536), ``draw_B`` (int64) in [0, 2^63).
    """
    if not (0 <= stream < 1 << 16 and 0 <= view < 1 << 16):
        raise ValueError(f"stream and view must lie in [0, 65536), got stream={stream}, view={view}")
    draw_B1 = draw_B.to(torch.int64).unsqueeze(1)
    if count == 0:
        return draw_B1.new_empty(draw_B1.shape[0], 0)
    if draw_B.is_cuda and type(draw_B) is Tensor and importlib.util.find_spec("triton") is not None:
        from fastssl.augment import triton_philox  # the same integers in one kernel

        return triton_philox.words(seed, stream, view, draw_B, count)
    block = torch.arange((count + 3) // 4, device=draw_B1.device).unsqueeze(0)
    lane = torch.full_like(block, (stream << 16) | view)
    out = philox4x32((block, lane, draw_B1 & _MASK, (draw_B1 >> 32) & _MASK), (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(out, dim=-1).flatten(1)[:, :count]


def below(word: Tensor, bound: Tensor | int) -> Tensor:
    """Uniform integers in [0, bound), bound <= 2^31: floor(word * bound / 2^32).  A value's probability is off by less than 2^-32 (absolute)."""
    return (word * bound) >> 32


def chance(word: Tensor, p: float) -> Tensor:
    """Bernoulli(p) as bool; p is rounded to a multiple of 2^-32."""
    return word < round(p * (1 << 32))
