"""Pillow's GaussianBlur on uint8 images, bit for bit: three box blurs along x, then three along y, each rounded to uint8.

A box of radius r averages 2 r + 1 pixels; r is a fraction, so the two outermost pixels weigh less. Weights are integers in units of 2^-24. Beyond the
image its outermost pixels go on.

``gaussian_fast`` is the CPU's way: float32 sums, a level off where they fall on the other side of a half (fewer than one value in 1000).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PASSES = 3
ONE = 1 << 24


def box_weights(sigma_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [M] each: whole radius, weight of the pixels within it, weight of the two pixels beyond, for Gaussians of ``sigma_M`` (float64, pixels)."""
    sigma = sigma_M.to(torch.float32)
    variance = sigma * sigma / torch.full_like(sigma, PASSES)
    length = (12.0 * variance.double() + 1.0).sqrt().to(torch.float32).double()
    whole = torch.floor((length - 1.0) / torch.full_like(length, 2.0)).to(torch.float32)
    a = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    a = a / (6 * (variance - (whole + 1) * (whole + 1)))
    radius = whole + a
    inner = torch.full_like(radius, float(ONE)) / (radius * 2 + 1)
    inner = inner.to(torch.int64)
    reach = radius.to(torch.int64)
    return reach, inner, (ONE - (reach * 2 + 1) * inner) // 2


def reach_of(sigma: float) -> int:
    """The farthest pixel that one box blur reads for Gaussians of at most ``sigma`` pixels."""
    return math.floor((math.sqrt(12.0 * sigma * sigma / PASSES + 1.0) - 1.0) / 2.0) + 1


def _pass(x: Tensor, weights: list[Tensor], place: Tensor, axis: int) -> Tensor:
    """One box blur along ``axis`` of uint8 images; ``place``: positions [length + 2 reach] or one row of them per image, inside the extent."""
    reach, length = len(weights) - 1, x.shape[axis]
    if place.dim() == 1:
        wide = x.index_select(axis, place)
    else:
        shape = list(x.shape)
        shape[axis] = place.shape[1]
        wide = x.gather(axis, place.view(len(place), 1, *((1, -1) if axis == 3 else (-1, 1))).expand(shape))
    wide = wide.to(torch.int32)
    # sums reach 2^32 and wrap in int32; a shift keeps the top byte, which the cast to uint8 takes
    total = wide.narrow(axis, reach, length) * weights[0] + (1 << 23)
    for k in range(1, reach + 1):
        total += (wide.narrow(axis, reach - k, length) + wide.narrow(axis, reach + k, length)) * weights[k]
    return (total >> 24).to(torch.uint8)


def gaussian(pixels_MCHW: Tensor, sigma_M: Tensor, most: float, height_M: Tensor | None, width_M: Tensor | None) -> Tensor:
    """uint8 images blurred by ``sigma_M`` <= ``most`` pixels each; ``height_M``, ``width_M`` int64: extents (None = the canvas)."""
    reach, inner, edge = (v.view(-1, 1, 1, 1) for v in box_weights(sigma_M))
    far = reach_of(most)
    weights = [torch.where(reach >= k, inner, torch.where(reach == k - 1, edge, 0)).to(torch.int32) for k in range(far + 1)]
    x = pixels_MCHW
    for axis, extent in ((3, width_M), (2, height_M)):
        place = torch.arange(-far, x.shape[axis] + far, device=x.device).clamp_min(0)
        place = place.clamp_max(x.shape[axis] - 1) if extent is None else torch.minimum(place, extent.unsqueeze(1) - 1)
        for _ in range(PASSES):
            x = _pass(x, weights, place, axis)
    return x


def _fast_pass(x: Tensor, weights: list[float], axis: int) -> Tensor:
    """One box blur along ``axis`` of a float32 image [C, H, W] of whole numbers."""
    far, length = len(weights) - 1, x.shape[axis]
    wide = torch.cat([*[x.narrow(axis, 0, 1)] * far, x, *[x.narrow(axis, length - 1, 1)] * far], axis)
    total = x * weights[0]
    for k in range(1, far + 1):
        total.add_(wide.narrow(axis, far - k, length), alpha=weights[k]).add_(wide.narrow(axis, far + k, length), alpha=weights[k])
    return total.add_(0.49998).floor_()  # halves go down, as they do with weights truncated to 2^-24


def gaussian_fast(pixels_MCHW: Tensor, sigma_M: Tensor) -> Tensor:
    """The same for images that fill their canvas, one after the other: what one needs stays in the cache. Reads weights on the host."""
    out = torch.empty_like(pixels_MCHW)
    for i, (reach, inner, edge) in enumerate(zip(*(v.tolist() for v in box_weights(sigma_M)), strict=True)):
        x, weights = pixels_MCHW[i].to(torch.float32), [inner / ONE] * (reach + 1) + [edge / ONE]
        for axis in (2, 1):
            for _ in range(PASSES):
                x = _fast_pass(x, weights, axis)
        out[i] = x
    return out
