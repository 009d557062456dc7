"""Images of different sizes laid back to back for the way to the device, and spread into padded canvases again on arrival.

A packed image is its lines one after the other, each line padded to whole words; a packed batch is its images in order.  A word is the largest power of
two of bytes, up to 8, that divides a canvas line, so that canvases and packed bytes can be read and written in words.

Letters: B rows, H W C canvas height, width, channels, N rows of the dataset.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

PACK_FROM = 0.30  # share of padding in the canvases above which packing is worth its copy
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORDS_AT_ONCE = 1 << 22  # words that one round of unpack gathers: bounds its index tensors to 32 MB each


def word_bytes(width: int, channels: int) -> int:
    """Bytes per word for canvases with lines of ``width`` pixels: 1, 2, 4 or 8."""
    return math.gcd(width * channels, 8)


def packed_bytes(extents_N2: np.ndarray, canvas: tuple[int, int, int]) -> np.ndarray:
    """Bytes that each image takes when packed: int64 [N] for ``extents_N2`` (height, width) and a (H, W, C) ``canvas``."""
    word = word_bytes(canvas[1], canvas[2])
    extents = extents_N2.astype(np.int64)
    return extents[:, 0] * -(-extents[:, 1] * canvas[2] // word) * word


def padding_share(extents_N2: np.ndarray, canvas: tuple[int, int, int]) -> float:
    """Share of the canvases' bytes that is no image, 0..1."""
    area = extents_N2.astype(np.int64).prod(axis=1).mean()
    return 1.0 - float(area) / (canvas[0] * canvas[1])


def pack(pixels_BHWC: np.ndarray, extents_B2: np.ndarray, out: np.ndarray) -> int:
    """Lay the images of ``pixels_BHWC`` (uint8, contiguous) back to back into the flat uint8 ``out``; returns the number of bytes used."""
    batch, height, width, channels = pixels_BHWC.shape
    word = word_bytes(width, channels)
    lines_BHL = pixels_BHWC.reshape(batch, height, width * channels)
    used = 0
    for lines, (h, w) in zip(lines_BHL, extents_B2.tolist(), strict=True):
        line = -(-w * channels // word) * word
        target = out[used : used + h * line].reshape(h, line)
        target[:] = lines[:h, :line]
        target[:, w * channels :] = 0
        used += h * line
    return used


def unpack(packed: Tensor, extent_B2: Tensor, out: Tensor) -> Tensor:
    """Spread a packed batch into the canvases ``out`` (uint8 [B, H, W, C], contiguous); everything beyond the extents becomes 0.

    ``packed`` is flat uint8, its length a multiple of 8; only the bytes that :func:`pack` used are read.  Every shape depends on ``out`` alone and nothing is
    read back to the host, so that the call can be queued behind the copy that brings ``packed``.
    """
    batch, height, width, channels = out.shape
    word = word_bytes(width, channels)
    words, canvas = packed.view(_WORDS[word]), out.view(batch, height, width * channels).view(_WORDS[word])
    per_line = canvas.shape[2]
    high_B, wide_B = extent_B2.long().unbind(1)
    line_B = (wide_B * channels + word - 1) // word
    start_B = torch.cumsum(high_B * line_B, 0) - high_B * line_B
    y, x = (torch.arange(n, device=out.device) for n in (height, per_line))
    at_once = max(1, _WORDS_AT_ONCE // (height * per_line))
    for first in range(0, batch, at_once):
        part = slice(first, first + at_once)
        high, line, start = (t[part, None, None] for t in (high_B, line_B, start_B))
        inside = (y[:, None] < high) & (x < line)
        index = torch.where(inside, start + y[:, None] * line + x, 0)
        canvas[part] = torch.where(inside, words[index], 0)
    return out
