"""Kernel: Pillow's GaussianBlur along one axis, three box blurs on rounded bytes, see ``blur.py``; along y then solarize.

A program holds whole lines in registers and shifts them itself, so that the bytes between the three blurs never reach memory.
Columns of ``rows`` from AT: whole radius, weight within it, weight of the two pixels beyond (units of 2^-24), whether the row is blurred.
"""

import triton
import triton.language as tl

from fastssl.augment.triton_apply import put
from fastssl.augment.triton_fetch import extent_of


@triton.jit
def blur_kernel(
    source, extent, rows, norm, out,
    out_image, out_channel, out_line, out_pixel,
    COLUMNS: tl.constexpr, AT: tl.constexpr, FAR: tl.constexpr, SOLARIZE_AT: tl.constexpr, THRESHOLD: tl.constexpr, ALONG_X: tl.constexpr,
    IMAGE: tl.constexpr, PITCH: tl.constexpr, C: tl.constexpr,
    SRC_H: tl.constexpr, SRC_W: tl.constexpr, SRC_FULL: tl.constexpr, FINAL: tl.constexpr,
    LINES: tl.constexpr, LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``out`` of image b = program // BLOCKS: LINES lines of LENGTH >= the side's pixels.

    Along x a line is one channel of one image line, along y of one image column; FAR: the farthest pixel that one box may read.
    """
    b, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    row = rows + b * COLUMNS
    sh, sw = extent_of(extent, b, SRC_H, SRC_W, SRC_FULL)
    line = (block * LINES + tl.arange(0, LINES))[:, None]
    along = tl.arange(0, LENGTH)[None, :]
    c = line % C
    y, x, last = line // C, along, sw - 1
    if not ALONG_X:
        y, x, last = along, line // C, sh - 1
    valid = (y < sh) & (x < sw)
    image = source + b.to(tl.int64) * IMAGE
    value = tl.load(image + y * PITCH + x * C + c, mask=valid, other=0).to(tl.int32)
    if tl.load(row + AT + 3) != 0:
        reach = tl.load(row + AT).to(tl.int32)
        inner, edge = tl.load(row + AT + 1).to(tl.int32), tl.load(row + AT + 2).to(tl.int32)
        still = line * 0
        for _ in tl.static_range(3):
            total = value * inner + (1 << 23)  # sums reach 2^32 and wrap; the top byte is the result
            for k in tl.static_range(1, FAR + 1):
                weight = tl.where(k <= reach, inner, tl.where(k == reach + 1, edge, 0))
                before = tl.gather(value, tl.maximum(along - k, 0) + still, 1)
                after = tl.gather(value, tl.minimum(along + k, last) + still, 1)
                total += (before + after) * weight
            value = (total >> 24) & 255
    if SOLARIZE_AT >= 0:
        if tl.load(row + SOLARIZE_AT) != 0:
            value = tl.where(value >= THRESHOLD, 255 - value, value)
    place = b.to(tl.int64) * out_image + c * out_channel + y * out_line + x * out_pixel
    put(out, place, c, valid, value, norm, C, FINAL)
