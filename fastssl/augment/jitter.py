"""Color jitter on uint8 images [M, C, H, W]: brightness, contrast, saturation and hue in an order drawn for each image, rounded to bytes after each.

The blends are those of Pillow's enhancers; grey images know brightness and contrast only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.augment import hue, pixels
from fastssl.augment.policy import COLOUR_PARTS, Law

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(len(COLOUR_PARTS))


def parts_of(law: Law, channels: int) -> list[int]:
    """The parts that the law has, as indices into ``COLOUR_PARTS``: one with strength 0 does nothing, not even rounding."""
    return [part for part, name in enumerate(COLOUR_PARTS) if law[name] and (channels == 3 or part < SATURATION)]


def hue_byte(factor_M4: Tensor) -> Tensor:
    """int64 [M] in 0..255: the shift that Pillow's hue byte gets."""
    return (factor_M4[:, HUE] * 255).trunc().long() & 255


def one(image_1CHW: Tensor, part: int, factor: Tensor, shift: Tensor, inside: Tensor | None) -> Tensor:
    """One part on one image; ``factor``, ``shift``: [1]."""
    if part == HUE:
        return hue.shift(image_1CHW, shift)
    if part == SATURATION:
        base = pixels.luma(image_1CHW).unsqueeze(1).float()
    else:
        base = pixels.mean_luma(image_1CHW, inside).float() if part == CONTRAST else torch.zeros_like(shift, dtype=torch.float32)
        base = base.view(1, 1, 1, 1)
    return pixels.blend(base, image_1CHW.float(), factor.float().view(1, 1, 1, 1))


def by_image(image_BCHW: Tensor, law: Law, drawn: dict[str, Tensor], inside: Tensor | None) -> None:
    """In place, image after image, so that what one needs stays in the cache. Reads the plan on the host."""
    parts, shift = parts_of(law, image_BCHW.shape[1]), hue_byte(drawn["factor"])
    for row in drawn["applied"].nonzero().flatten().tolist():
        now = slice(row, row + 1)
        image, mask = image_BCHW[now], None if inside is None else inside[now]
        for part in drawn["order"][row].tolist():
            if part in parts:
                image = one(image, part, drawn["factor"][now, part], shift[now], mask)
        image_BCHW[now] = image


def dense(image_BCHW: Tensor, law: Law, drawn: dict[str, Tensor], inside: Tensor | None) -> Tensor:
    """All images at once in fixed shapes: each of the four turns blends every image with its own base, and shifts the hue where it is its turn."""
    parts, shift = parts_of(law, image_BCHW.shape[1]), hue_byte(drawn["factor"])
    x = image_BCHW
    for k in range(len(COLOUR_PARTS)):
        part = drawn["order"][:, k]
        turn = {p: (drawn["applied"] & (part == p)).view(-1, 1, 1, 1) for p in parts}
        base, factor = torch.zeros((), device=x.device), torch.ones((), device=x.device)
        for p in parts:
            if p == CONTRAST:
                base = torch.where(turn[p], pixels.mean_luma(x, inside).float().view(-1, 1, 1, 1), base)
            elif p == SATURATION:
                base = torch.where(turn[p], pixels.luma(x).unsqueeze(1).float(), base)
            if p != HUE:
                factor = torch.where(turn[p], drawn["factor"][:, p].float().view(-1, 1, 1, 1), factor)
        shifted = hue.shift(x, shift) if HUE in parts else x
        x = torch.where(turn[HUE], shifted, pixels.blend(base, x.float(), factor)) if HUE in parts else pixels.blend(base, x.float(), factor)
    return x
