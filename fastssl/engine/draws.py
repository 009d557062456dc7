"""The random numbers that a method asks for at each step, as pure functions of (seed, step or draw position, name): equal at any world size."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastssl.augment import philox
from fastssl.errors import RecipeError
from fastssl.types import STREAM_IDS, Draw, RawBatch, View, Views

LANE = 16  # streams from here on belong to methods' draws; below are the data streams of view plans
TABLE = 1 << 12


class MethodDraws:
    """Makes ``batch.draws`` at every step: fixed shapes, on the device, no host reads. ``views`` as the method declares them."""

    def __init__(self, wishes: Mapping[str, Draw], views: Mapping[str, View], *, seed: int, device: torch.device):
        self.wishes, self.views, self.seed = dict(wishes), dict(views), seed
        self._tables: dict[str, Tensor] = {}
        for name, wish in self.wishes.items():
            if wish.kind == "normal" and wish.like not in self.views:
                raise RecipeError(f"the method's draw {name!r} is shaped like the view {wish.like!r}, but its views are {sorted(self.views)}")
            if wish.kind == "beta":
                self._tables[name] = torch.tensor(beta_quantiles(wish.alpha), dtype=torch.float32, device=device)

    @torch.no_grad()
    def __call__(self, raw: Mapping[str, RawBatch], views: Views, step: Tensor) -> dict[str, Tensor]:
        """``step``: int64 scalar on the device, the number of finished updates."""
        return {name: self._draw(number, name, wish, raw, views, step) for number, (name, wish) in enumerate(self.wishes.items())}

    def _draw(self, number: int, name: str, wish: Draw, raw: Mapping[str, RawBatch], views: Views, step: Tensor) -> Tensor:
        if wish.kind == "normal":
            stream, like = self.views[wish.like].stream, views[wish.like]
            count = like[0].numel()
            word = philox.words(self.seed, LANE + 1 + STREAM_IDS[stream], number, raw[stream].draw_B, 2 * ((count + 1) // 2))
            return normal(word)[:, :count].view(like.shape)
        word = philox.words(self.seed, LANE, number, step.view(1), wish.length)[0]
        if wish.kind == "permutation":
            return torch.argsort(word, stable=True)
        if wish.kind == "uniform":
            return (word >> 8).to(torch.float32) / (1 << 24)
        return self._tables[name][word >> 20]


def normal(word: Tensor) -> Tensor:
    """Standard normal float32 numbers from pairs of 32-bit words along the last axis (Box and Muller 1958), same shape."""
    first, second = word.unflatten(-1, (-1, 2)).unbind(-1)
    radius = (-2 * ((first.to(torch.float64) + 0.5) / (1 << 32)).log()).sqrt()
    angle = second.to(torch.float64) * (2 * math.pi / (1 << 32))
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2).to(torch.float32)


def beta_quantiles(alpha: float, count: int = TABLE) -> np.ndarray:
    """``count`` equally likely quantiles of Beta(alpha, alpha), ascending, float64: its density added up on a fine grid in s, x = sin^2(pi s / 2).

    In s the density is proportional to (sin cos)^(2 alpha - 1), so that small alpha, where the mass sits at 0 and 1, is resolved as well.
    Raises RecipeError unless alpha > 0.
    """
    if not alpha > 0:
        raise RecipeError(f"the parameter of a Beta distribution must be greater than 0, got {alpha}")
    # x = sin^2(t): the mass below t is proportional to t^(2 alpha) near 0; in w = t^(2 alpha) the density stays bounded
    half = np.linspace(0, (math.pi / 4) ** (2 * alpha), 1 << 16)
    t = half ** (1 / (2 * alpha))
    ratio = np.ones_like(t)
    ratio[1:] = np.sin(t[1:]) * np.cos(t[1:]) / t[1:]
    density = ratio ** (2 * alpha - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(half))])
    below_half = np.interp((np.arange(count // 2) + 0.5) / count, mass / mass[-1] / 2, t)
    x = np.sin(below_half) ** 2
    return np.concatenate([x, (1 - x)[::-1]])
