"""Kernels: color jitter, grayscale and solarize in one pass over pixels; the mean luma that jitter's contrast needs in a pass before it.

The parts of color_jitter act in each row's own order, every one on the rounded bytes of the one before, so the mean is taken after the parts that
come before contrast in that row.  Equal to the reference to the bit: ``pixels.blend``, ``hue.tables``.
Columns of ``rows`` from ORDER_AT: the four parts in order (0..3 as in ``policy.COLOUR_PARTS``, -1: none), then the hue byte's shift.
"""

import triton
import triton.language as tl

from fastssl.augment.triton_fetch import extent_of, fetch, load_map
from fastssl.augment.triton_table import blend, luma

BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(part) for part in range(4))


@triton.jit
def hue_shifted(r, g, b, shift):
    """Pillow's way through HSV with ``shift`` added to the hue byte; float32 and float64 where Pillow has them."""
    value, least = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    difference = tl.where(value == r, g - b, tl.where(value == g, b - r, r - g))
    which = tl.where(value == r, 0, tl.where(value == g, 1, 2))
    chroma = value - least
    part = tl.div_rn((chroma - tl.abs(difference)).to(tl.float32), tl.maximum(chroma, 1).to(tl.float32))
    first, second = tl.where(difference >= 0, 1.0, part), tl.where(difference >= 0, part, 1.0)
    around = (2.0 * which.to(tl.float64) + first.to(tl.float64) - second.to(tl.float64)).to(tl.float32)
    turn = around.to(tl.float64) / 6.0 + 1.0
    turn = (turn - tl.floor(turn)).to(tl.float32)
    hue = tl.where(chroma > 0, tl.minimum((turn.to(tl.float64) * 255.0).to(tl.int32), 255), 0)
    share = tl.div_rn(chroma.to(tl.float32), tl.maximum(value, 1).to(tl.float32))
    saturation = tl.minimum((share.to(tl.float64) * 255.0).to(tl.int32), 255)

    hue = (hue + shift) & 255
    fs = (saturation.to(tl.float64) / 255.0).to(tl.float32)
    position = hue.to(tl.float64) * 6.0 / 255.0
    sector = tl.floor(position)
    f = (position - sector).to(tl.float32)
    sixth = sector.to(tl.int32)
    odd = (f * fs).to(tl.float64)
    even = fs.to(tl.float64) * (1.0 - f.to(tl.float64))
    level = value.to(tl.float64)
    middle = ((1.0 - tl.where(sixth % 2 == 1, odd, even)) * level + 0.5).to(tl.int32)
    lowest = (level * (1.0 - fs.to(tl.float64)) + 0.5).to(tl.int32)
    sixth = sixth % 6
    red = tl.where((sixth == 0) | (sixth == 5), value, tl.where((sixth == 1) | (sixth == 4), middle, lowest))
    green = tl.where((sixth == 1) | (sixth == 2), value, tl.where((sixth == 0) | (sixth == 3), middle, lowest))
    blue = tl.where((sixth == 3) | (sixth == 4), value, tl.where((sixth == 2) | (sixth == 5), middle, lowest))
    return red, green, blue


@triton.jit
def blended(r, g, b, base, factor):
    """Blend of all channels with one image of grey levels (int32)."""
    base = base.to(tl.float32)
    return blend(base, r.to(tl.float32), factor), blend(base, g.to(tl.float32), factor), blend(base, b.to(tl.float32), factor)


@triton.jit
def grey_of(r, g, b, C: tl.constexpr):
    """Luma; the channel itself where there is one."""
    grey = r
    if C == 3:
        grey = luma(r, g, b)
    return grey


@triton.jit
def jittered(r, g, b, row, real, mean, UNTIL_CONTRAST: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr):
    """The parts of color_jitter in this row's order, all or up to contrast.  PARTS: bit k is set where part k is present."""
    going = 1
    for k in range(4):
        part = tl.load(row + k).to(tl.int32)
        if part == CONTRAST:
            if UNTIL_CONTRAST:
                going = 0
            elif PARTS & 2:
                factor = tl.load(real + 1).to(tl.float32)
                r, g, b = blended(r, g, b, r * 0 + mean, factor)
        if going == 1:
            if PARTS & 1:
                if part == BRIGHTNESS:
                    r, g, b = blended(r, g, b, r * 0, tl.load(real).to(tl.float32))
            if (PARTS & 4) and C == 3:
                if part == SATURATION:
                    r, g, b = blended(r, g, b, grey_of(r, g, b, C), tl.load(real + 2).to(tl.float32))
            if (PARTS & 8) and C == 3:
                if part == HUE:
                    r, g, b = hue_shifted(r, g, b, tl.load(row + 4).to(tl.int32))
    return r, g, b


