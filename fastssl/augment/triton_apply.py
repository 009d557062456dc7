"""Kernel: one pass over an image batch: map, op, filled box, map; written as bytes for the next pass or normalised into the view.

An output position goes back through the laws, last law first: the map behind the op, the box, the op, the map before the op.
"""

import triton
import triton.language as tl

from fastssl.augment.triton_fetch import colour, extent_of, fetch, load_map, moved
from fastssl.augment.triton_modes import ABSENT, CONSTANT
from fastssl.augment.triton_op import operated

_ABSENT, _CONSTANT = tl.constexpr(ABSENT), tl.constexpr(CONSTANT)


@triton.jit
def put(out, place, c, valid, value, norm, C: tl.constexpr, FINAL: tl.constexpr):
    """Store bytes, or value * norm[c] + norm[C + c] rounded after each step, in the type of ``out``."""
    if FINAL:
        scaled = value.to(tl.float32) * tl.load(norm + c) + tl.load(norm + C + c)
        tl.store(out + place, scaled.to(out.dtype.element_ty), mask=valid)
    else:
        tl.store(out + place, value.to(tl.uint8), mask=valid)


@triton.jit
def apply_kernel(
    source, extent, rows, reals, table, norm, out,
    out_image, out_channel, out_line, out_pixel,
    COLUMNS: tl.constexpr, REALS: tl.constexpr, CODE_AT: tl.constexpr, REAL_AT: tl.constexpr,
    MAP_AT: tl.constexpr, MODE: tl.constexpr, FILL: tl.constexpr,
    BILINEAR: tl.constexpr, OP_FILL: tl.constexpr, BOX_AT: tl.constexpr, BOX_FILL: tl.constexpr,
    AFTER_AT: tl.constexpr, AFTER: tl.constexpr, AFTER_FILL: tl.constexpr,
    IMAGE: tl.constexpr, PITCH: tl.constexpr, C: tl.constexpr,
    SRC_H: tl.constexpr, SRC_W: tl.constexpr, SRC_FULL: tl.constexpr,
    DOM_H: tl.constexpr, DOM_W: tl.constexpr, DOM_FULL: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, PACKED: tl.constexpr, FINAL: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``out`` of image b = program // BLOCKS.  SRC: the buffer that is read, DOM: the image that op and box see, OUT: what is written.

    Columns of ``rows`` (int64 [B, COLUMNS]) from MAP_AT and AFTER_AT hold a map, from BOX_AT a box, at CODE_AT the op (CODE_AT and BOX_AT < 0:
    none); ``reals`` (float64 [B, REALS]) from REAL_AT its argument and coefficients.  PACKED: values of ``out`` lie one behind the other.
    """
    b, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    e = block * BLOCK + tl.arange(0, BLOCK)
    c, out_y, out_x = e % C, e // (OUT_W * C), (e // C) % OUT_W
    sh, sw = extent_of(extent, b, SRC_H, SRC_W, SRC_FULL)
    dh, dw = sh, sw
    if DOM_FULL:
        dh, dw = DOM_H, DOM_W
    row = rows + b * COLUMNS
    y, x = out_y, out_x
    valid = e < OUT_H * OUT_W * C
    shown = valid
    if AFTER != _ABSENT:
        after_y, after_x, after_in, after_out = load_map(row, AFTER_AT, AFTER)
        y, x, shown = moved(y, x, dh, dw, after_y, after_x, after_in, after_out, OUT_W, AFTER)
    inside = valid & shown & (y < dh) & (x < dw) & (x >= 0)
    image = source + b.to(tl.int64) * IMAGE
    first_y, first_x, mirror_in, mirror_out = load_map(row, MAP_AT, MODE)
    if CODE_AT >= 0:
        code = tl.load(row + CODE_AT).to(tl.int32)
        value = operated(
            image, y, x, c, inside, dh, dw, code, reals + b * REALS + REAL_AT, table + b * (C * 256), sh, sw, first_y, first_x, mirror_in, mirror_out,
            PITCH, C, MODE, FILL, OP_FILL, BILINEAR,
        )  # fmt: skip
    else:
        value = fetch(image, y, x, c, inside, sh, sw, first_y, first_x, mirror_in, mirror_out, dw, PITCH, C, MODE, FILL)
    if BOX_AT >= 0:
        y0, x0 = tl.load(row + BOX_AT).to(tl.int32), tl.load(row + BOX_AT + 1).to(tl.int32)
        y1, x1 = tl.load(row + BOX_AT + 2).to(tl.int32), tl.load(row + BOX_AT + 3).to(tl.int32)
        value = tl.where((y >= y0) & (y <= y1) & (x >= x0) & (x <= x1), colour(BOX_FILL, c), value)
    if AFTER == _CONSTANT:
        value = tl.where(shown, value, colour(AFTER_FILL, c))
    start = out + b.to(tl.int64) * out_image
    if PACKED:
        put(start, e, c, valid, value, norm, C, FINAL)
    else:
        put(start, c * out_channel + out_y * out_line + out_x * out_pixel, c, valid, value, norm, C, FINAL)
