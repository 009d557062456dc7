"""Draw every random number of a view as tensors, before any pixel is touched.

Numbers come from ``philox.words`` keyed by (seed, stream, view, draw): each law takes a fixed run of 32-bit words of its row, in the policy's
order.  Integers (offsets, op codes, levels, boxes) are computed exactly, so they agree on every device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.augment import philox
from fastssl.augment.ops import NORMAL_TABLE, SPACES, tables
from fastssl.augment.policy import CROPS, Law, Policy, resized_to


@dataclass
class Plan:
    """What was drawn: one mapping of tensors per law of the policy, first axis = row.

    flip: ``flip`` bool.  pad_crop: ``y``, ``x`` int64, top-left of the window in the padded image.
    randaugment, all [B, n]: ``code`` int64 (index into ``ops.OPS``), ``applied`` bool, ``level`` int64 (units of the space), ``sign`` int64 +-1.
    cutout, cutout_fraction: ``box`` int64 [B, 4] = y0, x0, y1, x1, ends included, possibly past the image; empty where y1 < y0.
    """

    laws: tuple[dict[str, Tensor], ...]

    def to(self, device: str | torch.device) -> Plan:
        return Plan(tuple({k: v.to(device) for k, v in law.items()} for law in self.laws))

    def rows(self, index: Tensor | slice) -> Plan:
        """The plan of some rows."""
        return Plan(tuple({k: v[index] for k, v in law.items()} for law in self.laws))

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        for i, law in enumerate(self.laws):
            for name, tensor in law.items():
                yield f"{i}.{name}", tensor


def words_needed(law: Law) -> int:
    """How many 32-bit words of a row the law takes."""
    if law.name == "randaugment":
        return 4 * law["n"]
    return {"resize": 0, "center": 0, "flip": 1, "pad_crop": 2, "cutout": 2, "cutout_fraction": 3}[law.name]


def _randaugment(law: Law, word: Tensor) -> dict[str, Tensor]:
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


def cutout_box(law: Law, word: Tensor, extent_B2: Tensor) -> dict[str, Tensor]:
    """The box of ``cutout`` from two words per row (y, x): centre = word / 2^32 * extent."""
    centre = philox.below(word, extent_B2)  # floor of the continuous centre; flooring before or after the shift is the same for whole shifts
    first = (centre - law["side"] // 2).clamp_min(0)
    return {"box": torch.cat([first, torch.minimum(extent_B2, first + law["side"])], 1)}


def cutout_fraction_box(law: Law, word: Tensor, extent_B2: Tensor) -> dict[str, Tensor]:
    """The box of ``cutout_fraction`` from three words per row (side, y, x), in exactly rounded float64."""
    side = word[:, :1].double() / (1 << 32) * law["most"] * extent_B2[:, 1:]
    centre = word[:, 1:].double() / (1 << 32) * extent_B2
    first = (centre - side / 2).clamp_min(0).trunc()
    last = torch.minimum(extent_B2.double(), first + side).trunc()
    last = torch.where(side > 0, last, first - 1)
    return {"box": torch.cat([first, last], 1).long()}


def draw(policy: Policy, *, seed: int, stream: int, view: int, draw_B: Tensor, extent_B2: Tensor) -> Plan:
    """The plan of one view of B rows, on the device of ``draw_B``.

    ``draw_B`` int64: position of each row's use in the stream's infinite sequence; ``extent_B2``: valid (height, width) in pixels.
    Depends on nothing but (seed, stream, view, draw) and, for offsets and boxes, the extent of the same row.
    """
    need = [words_needed(law) for law in policy.laws]
    word = philox.words(seed, stream, view, draw_B, sum(need))
    extent = extent_B2.to(torch.int64)
    laws: list[dict[str, Tensor]] = []
    for law, mine in zip(policy.laws, word.split(need, dim=1), strict=True):
        drawn: dict[str, Tensor] = {}
        if law.name == "flip":
            drawn = {"flip": philox.chance(mine[:, 0], law["p"])}
        elif law.name == "pad_crop":
            slack = extent + 2 * law["pad"] - policy.size
            # an image that stays smaller than the view even when padded has one position, the middle; the padding rule goes on outside
            first = torch.where(slack < 0, slack.div(2, rounding_mode="floor"), philox.below(mine, slack.clamp_min(0) + 1))
            drawn = {"y": first[:, 0], "x": first[:, 1]}
        elif law.name == "randaugment":
            drawn = _randaugment(law, mine)
        elif law.name == "cutout":
            drawn = cutout_box(law, mine, extent)
        elif law.name == "cutout_fraction":
            drawn = cutout_fraction_box(law, mine, extent)
        laws.append(drawn)
        if law.name in CROPS:
            extent = torch.full_like(extent, policy.size)
        elif law.name == "resize":
            height, width = resized_to(law, policy.size)
            extent = torch.stack([torch.full_like(extent[:, 0], height), torch.full_like(extent[:, 1], width)], 1)
    return Plan(tuple(laws))
