"""Pillow's affine maps on uint8 images [M, C, H, W]: from op and argument to coefficients, from coefficients to pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.augment.ops import CODE
from fastssl.augment.pixels import paint

ONE = 1 << 16  # 1.0 in 16.16 fixed point
TRUNCATION = 2e-3  # added before a float32 value is truncated, so that a whole level is not taken for the one below


def centred(extent_B: Tensor, size: int) -> Tensor:
    """int64 [B]: where a window of ``size`` pixels begins in the middle of ``extent_B`` pixels.

    A half rounds to the even offset, as torchvision's CenterCrop has it; a smaller image gets the larger half of the filling before it.
    """
    slack = extent_B - size
    half = slack.div(2, rounding_mode="floor")
    return half + (slack > 0) * (slack & 1) * (half & 1)


def coefficients(code_M: Tensor, argument_M: Tensor, height_M: Tensor, width_M: Tensor) -> Tensor:
    """float64 [M, 6]: source x = c0 x + c1 y + c2, source y = c3 x + c4 y + c5 (positions of pixel corners); identity for other ops.

    ``height_M``, ``width_M``: extent of each image in pixels.
    """
    a, h, w = argument_M.double(), height_M.double(), width_M.double()
    zero, one = torch.zeros_like(a), torch.ones_like(a)

    def of(op: str, value: Tensor, default: Tensor) -> Tensor:
        return torch.where(code_M == CODE[op], value, default)

    turn = -torch.remainder(a, 360.0) * (math.pi / 180.0)  # Pillow turns counter-clockwise and rounds to 15 decimals
    cos, sin = torch.round(torch.cos(turn), decimals=15), torch.round(torch.sin(turn), decimals=15)
    c2 = cos * (-w / 2) + sin * (-h / 2) + w / 2
    c5 = -sin * (-w / 2) + cos * (-h / 2) + h / 2
    return torch.stack(
        [
            of("Rotate", cos, one),
            of("Rotate", sin, of("ShearX", a, zero)),
            of("Rotate", c2, of("TranslateX", a * w, zero)),
            of("Rotate", -sin, of("ShearY", a, zero)),
            of("Rotate", cos, one),
            of("Rotate", c5, of("TranslateY", a * h, zero)),
        ],
        dim=1,
    )


def whole_pixels(coefficients_M6: Tensor, code_M: Tensor, whole_M: Tensor) -> Tensor:
    """Truncate the shifts of the translations that their space draws in whole pixels."""
    moves = whole_M & ((code_M == CODE["TranslateX"]) | (code_M == CODE["TranslateY"]))
    return torch.where(moves.unsqueeze(1), coefficients_M6.trunc(), coefficients_M6)


def fixed_point(coefficients_M6: Tensor) -> Tensor:
    """int32 [M, 6] in 16.16: Pillow's coefficients at pixel centres.  A pure shift is rounded to the pixel that its float64 path reads."""
    c = coefficients_M6
    slopes = torch.floor(c * ONE + 0.5)
    starts = [torch.floor((c[:, k] + c[:, k - 2] * 0.5 + c[:, k - 1] * 0.5) * ONE + 0.5) for k in (2, 5)]
    shift = (c[:, 1] == 0) & (c[:, 3] == 0)
    starts = [torch.where(shift, torch.floor(c[:, k] + 0.5) * ONE + ONE // 2, start) for k, start in zip((2, 5), starts, strict=True)]
    return torch.stack([slopes[:, 0], slopes[:, 1], starts[0], slopes[:, 3], slopes[:, 4], starts[1]], dim=1).to(torch.int32)


def _inside(x: Tensor, y: Tensor, height_M: Tensor, width_M: Tensor) -> Tensor:
    return (x >= 0) & (x < width_M.view(-1, 1, 1)) & (y >= 0) & (y < height_M.view(-1, 1, 1))


def _take(pixels_MCHW: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """uint8 [M, C, H, W]: pixels at integer positions [M, H, W] that must lie inside the canvas."""
    m, c, height, width = pixels_MCHW.shape
    index = (y * width + x).to(torch.int64).view(m, 1, -1).expand(m, c, x.shape[1] * x.shape[2])
    return pixels_MCHW.reshape(m, c, height * width).gather(2, index).view(m, c, *x.shape[1:])


def nearest(pixels_MCHW: Tensor, coefficients_M6: Tensor, height_M: Tensor, width_M: Tensor, fill: tuple[int, ...]) -> Tensor:
    """Pillow's nearest affine transform; positions outside the extent become ``fill`` (one level per channel)."""
    _, _, height, width = pixels_MCHW.shape
    a = fixed_point(coefficients_M6).view(-1, 6, 1, 1)
    col = torch.arange(width, device=a.device, dtype=torch.int32).view(1, 1, -1)
    row = torch.arange(height, device=a.device, dtype=torch.int32).view(1, -1, 1)
    x = (a[:, 0] * col + (a[:, 1] * row + a[:, 2])) >> 16
    y = (a[:, 3] * col + (a[:, 4] * row + a[:, 5])) >> 16
    inside = _inside(x, y, height_M, width_M)
    out = _take(pixels_MCHW, x.clamp_(0, width - 1), y.clamp_(0, height - 1))
    return paint(out, ~inside, fill)


def bilinear(pixels_MCHW: Tensor, coefficients_M6: Tensor, height_M: Tensor, width_M: Tensor, fill: tuple[int, ...]) -> Tensor:
    """Pillow's bilinear affine transform (float64, result truncated, neighbours clamped to the extent)."""
    _, _, height, width = pixels_MCHW.shape
    c = coefficients_M6.view(-1, 6, 1, 1)
    col = torch.arange(width, device=c.device, dtype=torch.float64).view(1, 1, -1) + 0.5
    row = torch.arange(height, device=c.device, dtype=torch.float64).view(1, -1, 1) + 0.5
    x = c[:, 0] * col + c[:, 1] * row + c[:, 2]
    y = c[:, 3] * col + c[:, 4] * row + c[:, 5]
    inside = _inside(x, y, height_M, width_M)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    dx, dy = (x - left).unsqueeze(1), (y - top).unsqueeze(1)
    last_col, last_row = (width_M - 1).view(-1, 1, 1), (height_M - 1).view(-1, 1, 1)

    def at(shift_x: int, shift_y: int) -> Tensor:
        col_in = torch.minimum((left.long() + shift_x).clamp_min(0), last_col)
        row_in = torch.minimum((top.long() + shift_y).clamp_min(0), last_row)
        return _take(pixels_MCHW, col_in, row_in).double()

    upper, lower = at(0, 0), at(0, 1)
    upper = upper + (at(1, 0) - upper) * dx
    lower = lower + (at(1, 1) - lower) * dx
    out = (upper + (lower - upper) * dy).to(torch.uint8)
    return paint(out, ~inside, fill)


def bilinear_fast(pixels_MCHW: Tensor, coefficients_M6: Tensor, fill: tuple[int, ...]) -> Tensor:
    """:func:`bilinear` of images that fill their canvas, by torch's grid sampler in float32: several times as fast on a CPU, now and then a level off.

    The sampler's edge-to-edge coordinates are Pillow's pixel-corner positions scaled to -1..1, and its border padding is Pillow's clamping.
    """
    _, _, height, width = pixels_MCHW.shape
    c = coefficients_M6.to(torch.float32).view(-1, 6, 1, 1)
    col = torch.arange(width, device=c.device, dtype=torch.float32).view(1, 1, -1) + 0.5
    row = torch.arange(height, device=c.device, dtype=torch.float32).view(1, -1, 1) + 0.5
    x = torch.addcmul(c[:, 1] * row + c[:, 2], c[:, 0], col)
    y = torch.addcmul(c[:, 4] * row + c[:, 5], c[:, 3], col)
    outside = ~((x >= 0) & (x < width) & (y >= 0) & (y < height))
    grid = torch.stack([x.mul_(2 / width).sub_(1), y.mul_(2 / height).sub_(1)], -1)
    out = F.grid_sample(pixels_MCHW.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return paint(out.add_(TRUNCATION).to(torch.uint8), outside, fill)