@triton.jit
def pixel(
    image, y, x, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, width,
    PITCH: tl.constexpr, C: tl.constexpr, MODE: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """All channels of pixels read through a map."""
    r = fetch(image, y, x, 0, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, width, PITCH, C, MODE, FILL)
    g, b = r, r
    if C == 3:
        g = fetch(image, y, x, 1, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, width, PITCH, C, MODE, FILL)
        b = fetch(image, y, x, 2, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, width, PITCH, C, MODE, FILL)
    return r, g, b


@triton.jit
def mean_kernel(
    source, extent, rows, reals, mean,
    COLUMNS: tl.constexpr, REALS: tl.constexpr, ORDER_AT: tl.constexpr, REAL_AT: tl.constexpr, PARTS: tl.constexpr,
    MAP_AT: tl.constexpr, MODE: tl.constexpr, FILL: tl.constexpr,
    IMAGE: tl.constexpr, PITCH: tl.constexpr, C: tl.constexpr,
    SRC_H: tl.constexpr, SRC_W: tl.constexpr, SRC_FULL: tl.constexpr,
    DOM_H: tl.constexpr, DOM_W: tl.constexpr, DOM_FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """int32 ``mean`` [B]: rounded mean luma of image b = program as contrast finds it; rows without jitter are left out."""
    b = tl.program_id(0)
    row = rows + b * COLUMNS
    if tl.load(row + ORDER_AT) >= 0:
        sh, sw = extent_of(extent, b, SRC_H, SRC_W, SRC_FULL)
        dh, dw = sh, sw
        if DOM_FULL:
            dh, dw = DOM_H, DOM_W
        first_y, first_x, mirror_in, mirror_out = load_map(row, MAP_AT, MODE)
        image = source + b.to(tl.int64) * IMAGE
        place = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.int32)
        for start in range(0, DOM_H * DOM_W, BLOCK):
            y, x = (start + place) // DOM_W, (start + place) % DOM_W
            valid = (y < dh) & (x < dw)
            r, g, bl = pixel(image, y, x, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, dw, PITCH, C, MODE, FILL)
            r, g, bl = jittered(r, g, bl, row + ORDER_AT, reals + b * REALS + REAL_AT, 0, True, PARTS, C)
            total += tl.where(valid, grey_of(r, g, bl, C), 0)
        pixels = tl.full([], 1, tl.int64) * dh * dw
        tl.store(mean + b, ((2 * tl.sum(total.to(tl.int64), 0) + pixels) // (2 * pixels)).to(tl.int32))


@triton.jit
def place_value(out, place, c, valid, value, norm, C: tl.constexpr, FINAL: tl.constexpr):
    """Store one channel of pixels, as bytes or normalised."""
    if FINAL:
        scaled = value.to(tl.float32) * tl.load(norm + c) + tl.load(norm + C + c)
        tl.store(out + place, scaled.to(out.dtype.element_ty), mask=valid)
    else:
        tl.store(out + place, value.to(tl.uint8), mask=valid)


@triton.jit
def colour_kernel(
    source, extent, rows, reals, mean, norm, out,
    out_image, out_channel, out_line, out_pixel,
    COLUMNS: tl.constexpr, REALS: tl.constexpr, ORDER_AT: tl.constexpr, REAL_AT: tl.constexpr, PARTS: tl.constexpr,
    GREY_AT: tl.constexpr, SOLARIZE_AT: tl.constexpr, THRESHOLD: tl.constexpr,
    MAP_AT: tl.constexpr, MODE: tl.constexpr, FILL: tl.constexpr,
    IMAGE: tl.constexpr, PITCH: tl.constexpr, C: tl.constexpr,
    SRC_H: tl.constexpr, SRC_W: tl.constexpr, SRC_FULL: tl.constexpr,
    DOM_H: tl.constexpr, DOM_W: tl.constexpr, DOM_FULL: tl.constexpr,
    FINAL: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``out`` of image b = program // BLOCKS; laws whose column is negative are absent."""
    b, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    row = rows + b * COLUMNS
    sh, sw = extent_of(extent, b, SRC_H, SRC_W, SRC_FULL)
    dh, dw = sh, sw
    if DOM_FULL:
        dh, dw = DOM_H, DOM_W
    first_y, first_x, mirror_in, mirror_out = load_map(row, MAP_AT, MODE)
    n = block * BLOCK + tl.arange(0, BLOCK)
    y, x = n // DOM_W, n % DOM_W
    valid = (y < dh) & (x < dw)
    image = source + b.to(tl.int64) * IMAGE
    r, g, bl = pixel(image, y, x, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, dw, PITCH, C, MODE, FILL)
    if ORDER_AT >= 0:
        level = tl.load(mean + b)
        r, g, bl = jittered(r, g, bl, row + ORDER_AT, reals + b * REALS + REAL_AT, level, False, PARTS, C)
    if GREY_AT >= 0:
        if tl.load(row + GREY_AT) != 0:
            r = grey_of(r, g, bl, C)
            g, bl = r, r
    if SOLARIZE_AT >= 0:
        if tl.load(row + SOLARIZE_AT) != 0:
            r, g = tl.where(r >= THRESHOLD, 255 - r, r), tl.where(g >= THRESHOLD, 255 - g, g)
            bl = tl.where(bl >= THRESHOLD, 255 - bl, bl)
    place = b.to(tl.int64) * out_image + y * out_line + x * out_pixel
    place_value(out, place, 0, valid, r, norm, C, FINAL)
    if C == 3:
        place_value(out, place + out_channel, 1, valid, g, norm, C, FINAL)
        place_value(out, place + 2 * out_channel, 2, valid, bl, norm, C, FINAL)
