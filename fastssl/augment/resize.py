"""Pillow's antialiased ``Image.resize`` on uint8 images [M, C, H, W], bit for bit: first along x, then along y, rounded to uint8 between the two.

The filter is stretched by the scale where the image shrinks, its weights at each output position are normalised in float64 and rounded to fixed
point with 22 bits.  A pass whose side does not change has the single weight 1, so leaving it out changes nothing.  All images of equal extent
share one matrix of weights, and products run in float64, which holds every sum exactly.  Without host reads each row gets its own weights.

Pillow 13 goes along y first where the height shrinks by more than twice as many pixels as the width (h - H > 0 and h - H > 2 (w - W)), which changes
some values by a level.  This file keeps the order of all versions before it, the one behind published results, whatever Pillow is installed.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

PRECISION_BITS = 32 - 8 - 2  # a uint8 times a weight, with a sign and one bit for weights that sum above 1, fits int32
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # half width of the filter in source pixels, before stretching
CHUNK = {True: 1 << 17, False: 1 << 24}  # values of the largest image on the way, by ``grouped``: within a CPU's cache, or within memory
BLOCK = 64  # outputs per product where the source is long


def _filter(x: Tensor, mode: str) -> Tensor:
    """The filter at a distance from its centre; bicubic is Keys' cubic with a = -1/2, in Pillow's order of operations."""
    x = x.abs()
    if mode == "bilinear":
        return (1.0 - x).clamp_min(0.0)
    near, far = (1.5 * x - 2.5) * x * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def taps(extent_M: Tensor, out: int, mode: str, longest: int) -> tuple[Tensor, Tensor]:
    """Source positions and weights along one axis for images of ``extent_M`` pixels (<= ``longest``) resized to ``out`` pixels.

    Returns ``first`` int64 [M, out], the first source pixel of each output, and ``weight`` int32 [M, out, K] in units of 2^-22 for the K pixels
    from there on; pixels outside the image weigh 0.  Only exactly rounded operations in one order, so equal on every device.
    """
    n = extent_M.double().unsqueeze(1)
    scale = n / torch.full_like(n, out)  # two tensors: CUDA divides by a number through its rounded reciprocal
    stretch = scale.clamp_min(1.0)
    support = SUPPORT[mode] * stretch
    centre = (torch.arange(out, device=n.device, dtype=torch.float64) + 0.5) * scale
    first = (centre - support + 0.5).trunc().clamp_min(0.0)
    end = torch.minimum((centre + support + 0.5).trunc(), n)
    count = math.ceil(SUPPORT[mode] * max(1.0, longest / out)) * 2 + 1
    place = first.unsqueeze(2) + torch.arange(count, device=n.device, dtype=torch.float64)
    w = _filter((place - centre.unsqueeze(2) + 0.5) * (torch.ones_like(n) / stretch).unsqueeze(2), mode)
    w = torch.where(place < end.unsqueeze(2), w, 0.0)
    total = torch.zeros_like(centre)
    for k in range(count):  # one after the other: a library sum may choose another order and another last bit
        total = total + w[..., k]
    fixed = w / total.unsqueeze(2) * (1 << PRECISION_BITS)
    fixed = (fixed + torch.where(fixed < 0, -0.5, 0.5)).trunc()
    return first.long(), fixed.to(torch.int32)


@functools.lru_cache(maxsize=128)
def _matrix(extent: int, out: int, mode: str, device: torch.device) -> Tensor:
    """float64 [extent, out]: the weights of one axis as a matrix.  Do not write to it."""
    first, weight = taps(torch.tensor([extent]), out, mode, extent)
    place = (first.unsqueeze(2) + torch.arange(weight.shape[2])).clamp_max(extent - 1)[0]
    matrix = torch.zeros(extent, out, dtype=torch.float64)
    matrix.scatter_add_(0, place.T, weight[0].T.double() / (1 << PRECISION_BITS))
    return matrix.to(device)


def _product(x: Tensor, extent: int, out: int, mode: str, axis: int) -> Tensor:
    """One pass along ``axis`` (2 or 3) of float64 images [M, C, H, W] that fill their canvas; integers again."""
    matrix = _matrix(extent, out, mode, x.device)
    shape = list(x.shape)
    shape[axis] = out
    result = x.new_empty(shape)
    reach = SUPPORT[mode] * max(1.0, extent / out) + 1  # an output reads this far on either side: long sides go block by block
    block = BLOCK if extent > 2 * BLOCK else out
    for start in range(0, out, block):
        stop = min(out, start + block)
        low, high = max(0, math.floor(start * extent / out - reach)), min(extent, math.ceil(stop * extent / out + reach))
        part, source = matrix[low:high, start:stop], x.narrow(axis, low, high - low)
        result.narrow(axis, start, stop - start).copy_(source @ part if axis == 3 else part.T @ source)
    return result.add_(0.5).clamp_(0, 255).floor_()


def _multiplied(pixels_MCHW: Tensor, height: int, width: int, mode: str) -> Tensor:
    """uint8 [M, C, height, width] of images that fill their canvas."""
    h, w = pixels_MCHW.shape[2:]
    x = pixels_MCHW.double()
    if w != width:
        x = _product(x, w, width, mode, 3)
    if h != height:
        x = _product(x, h, height, mode, 2)
    return x.to(torch.uint8)


def _gathered(pixels_MCHW: Tensor, extent_M: Tensor, out: int, mode: str, axis: int) -> Tensor:
    """One pass along ``axis`` with the weights of each row's own extent, in int32 and fixed shapes."""
    longest = pixels_MCHW.shape[axis]
    first, weight = taps(extent_M, out, mode, longest)
    ends = (-1, 1, 1, out) if axis == 3 else (-1, 1, out, 1)
    shape = list(pixels_MCHW.shape)
    shape[axis] = out
    total = torch.full(shape, 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=pixels_MCHW.device)
    for k in range(weight.shape[2]):
        place = (first + k).clamp_max(longest - 1).view(ends).expand(shape)
        total += pixels_MCHW.gather(axis, place) * weight[..., k].view(ends)
    return (total >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8)


def _chunks(rows: int, values: int, grouped: bool) -> list[slice]:
    step = max(1, CHUNK[grouped] // values)
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def resize(pixels_BCHW: Tensor, height_B: Tensor, width_B: Tensor, height: int, width: int, mode: str, grouped: bool) -> Tensor:
    """uint8 [B, C, height, width]: every image, its top-left ``height_B`` x ``width_B`` pixels, resized on its own; the input stays as it is.

    ``grouped`` works through the images extent by extent, which the host reads; otherwise shapes are fixed and nothing is read.
    """
    b, c, longest_h, longest_w = pixels_BCHW.shape
    out = torch.empty(b, c, height, width, dtype=torch.uint8, device=pixels_BCHW.device)
    if not grouped:
        for rows in _chunks(b, c * max(longest_h, height) * max(longest_w, width), grouped):
            narrow = _gathered(pixels_BCHW[rows], width_B[rows], width, mode, 3)
            out[rows] = _gathered(narrow, height_B[rows], height, mode, 2)
        return out
    extents = torch.stack([height_B, width_B], 1)
    for h, w in torch.unique(extents, dim=0).tolist():
        chosen = ((height_B == h) & (width_B == w)).nonzero().squeeze(1)
        for part in _chunks(len(chosen), c * max(h, height) * max(w, width), grouped):
            rows = chosen[part]
            out[rows] = _multiplied(pixels_BCHW[:, :, :h, :w].index_select(0, rows), height, width, mode)
    return out
