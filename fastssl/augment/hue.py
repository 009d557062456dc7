"""Pillow's round trip through HSV with a shifted hue on uint8 images, bit for bit: a few small tables instead of arithmetic per pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.augment.constants import kept

# Which of (value, middle, least) red, green and blue become in each sixth of the hue circle.
_SECTORS = ((0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0), (1, 2, 0), (0, 2, 1))


@kept
def tables(device: torch.device) -> dict[str, Tensor]:
    """Constants on ``device``, made once:

    ``hue`` int32 [3 * 256 * 511]: hue byte by (largest channel, chroma, signed difference of the other two + 255);
    ``saturation`` int32 [256 * 256]: by (largest, least);  ``share`` float32 [3, 256 * 256]: each channel's share of the value by (hue, saturation).
    """
    chroma = torch.arange(256, dtype=torch.float32).view(1, -1, 1)
    difference = torch.arange(-255, 256, dtype=torch.float32).view(1, 1, -1)
    part = (chroma - difference.abs()) / chroma.clamp_min(1)  # float32, as Pillow has it; the other quotient is chroma / chroma
    first, second = torch.where(difference >= 0, 1.0, part), torch.where(difference >= 0, part, 1.0)
    around = (2.0 * torch.arange(3, dtype=torch.float64).view(-1, 1, 1) + first.double() - second.double()).float()
    turn = torch.fmod(around.double() / 6.0 + 1.0, 1.0).float()
    hue = (turn.double() * 255.0).to(torch.int32).clamp(0, 255)
    hue = torch.where(chroma > 0, hue, 0)

    level = torch.arange(256, dtype=torch.float32)
    largest, least = level.view(-1, 1), level.view(1, -1)
    saturation = ((largest - least) / largest.clamp_min(1)).double().mul(255.0).to(torch.int32).clamp(0, 255)

    byte = torch.arange(256, dtype=torch.float64)
    fs = (byte / 255.0).float().view(1, -1)
    position = byte * 6.0 / 255.0
    sector = position.floor()
    f = (position - sector).float().view(-1, 1)
    odd = (f * fs).double()  # a float32 product in Pillow
    even = fs.double() * (1.0 - f.double())
    sector = sector.long() % 6
    middle = 1.0 - torch.where(sector.view(-1, 1) % 2 == 1, odd, even)
    levels = torch.stack([torch.ones_like(middle), middle, (1.0 - fs.double()).expand_as(middle)])
    share = levels.gather(0, torch.tensor(_SECTORS)[sector].T.unsqueeze(2).expand(3, 256, 256))
    # rounded to float32 the product with a value still falls on the same side of every half (all 2^24 cases)
    made = {"hue": hue.flatten(), "saturation": saturation.flatten(), "share": share.float().flatten(1)}
    return {name: table.contiguous().to(device) for name, table in made.items()}


def shift(pixels_MCHW: Tensor, shift_M: Tensor) -> Tensor:
    """RGB images with ``shift_M`` (int64, 0..255) added to the hue byte modulo 256; a shift of 0 still rounds through HSV, as published."""
    t = tables(pixels_MCHW.device)
    r, g, b = pixels_MCHW.to(torch.int32).unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    least = torch.minimum(torch.minimum(r, g), b)
    red, green = (value == r).to(torch.int32), (value == g).to(torch.int32)
    green *= 1 - red
    # the other two channels' difference: g - b where red is largest, b - r where green, r - g where blue; products cost less than choices on a CPU
    difference = r - g
    difference += red * (2 * g - b - r)
    difference += green * (b + g - 2 * r)
    index = (2 - 2 * red - green) * 256
    index += value
    index -= least
    index *= 511
    index += difference
    index += 255
    shape = value.shape
    hue = t["hue"].index_select(0, index.flatten()).view(shape)
    saturation = t["saturation"].index_select(0, (value * 256 + least).flatten()).view(shape)
    index = ((hue + shift_M.view(-1, 1, 1).to(torch.int32)) & 255) * 256
    index = (index + saturation).flatten()
    levels = value.to(torch.float32)
    out = torch.empty_like(pixels_MCHW, memory_format=torch.contiguous_format)
    for channel, share in enumerate(t["share"]):
        out[:, channel] = (share.index_select(0, index).view(shape) * levels).add_(0.5)  # the cast truncates
    return out
