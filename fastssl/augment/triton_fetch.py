"""Device functions that read one value of an image: whole-pixel maps (mirror, window, padding rule), fills, bytes from memory.

A map takes a position of its output to one of its input: first the mirror that acts last (``mirror_out``), then the window whose top-left lies
at ``first_y``, ``first_x`` with its padding rule, then the mirror that acts first (``mirror_in``).  Blocks run over single values, channels
innermost: element e is channel e % C of pixel e // C.
"""

import triton
import triton.language as tl

from fastssl.augment.triton_modes import ABSENT, CONSTANT, MIRROR, REFLECT

_ABSENT, _REFLECT, _CONSTANT, _MIRROR = (tl.constexpr(v) for v in (ABSENT, REFLECT, CONSTANT, MIRROR))


@triton.jit
def colour(PACKED: tl.constexpr, c):
    """The level of channel c in a colour packed as R + 256 G + 65536 B."""
    return (PACKED >> (8 * c)) & 255


@triton.jit
def along(place, last, MODE: tl.constexpr):
    """The position inside 0..last that the padding rule gives to a position along one axis."""
    if MODE == _REFLECT:
        period = tl.maximum(2 * last, 1)
        rest = place % period
        rest = tl.where(rest < 0, rest + period, rest)  # the device's remainder has the sign of the dividend
        found = tl.minimum(tl.minimum(rest, period - rest), last)
    else:
        found = tl.minimum(tl.maximum(place, 0), last)
    return found


@triton.jit
def load_map(row, AT: tl.constexpr, MODE: tl.constexpr):
    """The four numbers of a map, from a row's parameters."""
    first_y, first_x, mirror_in, mirror_out = 0, 0, 0, 0
    if MODE != _ABSENT:
        first_y = tl.load(row + AT).to(tl.int32)
        first_x = tl.load(row + AT + 1).to(tl.int32)
        mirror_in = tl.load(row + AT + 2).to(tl.int32)
        mirror_out = tl.load(row + AT + 3).to(tl.int32)
    return first_y, first_x, mirror_in, mirror_out


@triton.jit
def moved(y, x, h, w, first_y, first_x, mirror_in, mirror_out, out_w, MODE: tl.constexpr):
    """Input position of each output position, and whether it lies in the image; ``h``, ``w``: extent of the input."""
    x = tl.where(mirror_out != 0, out_w - 1 - x, x)
    if MODE == _MIRROR:
        source_y, source_x = y, x
        inside = y >= 0
    else:
        y, x = y + first_y, x + first_x
        source_y, source_x = along(y, h - 1, MODE), along(x, w - 1, MODE)
        inside = (source_y == y) & (source_x == x)
        if MODE != _CONSTANT:
            inside = source_y >= 0
    source_x = tl.where(mirror_in != 0, w - 1 - source_x, source_x)
    return source_y, source_x, inside


@triton.jit
def fetch(
    image, y, x, c, valid, h, w, first_y, first_x, mirror_in, mirror_out, out_w,
    PITCH: tl.constexpr, C: tl.constexpr, MODE: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """int32 value of channel ``c`` at a position of the map's output; 0 where not ``valid``.  ``PITCH``: values from one line to the next."""
    if MODE == _ABSENT:
        value = tl.load(image + y * PITCH + x * C + c, mask=valid, other=0).to(tl.int32)
    else:
        source_y, source_x, inside = moved(y, x, h, w, first_y, first_x, mirror_in, mirror_out, out_w, MODE)
        value = tl.load(image + source_y * PITCH + source_x * C + c, mask=valid & inside, other=0).to(tl.int32)
        if MODE == _CONSTANT:
            value = tl.where(inside, value, colour(FILL, c))
    return value


@triton.jit
def extent_of(extent, b, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """(h, w) of an image in its buffer; impossible extents are bounded, so that no read leaves the buffer."""
    h, w = HEIGHT, WIDTH
    if not FULL:
        h = tl.minimum(tl.maximum(tl.load(extent + b * 2).to(tl.int32), 1), HEIGHT)
        w = tl.minimum(tl.maximum(tl.load(extent + b * 2 + 1).to(tl.int32), 1), WIDTH)
    return h, w
