"""Kernel: the table [256] of each channel for ops that change a pixel by its own level alone, statistics of the image included.

One program per image.  Rows whose op is no such table return at once; the plain tone curves are computed; AutoContrast and Equalize count
levels first, Contrast sums the luma first.  Tables equal ``pixels.tone_table``, ``autocontrast_table`` and ``equalize_table`` to the bit.
"""

import triton
import triton.language as tl

from fastssl.augment.ops import CODE
from fastssl.augment.triton_fetch import extent_of, fetch, load_map

INVERT, AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, SOLARIZE_ADD_DARK, BRIGHTNESS, CONTRAST = (
    tl.constexpr(CODE[op]) for op in ("Invert", "AutoContrast", "Equalize", "Posterize", "Solarize", "SolarizeAdd", "SolarizeAddDark", "Brightness", "Contrast")
)


@triton.jit
def luma(r, g, b):
    """Grey level of a colour (Pillow's RGB to L), all int32."""
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16


@triton.jit
def blend(base, value, factor):
    """int32 of base + factor * (value - base) in float32, truncated and clipped to 0..255."""
    mixed = base + factor * (value - base)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def tone(level, code, a, mean):
    """What a level becomes under a plain tone curve: ``level`` int32, ``a`` float64, ``mean`` the rounded mean luma (read by Contrast)."""
    out = level
    if code == INVERT:
        out = 255 - level
    elif (code == BRIGHTNESS) | (code == CONTRAST):
        base = tl.where(code == CONTRAST, mean, 0).to(tl.float32)
        out = blend(base, level.to(tl.float32), a.to(tl.float32))
    elif code == POSTERIZE:
        bits = tl.minimum(tl.maximum(a.to(tl.int32), 0), 8)
        out = level & (255 - (255 >> bits))
    elif code == SOLARIZE:
        out = tl.where(level.to(tl.float64) >= a, 255 - level, level)
    elif (code == SOLARIZE_ADD) | (code == SOLARIZE_ADD_DARK):
        added = tl.minimum(tl.maximum(level + a.to(tl.int32), 0), 255)
        if code == SOLARIZE_ADD:
            out = tl.where(added < 128, added, 255 - added)
        else:
            out = tl.where(level < 128, added, level)
    return out


@triton.jit
def stretched(level, count):
    """AutoContrast's table from a histogram: float64, as in Pillow."""
    low = tl.min(tl.where(count > 0, level, 255), 0).to(tl.float64)
    high = tl.max(tl.where(count > 0, level, 0), 0).to(tl.float64)
    span = tl.where(high > low, high - low, 255.0)
    scale = tl.full([], 255.0, tl.float64) / span
    out = level.to(tl.float64) * scale + -low * scale
    out = tl.minimum(tl.maximum(out, 0.0), 255.0).to(tl.int32)
    return tl.where(high > low, out, level)


@triton.jit
def equalized(level, count):
    """Equalize's table from a histogram."""
    high = tl.max(tl.where(count > 0, level, 0), 0)
    total, brightest = tl.sum(count, 0), tl.sum(tl.where(level == high, count, 0), 0)
    step = (total - brightest) // 255
    below = tl.cumsum(count, 0) - count
    out = (step // 2 + below) // tl.maximum(step, 1)
    return tl.where(step > 0, tl.minimum(out, 255), level)


@triton.jit
def table_kernel(
    source, extent, rows, reals, table,
    COLUMNS: tl.constexpr, REALS: tl.constexpr, CODE_AT: tl.constexpr, REAL_AT: tl.constexpr,
    MAP_AT: tl.constexpr, MODE: tl.constexpr, FILL: tl.constexpr,
    IMAGE: tl.constexpr, PITCH: tl.constexpr, C: tl.constexpr,
    SRC_H: tl.constexpr, SRC_W: tl.constexpr, SRC_FULL: tl.constexpr,
    DOM_H: tl.constexpr, DOM_W: tl.constexpr, DOM_FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """uint8 ``table`` [B, C, 256] of image b = program; the image is what the map makes of the source (DOM_H x DOM_W at most)."""
    b = tl.program_id(0)
    code = tl.load(rows + b * COLUMNS + CODE_AT).to(tl.int32)
    counts = (code == AUTOCONTRAST) | (code == EQUALIZE)
    curve = (code == INVERT) | ((code >= POSTERIZE) & (code <= CONTRAST))
    if counts | curve:
        sh, sw = extent_of(extent, b, SRC_H, SRC_W, SRC_FULL)
        dh, dw = sh, sw
        if DOM_FULL:
            dh, dw = DOM_H, DOM_W
        first_y, first_x, mirror_in, mirror_out = load_map(rows + b * COLUMNS, MAP_AT, MODE)
        image = source + b.to(tl.int64) * IMAGE
        level = tl.arange(0, 256)
        place = tl.arange(0, BLOCK)
        out = table + b * (C * 256) + level
        if counts:
            for c in tl.static_range(C):
                count = tl.zeros([256], tl.int32)
                for start in range(0, DOM_H * DOM_W, BLOCK):
                    y, x = (start + place) // DOM_W, (start + place) % DOM_W
                    valid = (y < dh) & (x < dw)
                    value = fetch(image, y, x, c, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, dw, PITCH, C, MODE, FILL)
                    count += tl.histogram(value, 256, mask=valid)
                if code == EQUALIZE:
                    new = equalized(level, count)
                else:
                    new = stretched(level, count)
                tl.store(out + c * 256, new.to(tl.uint8))
        else:
            a = tl.load(reals + b * REALS + REAL_AT)
            mean = 0
            if code == CONTRAST:
                total = tl.zeros([BLOCK], tl.int32)
                for start in range(0, DOM_H * DOM_W, BLOCK):
                    y, x = (start + place) // DOM_W, (start + place) % DOM_W
                    valid = (y < dh) & (x < dw)
                    grey = fetch(image, y, x, 0, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, dw, PITCH, C, MODE, FILL)
                    if C == 3:
                        g = fetch(image, y, x, 1, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, dw, PITCH, C, MODE, FILL)
                        bl = fetch(image, y, x, 2, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, dw, PITCH, C, MODE, FILL)
                        grey = luma(grey, g, bl)
                    total += tl.where(valid, grey, 0)
                pixels = (dh * dw).to(tl.int64) if not DOM_FULL else tl.full([], DOM_H * DOM_W, tl.int64)
                mean = ((2 * tl.sum(total.to(tl.int64), 0) + pixels) // (2 * pixels)).to(tl.int32)
            new = tone(level, code, a, mean)
            for c in tl.static_range(C):
                tl.store(out + c * 256, new.to(tl.uint8))
