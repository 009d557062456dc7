"""Pillow's antialiased ``resize`` of a box of uint8 images [M, C, H, W], bit for bit: first along x, then along y, rounded to uint8 between the two.

The filter is stretched by the scale where the box shrinks, its weights at each output position are normalised in float64 and rounded to fixed
point with 22 bits. The box is cut first: nothing outside it is read. A pass whose side does not change has the single weight 1. Each row has its own
box, its own target size and its own output positions, so a crop or mirror that follows costs nothing: only the positions that it keeps are computed.

``boxes_fast`` is the CPU's way: torch's own kernel, which rounds weights to 16 bits instead; under 1 % of the values differ, by one
level (bicubic: at most two).

Pillow 13 goes along y first where the height shrinks by more than twice as many pixels as the width (h - H > 0 and h - H > 2 (w - W)), which changes
some values by a level. This file keeps the order of all versions before it, the one behind published results, whatever Pillow is installed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PRECISION_BITS = 32 - 8 - 2  # a uint8 times a weight, with a sign and one bit for weights that sum above 1, fits int32
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # half width of the filter in source pixels, before stretching
WASTE = 16  # a target with more pixels than this times those kept is not made as a whole
CHUNK = {True: 1 << 20, False: 1 << 26}  # values gathered at a time: on the CPU, elsewhere


@dataclass
class Boxes:
    """Boxes of canvases and the sizes that they are resized to: int64 [M] each, pixels."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    to_height: Tensor
    to_width: Tensor
    least: tuple[int, int]  # no target is smaller than this (height, width): bounds the filter's width where the host may not read
    mode: str  # bilinear or bicubic

    def rows(self, index: Tensor | slice) -> Boxes:
        numbers = (self.top, self.left, self.height, self.width, self.to_height, self.to_width)
        top, left, height, width, to_height, to_width = (number[index] for number in numbers)
        return Boxes(top, left, height, width, to_height, to_width, self.least, self.mode)


def _filter(x: Tensor, mode: str) -> Tensor:
    """The filter at a distance from its centre; bicubic is Keys' cubic with a = -1/2, in Pillow's order of operations."""
    x = x.abs()
    if mode == "bilinear":
        return (1.0 - x).clamp_min(0.0)
    near, far = (1.5 * x - 2.5) * x * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def tap_count(mode: str, longest: int, least: int) -> int:
    """How many source pixels an output may read where at most ``longest`` pixels become at least ``least``."""
    return math.ceil(SUPPORT[mode] * max(1.0, longest / least)) * 2 + 1


def taps_at(extent_M: Tensor, target_M: Tensor, place_MO: Tensor, mode: str, count: int) -> tuple[Tensor, Tensor]:
    """Source positions and weights along one axis: ``extent_M`` pixels resized to ``target_M``, at the output positions ``place_MO`` (int64).

    Returns ``first`` int64 [M, O], the first source pixel of each output, and ``weight`` int32 [M, O, count] in units of 2^-22 for the pixels
    from there on; pixels outside the extent weigh 0.  Only exactly rounded operations in one order, so equal on every device.
    """
    n = extent_M.double().unsqueeze(1)
    scale = n / target_M.double().unsqueeze(1)
    stretch = scale.clamp_min(1.0)
    support = SUPPORT[mode] * stretch
    centre = (place_MO.double() + 0.5) * scale
    first = (centre - support + 0.5).trunc().clamp_min(0.0)
    end = torch.minimum((centre + support + 0.5).trunc(), n)
    place = first.unsqueeze(2) + torch.arange(count, device=n.device, dtype=torch.float64)
    w = _filter((place - centre.unsqueeze(2) + 0.5) * (torch.ones_like(n) / stretch).unsqueeze(2), mode)
    w = torch.where(place < end.unsqueeze(2), w, 0.0)
    total = torch.zeros_like(centre)
    for k in range(count):  # one after the other: a library sum may choose another order and another last bit
        total = total + w[..., k]
    fixed = w / total.unsqueeze(2) * (1 << PRECISION_BITS)
    fixed = (fixed + torch.where(fixed < 0, -0.5, 0.5)).trunc()
    return first.long(), fixed.to(torch.int32)


