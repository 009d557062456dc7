"""From 32-bit random words to the numbers of one law, batched: integers exactly, so that every device draws the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.augment import philox
from fastssl.augment.constants import constant, kept
from fastssl.augment.ops import NORMAL_TABLE, SPACES, tables
from fastssl.augment.policy import COLOUR_PARTS, Law, cropped_to

TRIES = 10  # of resized_crop
ORDERS = tuple(itertools.permutations(range(len(COLOUR_PARTS))))
STEPS = 1 << 12  # log ratios lie on a grid of STEPS^2 points
Drawn = dict[str, Tensor]


def randaugment(law: Law, word: Tensor) -> Drawn:
    """Four words per op: which, whether, level, sign."""
    space, n = SPACES[law["space"]], law["n"]
    choice, apply, level, sign = word.unflatten(1, (n, 4)).unbind(2)
    t = tables(space, word.device)
    if space.level == "integer":
        drawn = space.low + philox.below(level, space.high - space.low + 1)
    elif space.level == "uniform":
        drawn = level >> 8
    else:
        drawn = t["normal"][philox.below(level, NORMAL_TABLE)]
    code = t["pool"][philox.below(choice, len(space.pool))]
    return {"code": code, "applied": philox.chance(apply, law["p"]), "level": drawn, "sign": 1 - 2 * (sign >> 31)}


def cutout_box(law: Law, word: Tensor, extent_B2: Tensor) -> Drawn:
    """The box of ``cutout`` from two words per row (y, x): centre = word / 2^32 * extent."""
    centre = philox.below(word, extent_B2)  # floor of the continuous centre; flooring before or after the shift is the same for whole shifts
    first = (centre - law["side"] // 2).clamp_min(0)
    return {"box": torch.cat([first, torch.minimum(extent_B2, first + law["side"])], 1)}


def cutout_fraction_box(law: Law, word: Tensor, extent_B2: Tensor) -> Drawn:
    """The box of ``cutout_fraction`` from three words per row (side, y, x), in exactly rounded float64."""
    side = word[:, :1].double() / (1 << 32) * law["most"] * extent_B2[:, 1:]
    centre = word[:, 1:].double() / (1 << 32) * extent_B2
    first = (centre - side / 2).clamp_min(0).trunc()
    last = torch.minimum(extent_B2.double(), first + side).trunc()
    last = torch.where(side > 0, last, first - 1)
    return {"box": torch.cat([first, last], 1).long()}


def pad_crop(law: Law, word: Tensor, extent_B2: Tensor, size: int) -> Drawn:
    """Two words per row (y, x). An image that stays smaller than the window even when padded has one position, the middle."""
    slack = extent_B2 + 2 * law["pad"] - cropped_to(law, size)
    first = torch.where(slack < 0, slack.div(2, rounding_mode="floor"), philox.below(word, slack.clamp_min(0) + 1))
    return {"y": first[:, 0], "x": first[:, 1]}


def uniform(word: Tensor, low: float, high: float) -> Tensor:
    """float64 in [low, high)."""
    return low + word.double() * ((high - low) / (1 << 32))


@kept
def _ratio_tables(low: float, high: float, device: torch.device) -> Tensor:
    """float64 [2, STEPS]: the coarse and the fine factor of exp(U(log low, log high)); exp itself may differ in the last bit between devices."""
    start, span = math.log(low), math.log(high) - math.log(low)
    coarse = [math.exp(start + span * i / STEPS) for i in range(STEPS)]
    fine = [math.exp(span * (i + 0.5) / STEPS**2) for i in range(STEPS)]
    return torch.tensor([coarse, fine], dtype=torch.float64, device=device)


def _ratio(number: Tensor, of: float) -> Tensor:
    """number / of by a true division on every device: CUDA divides by a Python number through its rounded reciprocal."""
    return number / torch.full_like(number, of)


def crop_box(law: Law, word: Tensor, size_B2: Tensor) -> Tensor:
    """int64 [B, 4] top, left, height, width in pixels of the original image, from 22 words per row: area and ratio of each try, then y and x."""
    height, width = size_B2[:, :1].double(), size_B2[:, 1:].double()
    shares, ratios = word[:, : 2 * TRIES].unflatten(1, (TRIES, 2)).unbind(2)
    area = height * width * uniform(shares, *law["scale"])
    coarse, fine = _ratio_tables(*law["ratio"], word.device).unbind(0)
    ratio = coarse[ratios >> 20] * fine[(ratios >> 8) & (STEPS - 1)]
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # halves go to the even number, as Python's round does
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    # the first try that fits; one more column holds the box for rows without any
    low, high = law["ratio"]
    whole = width / height
    w_last = torch.where(whole > high, (height * high).round(), width)
    h_last = torch.where(whole < low, _ratio(width, low).round(), height)
    fits = torch.cat([fits, torch.ones_like(fits[:, :1])], 1)
    place = torch.arange(TRIES + 1, device=word.device)
    chosen = torch.where(fits, place, TRIES).amin(1, keepdim=True)
    side = torch.stack([torch.cat([h, h_last], 1), torch.cat([w, w_last], 1)], 2).long()
    side = side.gather(1, chosen.unsqueeze(2).expand(-1, 1, 2)).squeeze(1)
    side = torch.minimum(side.clamp_min(1), size_B2)
    slack = size_B2 - side
    first = torch.where(chosen == TRIES, slack // 2, philox.below(word[:, 2 * TRIES :], slack + 1))
    return torch.cat([first, side], 1)


def on_canvas(box_B4: Tensor, size_B2: Tensor, extent_B2: Tensor) -> Tensor:
    """A box of the original image in pixels of its canvas: edges to the nearest pixel (a half goes up), at least one pixel left."""
    first, end = box_B4[:, :2], box_B4[:, :2] + box_B4[:, 2:]
    first, end = ((2 * edge * extent_B2 + size_B2).div(2 * size_B2, rounding_mode="floor") for edge in (first, end))
    first = torch.minimum(first, extent_B2 - 1)
    return torch.cat([first, (torch.minimum(end, extent_B2) - first).clamp_min(1)], 1)


def short_side(law: Law, size_B2: Tensor) -> Tensor:
    """int64 [B, 2] (height, width) of the image whose shorter side becomes ``short`` pixels."""
    shorter = size_B2.amin(1, keepdim=True)
    return (law["short"] * size_B2).div(shorter, rounding_mode="floor")


def color_jitter(law: Law, word: Tensor) -> Drawn:
    """Six words: whether, order, and the four factors."""
    orders = constant(tuple(itertools.chain(*ORDERS)), torch.int64, word.device).view(-1, len(COLOUR_PARTS))
    bounds = [(max(0.0, 1.0 - law[part]), 1.0 + law[part]) for part in COLOUR_PARTS[:3]] + [(-law["hue"], law["hue"])]
    factor = torch.stack([uniform(word[:, 2 + k], *bound) for k, bound in enumerate(bounds)], 1)
    return {"applied": philox.chance(word[:, 0], law["p"]), "order": orders[philox.below(word[:, 1], len(ORDERS))], "factor": factor}


def blur(law: Law, word: Tensor) -> Drawn:
    """Two words: whether, and the radius."""
    return {"applied": philox.chance(word[:, 0], law["p"]), "sigma": uniform(word[:, 1], law["sigma_low"], law["sigma_high"])}


def words_needed(law: Law) -> int:
    """How many 32-bit words of a row the law takes."""
    if law.name == "randaugment":
        return 4 * law["n"]
    fixed = {"resize": 0, "center": 0, "flip": 1, "pad_crop": 2, "cutout": 2, "cutout_fraction": 3, "resized_crop": 2 * TRIES + 2}
    return {**fixed, "color_jitter": 2 + len(COLOUR_PARTS), "grayscale": 1, "blur": 2, "solarize": 1}[law.name]


def _coin(law: Law, word: Tensor) -> Drawn:
    return {"applied": philox.chance(word[:, 0], law["p"])}


# The laws whose numbers depend on nothing but their words.
BY_WORDS: dict[str, Callable[[Law, Tensor], Drawn]] = {
    "flip": lambda law, word: {"flip": philox.chance(word[:, 0], law["p"])},
    "randaugment": randaugment,
    "color_jitter": color_jitter,
    "grayscale": _coin,
    "solarize": _coin,
    "blur": blur,
}
