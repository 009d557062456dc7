"""Pillow's colour operations on uint8 images [M, C, H, W], bit for bit: tables, histograms and blends.

``inside`` is a bool mask [M, H, W] of the pixels that belong to the image, or None when all do; statistics are taken over it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.augment.ops import CODE


def paint(pixels_MCHW: Tensor, hit_MHW: Tensor, colour: tuple[int, ...]) -> Tensor:
    """In place: the pixels that are hit (bool or 0/1 uint8) become ``colour``, one level per channel.

    Multiplied and added rather than chosen: on the CPU ``where`` on bytes costs ten times as much.
    """
    hit = hit_MHW.to(torch.uint8).unsqueeze(1)
    pixels_MCHW.mul_(1 - hit)
    for channel, level in enumerate(colour):
        if level:
            pixels_MCHW[:, channel : channel + 1].add_(hit * level)
    return pixels_MCHW


def luma(pixels_MCHW: Tensor) -> Tensor:
    """[M, H, W] grey levels (Pillow's RGB to L); for one channel the channel itself."""
    if pixels_MCHW.shape[1] == 1:
        return pixels_MCHW[:, 0]
    r, g, b = pixels_MCHW.to(torch.int32).unbind(1)
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).to(torch.uint8)


def mean_luma(pixels_MCHW: Tensor, inside: Tensor | None) -> Tensor:
    """[M] int64: mean grey level, rounded half up."""
    grey = luma(pixels_MCHW)
    if inside is None:
        total, count = grey.sum((1, 2), dtype=torch.int64), grey.shape[1] * grey.shape[2]
        return (2 * total + count).div(2 * count, rounding_mode="floor")
    total, number = (grey * inside).sum((1, 2), dtype=torch.int64), inside.sum((1, 2)).clamp_min(1)
    return (2 * total + number).div(2 * number, rounding_mode="floor")


def blend(base: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """uint8 of base + factor * (pixels - base) in float32, truncated and clipped to 0..255 (Pillow's Image.blend)."""
    return (base + factor * (pixels - base)).clamp_(0, 255).to(torch.uint8)


def tone_table(code_M: Tensor, argument_M: Tensor, mean_M: Tensor) -> Tensor:
    """uint8 [M, 256]: what each level becomes; identity for ops that are no tone curve.  ``mean_M``: mean luma, read by Contrast."""
    level = torch.arange(256, device=code_M.device, dtype=torch.int32).unsqueeze(0)
    code, a = code_M.unsqueeze(1), argument_M.unsqueeze(1)
    whole, factor = a.to(torch.int32), a.to(torch.float32)
    base = torch.where(code == CODE["Contrast"], mean_M.unsqueeze(1), 0).to(torch.float32)
    table = blend(base, level.to(torch.float32), torch.where((code == CODE["Contrast"]) | (code == CODE["Brightness"]), factor, 1.0)).to(torch.int32)
    table = torch.where(code == CODE["Invert"], 255 - level, table)
    keep = ~(255 >> whole.clamp(0, 8))  # shifting by the kept bits leaves ones exactly on the bits to clear
    table = torch.where(code == CODE["Posterize"], level & keep, table)
    table = torch.where((code == CODE["Solarize"]) & (level >= a), 255 - level, table)
    added = (level + whole).clamp(0, 255)
    table = torch.where(code == CODE["SolarizeAdd"], torch.where(added < 128, added, 255 - added), table)
    table = torch.where((code == CODE["SolarizeAddDark"]) & (level < 128), added, table)
    return table.to(torch.uint8)


def _darkest_and_brightest(pixels_MCHW: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
    flat = pixels_MCHW.flatten(2)
    if inside is None:
        return flat.amin(2), flat.amax(2)
    mask = inside.flatten(1).unsqueeze(1)
    return torch.where(mask, flat, 255).amin(2), torch.where(mask, flat, 0).amax(2)


def autocontrast_table(pixels_MCHW: Tensor, inside: Tensor | None) -> Tensor:
    """uint8 [M, C, 256]: stretch each channel to 0..255, in float64 as Pillow does."""
    low, high = (v.double().unsqueeze(2) for v in _darkest_and_brightest(pixels_MCHW, inside))
    level = torch.arange(256, device=pixels_MCHW.device, dtype=torch.float64)
    span = torch.where(high > low, high - low, 255.0)
    scale = torch.full_like(span, 255.0) / span  # ``255.0 / span`` would multiply by a rounded reciprocal
    table = (level * scale + -low * scale).clamp_(0, 255)
    return torch.where(high > low, table, level).to(torch.uint8)


def equalize_table(pixels_MCHW: Tensor, inside: Tensor | None) -> Tensor:
    """uint8 [M, C, 256]: histogram equalisation of each channel."""
    m, c, height, width = pixels_MCHW.shape
    flat = pixels_MCHW.reshape(m * c, height * width)
    if inside is None:
        weight = torch.ones((), dtype=torch.int32, device=flat.device).expand(flat.shape)
    else:
        weight = inside.view(m, 1, -1).expand(m, c, -1).reshape(flat.shape).to(torch.int32)
    count = torch.zeros(m * c, 256, dtype=torch.int32, device=flat.device).scatter_add_(1, flat.long(), weight)
    high = _darkest_and_brightest(pixels_MCHW, inside)[1].view(m * c, 1)
    below = count.cumsum(1, dtype=torch.int32)
    step = (below[:, -1:] - count.gather(1, high.long())).div(255, rounding_mode="floor")
    table = (step // 2 + below - count).div(step.clamp_min(1), rounding_mode="floor").clamp_(0, 255)
    # step is 0 also where only one level occurs, the other case in which Pillow leaves the channel alone
    level = torch.arange(256, device=flat.device, dtype=torch.int32)
    return torch.where(step > 0, table, level).to(torch.uint8).view(m, c, 256)


def look_up(pixels_MCHW: Tensor, table: Tensor) -> Tensor:
    """Apply a table [M, 256] (all channels) or [M, C, 256] (each channel its own)."""
    m, c, height, width = pixels_MCHW.shape
    rows = m if table.dim() == 2 else m * c
    return table.reshape(rows, 256).gather(1, pixels_MCHW.reshape(rows, -1).long()).view(m, c, height, width)


def smooth(pixels_MCHW: Tensor, height_M: Tensor | None, width_M: Tensor | None) -> Tensor:
    """3x3 smoothing with weights 1 and centre 5 over 13, rounded; the outermost pixels of the extent (None = canvas) stay as they are."""
    _, _, height, width = pixels_MCHW.shape
    padded = torch.nn.functional.pad(pixels_MCHW, (1, 1, 1, 1)).to(torch.int32)
    rows = padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * padded[:, :, 1:-1, 1:-1]
    rounded = (((2 * total + 13) * 20165) >> 19).to(torch.uint8)  # floor(v / 26) exactly for 0 <= v <= 6643
    row = torch.arange(height, device=pixels_MCHW.device).view(1, 1, -1, 1)
    col = torch.arange(width, device=pixels_MCHW.device).view(1, 1, 1, -1)
    bottom = height - 1 if height_M is None else height_M.view(-1, 1, 1, 1) - 1
    right = width - 1 if width_M is None else width_M.view(-1, 1, 1, 1) - 1
    inner = ((row > 0) & (row < bottom)) & ((col > 0) & (col < right))
    return torch.where(inner, rounded, pixels_MCHW)
