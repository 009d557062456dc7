"""Device functions: one RandAugment op at any positions of an image that is read through a map; every op of ``ops.OPS``, chosen by its code.

Equal to ``reference.apply_ops`` to the bit, the bilinear filter included, as long as the compiler does not fuse products and sums
(kernels are launched with ``enable_fp_fusion=False``).
"""

import triton
import triton.language as tl

from fastssl.augment.ops import CODE
from fastssl.augment.triton_fetch import colour, fetch
from fastssl.augment.triton_table import blend, luma

IDENTITY, COLOR, SHARPNESS, ROTATE, TRANSLATE_Y = (tl.constexpr(CODE[op]) for op in ("Identity", "Color", "Sharpness", "Rotate", "TranslateY"))


@triton.jit
def nearest(
    image, y, x, c, valid, h, w, matrix, sh, sw, first_y, first_x, mirror_in, mirror_out,
    PITCH: tl.constexpr, C: tl.constexpr, MODE: tl.constexpr, FILL: tl.constexpr, OP_FILL: tl.constexpr,
):  # fmt: skip
    """Affine map in 16.16 fixed point, see ``geometry.nearest``.  ``h``, ``w``: extent of the op's image; ``sh``, ``sw``: of the map's input."""
    a0, a1, a2 = tl.load(matrix).to(tl.int32), tl.load(matrix + 1).to(tl.int32), tl.load(matrix + 2).to(tl.int32)
    a3, a4, a5 = tl.load(matrix + 3).to(tl.int32), tl.load(matrix + 4).to(tl.int32), tl.load(matrix + 5).to(tl.int32)
    source_x = (a0 * x + (a1 * y + a2)) >> 16
    source_y = (a3 * x + (a4 * y + a5)) >> 16
    inside = (source_x >= 0) & (source_x < w) & (source_y >= 0) & (source_y < h)
    hit = valid & inside
    value = fetch(image, source_y, source_x, c, hit, sh, sw, first_y, first_x, mirror_in, mirror_out, w, PITCH, C, MODE, FILL)
    return tl.where(inside, value, colour(OP_FILL, c))


@triton.jit
def bilinear(
    image, y, x, c, valid, h, w, matrix, sh, sw, first_y, first_x, mirror_in, mirror_out,
    PITCH: tl.constexpr, C: tl.constexpr, MODE: tl.constexpr, FILL: tl.constexpr, OP_FILL: tl.constexpr,
):  # fmt: skip
    """Affine map in float64 with Pillow's bilinear filter, see ``geometry.bilinear``."""
    col, line = x.to(tl.float64) + 0.5, y.to(tl.float64) + 0.5
    source_x = tl.load(matrix) * col + tl.load(matrix + 1) * line + tl.load(matrix + 2)
    source_y = tl.load(matrix + 3) * col + tl.load(matrix + 4) * line + tl.load(matrix + 5)
    inside = (source_x >= 0) & (source_x < w) & (source_y >= 0) & (source_y < h)
    hit = valid & inside
    source_x, source_y = tl.where(inside, source_x, 0.5) - 0.5, tl.where(inside, source_y, 0.5) - 0.5
    left, top = tl.floor(source_x), tl.floor(source_y)
    dx, dy = source_x - left, source_y - top
    x0, y0 = left.to(tl.int32), top.to(tl.int32)
    x1, y1 = tl.minimum(x0 + 1, w - 1), tl.minimum(y0 + 1, h - 1)
    x0, y0 = tl.maximum(x0, 0), tl.maximum(y0, 0)
    a = fetch(image, y0, x0, c, hit, sh, sw, first_y, first_x, mirror_in, mirror_out, w, PITCH, C, MODE, FILL).to(tl.float64)
    b = fetch(image, y0, x1, c, hit, sh, sw, first_y, first_x, mirror_in, mirror_out, w, PITCH, C, MODE, FILL).to(tl.float64)
    upper = a + (b - a) * dx
    a = fetch(image, y1, x0, c, hit, sh, sw, first_y, first_x, mirror_in, mirror_out, w, PITCH, C, MODE, FILL).to(tl.float64)
    b = fetch(image, y1, x1, c, hit, sh, sw, first_y, first_x, mirror_in, mirror_out, w, PITCH, C, MODE, FILL).to(tl.float64)
    lower = a + (b - a) * dx
    value = (upper + (lower - upper) * dy).to(tl.int32)
    return tl.where(inside, value, colour(OP_FILL, c))


@triton.jit
def smoothed(
    image, y, x, c, valid, value, h, w, sh, sw, first_y, first_x, mirror_in, mirror_out,
    PITCH: tl.constexpr, C: tl.constexpr, MODE: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """3x3 smoothing of ``pixels.smooth``; ``value``: the pixel itself, kept on the outermost line of the extent."""
    inner = (y > 0) & (y < h - 1) & (x > 0) & (x < w - 1)
    total = 4 * value
    for k in tl.static_range(9):
        place_y, place_x = y + (k // 3 - 1), x + (k % 3 - 1)
        total += fetch(image, place_y, place_x, c, valid & inner, sh, sw, first_y, first_x, mirror_in, mirror_out, w, PITCH, C, MODE, FILL)
    return tl.where(inner, (2 * total + 13) // 26, value)


@triton.jit
def operated(
    image, y, x, c, valid, h, w, code, real, table, sh, sw, first_y, first_x, mirror_in, mirror_out,
    PITCH: tl.constexpr, C: tl.constexpr, MODE: tl.constexpr, FILL: tl.constexpr, OP_FILL: tl.constexpr, BILINEAR: tl.constexpr,
):  # fmt: skip
    """int32 value after the op ``code`` of the image's ``h`` x ``w`` pixels.

    ``real``: the op's argument and the six coefficients of its affine map (whole numbers where sampling is nearest); ``table``: [C, 256] of
    this image, read where the op is a table.
    """
    value = y * 0
    if code >= ROTATE:
        if BILINEAR:
            value = bilinear(
                image, y, x, c, valid, h, w, real + 1, sh, sw, first_y, first_x, mirror_in, mirror_out, PITCH, C, MODE, FILL, OP_FILL
            )  # fmt: skip
        else:
            value = nearest(
                image, y, x, c, valid, h, w, real + 1, sh, sw, first_y, first_x, mirror_in, mirror_out, PITCH, C, MODE, FILL, OP_FILL
            )  # fmt: skip
    else:
        value = fetch(image, y, x, c, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, w, PITCH, C, MODE, FILL)
        if code >= COLOR:
            base = value
            if code == SHARPNESS:
                base = smoothed(image, y, x, c, valid, value, h, w, sh, sw, first_y, first_x, mirror_in, mirror_out, PITCH, C, MODE, FILL)
            elif C == 3:
                r = fetch(image, y, x, 0, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, w, PITCH, C, MODE, FILL)
                g = fetch(image, y, x, 1, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, w, PITCH, C, MODE, FILL)
                b = fetch(image, y, x, 2, valid, sh, sw, first_y, first_x, mirror_in, mirror_out, w, PITCH, C, MODE, FILL)
                base = luma(r, g, b)
            value = blend(base.to(tl.float32), value.to(tl.float32), tl.load(real).to(tl.float32))
        elif code != IDENTITY:
            value = tl.load(table + c * 256 + value, mask=valid, other=0).to(tl.int32)
    return value