def taps(extent_M: Tensor, out: int, mode: str, longest: int) -> tuple[Tensor, Tensor]:
    """The same for all ``out`` positions of whole images of ``extent_M`` pixels (<= ``longest``)."""
    place = torch.arange(out, device=extent_M.device).expand(len(extent_M), out)
    return taps_at(extent_M, torch.full_like(extent_M, out), place, mode, tap_count(mode, longest, out))


def _pass(pixels_MCHW: Tensor, start_M: Tensor, first: Tensor, weight: Tensor, axis: int) -> Tensor:
    """One pass along ``axis`` (2 or 3) in int32: each row with its own box and weights."""
    last, out = pixels_MCHW.shape[axis] - 1, first.shape[1]
    ends = (-1, 1, 1, out) if axis == 3 else (-1, 1, out, 1)
    shape = list(pixels_MCHW.shape)
    shape[axis] = out
    total = torch.full(shape, 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=pixels_MCHW.device)
    first = first + start_M.unsqueeze(1)
    for k in range(weight.shape[2]):
        place = (first + k).clamp_max(last).view(ends).expand(shape)
        total += pixels_MCHW.gather(axis, place) * weight[..., k].view(ends)
    return (total >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8)


def boxes_at(pixels_BCHW: Tensor, boxes: Boxes, rows_BH: Tensor, cols_BW: Tensor) -> Tensor:
    """uint8 [B, C, H, W]: the resized boxes at the output rows and columns named (int64, inside the target); fixed shapes, no host reads."""
    b, c, longest_h, longest_w = pixels_BCHW.shape
    height, width = rows_BH.shape[1], cols_BW.shape[1]
    out = torch.empty(b, c, height, width, dtype=torch.uint8, device=pixels_BCHW.device)
    counts = tap_count(boxes.mode, longest_h, boxes.least[0]), tap_count(boxes.mode, longest_w, boxes.least[1])
    step = max(1, CHUNK[pixels_BCHW.device.type == "cpu"] // (c * max(longest_h, height) * max(longest_w, width)))
    for rows in (slice(start, min(b, start + step)) for start in range(0, b, step)):
        box = boxes.rows(rows)
        x = taps_at(box.width, box.to_width, cols_BW[rows], box.mode, counts[1])
        y = taps_at(box.height, box.to_height, rows_BH[rows], box.mode, counts[0])
        out[rows] = _pass(_pass(pixels_BCHW[rows], box.left, *x, 3), box.top, *y, 2)
    return out


def boxes_fast(pixels_BCHW: Tensor, boxes: Boxes, rows_BH: Tensor | None, cols_BW: Tensor | None) -> Tensor:
    """The same by torch's own kernel, one image after the other; None = all positions (of targets that are equal).

    That kernel makes the whole target.  A strip whose target is far larger than what is kept of it (1 x 4000 pixels to a shorter side of 256: 786 MB) goes
    through :func:`boxes_at`, and so do targets one pixel wide or high, which the kernel gets wrong (torch 2.14).
    """
    images = []
    for i, (top, left, h, w, to_h, to_w) in enumerate(
        zip(*(field.tolist() for field in (boxes.top, boxes.left, boxes.height, boxes.width, boxes.to_height, boxes.to_width)), strict=True)
    ):
        kept = (to_h if rows_BH is None else rows_BH.shape[1]) * (to_w if cols_BW is None else cols_BW.shape[1])
        if min(to_h, to_w) == 1 or to_h * to_w > WASTE * kept:
            one = slice(i, i + 1)
            rows = torch.arange(to_h).unsqueeze(0) if rows_BH is None else rows_BH[one]
            cols = torch.arange(to_w).unsqueeze(0) if cols_BW is None else cols_BW[one]
            images.append(boxes_at(pixels_BCHW[one], boxes.rows(one), rows, cols)[0])
            continue
        cut = pixels_BCHW[i : i + 1, :, top : top + h, left : left + w]
        if (h, w) != (to_h, to_w):
            cut = torch.nn.functional.interpolate(cut, size=(to_h, to_w), mode=boxes.mode, antialias=True)
        image = cut[0]
        if rows_BH is not None:
            image = image.index_select(1, rows_BH[i])
        images.append(image if cols_BW is None else image.index_select(2, cols_BW[i]))
    return torch.stack(images)
