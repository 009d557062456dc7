"""Kernels: Pillow's antialiased resize of a box of each image, one axis at a time, weights in fixed point; see ``resize.py``.

``taps_kernel`` makes the weights of one axis, ``resample_kernel`` applies them: along x it keeps the box's lines and writes bytes, along y it
writes bytes or, mirrored where asked, the normalised view.  Both equal ``resize.taps`` and ``resize.resize`` to the bit.
Columns of an axis in ``rows``: first source pixel of the box, its pixels, pixels of the whole resized side, first of them that is wanted.
"""

import triton
import triton.language as tl

from fastssl.augment.resize import PRECISION_BITS
from fastssl.augment.triton_apply import put

_BITS, _HALF = tl.constexpr(PRECISION_BITS), tl.constexpr(1 << (PRECISION_BITS - 1))
_ONE = tl.constexpr(float(1 << PRECISION_BITS))


@triton.jit
def filtered(x, BICUBIC: tl.constexpr):
    """The filter at a distance from its centre, float64."""
    x = tl.abs(x)
    if BICUBIC:
        near, far = (1.5 * x - 2.5) * x * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        value = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        value = tl.maximum(1.0 - x, 0.0)
    return value


@triton.jit
def taps_kernel(
    rows, first_pixel, weight,
    COLUMNS: tl.constexpr, AT: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr, BICUBIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """int32 ``first_pixel`` [B, OUT] (counted from the box's edge) and ``weight`` [B, K, OUT] of image b = program, in units of 2^-22."""
    b = tl.program_id(0)
    row = rows + b * COLUMNS + AT
    n = tl.load(row + 1).to(tl.float64)
    scale = n / tl.load(row + 2).to(tl.float64)
    i = tl.arange(0, BLOCK)
    centre = (tl.load(row + 3).to(tl.float64) + i.to(tl.float64) + 0.5) * scale
    stretch = tl.maximum(scale, 1.0)
    support = stretch * 2.0 if BICUBIC else stretch * 1.0
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    end = tl.minimum((centre + support + 0.5).to(tl.int32).to(tl.float64), n)
    shrink = tl.full([], 1.0, tl.float64) / stretch
    total = tl.zeros([BLOCK], tl.float64)
    for k in range(K):
        place = first.to(tl.float64) + k
        total += tl.where(place < end, filtered((place - centre + 0.5) * shrink, BICUBIC), 0.0)
    total = tl.where(total == 0.0, 1.0, total)
    for k in range(K):
        place = first.to(tl.float64) + k
        fixed = tl.where(place < end, filtered((place - centre + 0.5) * shrink, BICUBIC), 0.0) / total * _ONE
        fixed = (fixed + tl.where(fixed < 0.0, -0.5, 0.5)).to(tl.int32)
        tl.store(weight + (b * K + k).to(tl.int64) * OUT + i, fixed, mask=i < OUT)
    tl.store(first_pixel + b * OUT + i, first, mask=i < OUT)


@triton.jit
def resample_kernel(
    source, rows, first_pixel, weight, norm, out,
    out_image, out_channel, out_line, out_pixel,
    COLUMNS: tl.constexpr, AT: tl.constexpr, MIRROR_AT: tl.constexpr, ALONG_X: tl.constexpr, K: tl.constexpr,
    IMAGE: tl.constexpr, PITCH: tl.constexpr, C: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, PACKED: tl.constexpr, FINAL: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One axis of image b = program // BLOCKS.

    Along x (AT: columns of the y axis, followed by those of x): the lines of the box, its first line first.  Along y: ``source`` holds the box's
    lines from its first one on.
    """
    b, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    row = rows + b * COLUMNS + AT
    image = source + b.to(tl.int64) * IMAGE
    lines = OUT_H
    left = 0
    if ALONG_X:
        lines = tl.load(row + 1).to(tl.int32)
        left = tl.load(row + 4).to(tl.int32)
        image += tl.load(row) * PITCH
    if block * BLOCK < lines * (OUT_W * C):
        e = block * BLOCK + tl.arange(0, BLOCK)
        c, y, x = e % C, e // (OUT_W * C), (e // C) % OUT_W
        valid = y < lines
        total = tl.full([BLOCK], _HALF, tl.int32)
        if ALONG_X:
            place = tl.load(first_pixel + b * OUT_W + x, mask=valid, other=0)
            for k in range(K):
                w = tl.load(weight + (b * K + k).to(tl.int64) * OUT_W + x, mask=valid, other=0)
                total += w * tl.load(image + y * PITCH + (left + place + k) * C + c, mask=valid & (w != 0), other=0).to(tl.int32)
        else:
            if MIRROR_AT >= 0:
                x = tl.where(tl.load(rows + b * COLUMNS + MIRROR_AT) != 0, OUT_W - 1 - x, x)
            place = tl.load(first_pixel + b * OUT_H + y, mask=valid, other=0)
            for k in range(K):
                w = tl.load(weight + (b * K + k).to(tl.int64) * OUT_H + y, mask=valid, other=0)
                total += w * tl.load(image + (place + k) * PITCH + x * C + c, mask=valid & (w != 0), other=0).to(tl.int32)
        value = tl.minimum(tl.maximum(total >> _BITS, 0), 255)
        start = out + b.to(tl.int64) * out_image
        if PACKED:
            put(start, e, c, valid, value, norm, C, FINAL)
        else:
            out_x = (e // C) % OUT_W
            put(start, c * out_channel + y * out_line + out_x * out_pixel, c, valid, value, norm, C, FINAL)
