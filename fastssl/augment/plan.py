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
from fastssl.augment import plan_laws as laws_of
from fastssl.augment.plan_laws import BY_WORDS, words_needed
from fastssl.augment.policy import CROPS, Policy, cropped_to, resized_to


@dataclass
class Plan:
    """What was drawn: one mapping of tensors per law of the policy, first axis = row.

    flip: ``flip`` bool.  pad_crop: ``y``, ``x`` int64, top-left of the window in the padded image.
    resized_crop: ``box`` int64 [B, 4] = top, left, height, width in pixels of the canvas (drawn on the original image, then mapped).
    resize with ``short``: ``height``, ``width`` int64 of the resized image; nothing for the others.  center: nothing.
    randaugment, all [B, n]: ``code`` int64 (index into ``ops.OPS``), ``applied`` bool, ``level`` int64 (units of the space), ``sign`` int64 +-1.
    cutout, cutout_fraction: ``box`` int64 [B, 4] = y0, x0, y1, x1, ends included, possibly past the image; empty where y1 < y0.
    color_jitter: ``applied`` bool, ``order`` int64 [B, 4] (which part comes first ... last, as indices into ``policy.COLOUR_PARTS``),
    ``factor`` float64 [B, 4] in the order of ``COLOUR_PARTS``: three blend factors and the hue's share of a turn.
    grayscale, solarize: ``applied`` bool.  blur: ``applied`` bool, ``sigma`` float64, pixels.
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


def draw(policy: Policy, *, seed: int, stream: int, view: int, draw_B: Tensor, extent_B2: Tensor, size_B2: Tensor | None = None) -> Plan:
    """The plan of one view of B rows, on the device of ``draw_B``.

    ``draw_B`` int64: position of each row's use in the stream's infinite sequence; ``extent_B2``: valid (height, width) of the canvas in pixels;
    ``size_B2``: (height, width) of the original image, None where it is the extent (a row of zeros too): resized crops and ``short`` follow it.
    Depends on nothing but (seed, stream, view, draw) and, for offsets and boxes, the extent and size of the same row.
    """
    need = [words_needed(law) for law in policy.laws]
    word = philox.words(seed, stream, view, draw_B, sum(need))
    extent = extent_B2.to(torch.int64).clamp_min(1)  # a row of padding has none
    size = extent if size_B2 is None else torch.where(size_B2 > 0, size_B2.to(torch.int64), extent)
    laws: list[dict[str, Tensor]] = []
    for law, mine in zip(policy.laws, word.split(need, dim=1), strict=True):
        drawn: dict[str, Tensor] = {}
        if law.name in BY_WORDS:
            drawn = BY_WORDS[law.name](law, mine)
        elif law.name == "pad_crop":
            drawn = laws_of.pad_crop(law, mine, extent, policy.size)
        elif law.name == "resized_crop":
            drawn = {"box": laws_of.on_canvas(laws_of.crop_box(law, mine, size), size, extent)}
        elif law.name == "cutout":
            drawn = laws_of.cutout_box(law, mine, extent)
        elif law.name == "cutout_fraction":
            drawn = laws_of.cutout_fraction_box(law, mine, extent)
        if law.name in CROPS:
            extent = torch.full_like(extent, cropped_to(law, policy.size))
        elif law.name == "resize" and law["short"] is not None:
            extent = laws_of.short_side(law, size)
            drawn = {"height": extent[:, 0], "width": extent[:, 1]}
        elif law.name == "resize":
            height, width = resized_to(law, policy.size)
            extent = torch.stack([torch.full_like(extent[:, 0], height), torch.full_like(extent[:, 1], width)], 1)
        if law.name in CROPS or law.name == "resize":
            size = extent
        laws.append(drawn)
    return Plan(tuple(laws))
