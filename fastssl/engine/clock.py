"""Where a run stands: the learning rate of each update, and the count of updates and epochs on host and device.

k is the number of finished updates (the 0-based number of the update about to be made), T the updates of the whole run, e = k // steps_per_epoch
the number of finished epochs, E the epochs of the whole run (the last one may be short), W the warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fastssl.errors import RecipeError, nearest
from fastssl.schema import ScheduleConfig
from fastssl.types import ClockTensors

_EPOCH_LAWS = ("cosine_epoch", "multistep")


class LearningRate:
    """Learning rate of an update as a pure function of its number, in Python floats.

    Laws per update, with x = k - W and X = T - W (W = ``warmup_steps``):
      constant      lr
      cosine_7_16   lr max(0, cos(7 pi x / (16 X)))                  FixMatch, arXiv:2001.07685, section 2.4
      cosine_half   lr (1 + cos(pi x / X)) / 2
      exp           lr (1 + gamma x)^-decay
    Laws per epoch (W = ``warmup_epochs``):
      cosine_epoch  lr (1 + cos(pi (e - W) / (E - W))) / 2           SimMatch family; ends above zero
      multistep     lr gamma^(number of milestones <= e)             milestones are epochs of the whole run
    Warm-up is linear. In updates: lr k / W while k < W, so the first update has rate 0 (a milestone or epoch law then goes on from k, the others from x).
    In epochs: lr (k + 1) / (W steps_per_epoch) while e < W, so the first update has a small rate and the last one of warm-up the full rate.
    ``warmup_from`` = f above 0 makes the share s of either line f + (1 - f) s.

    Raises :class:`RecipeError` for a law or a warm-up that does not exist.
    """

    def __init__(self, config: ScheduleConfig, base_lr: float, total_steps: int, steps_per_epoch: int):
        if config.name not in _LAWS:
            raise RecipeError(f"schedule.name: there is no law {config.name!r}{nearest(config.name, _LAWS)}; the laws are {', '.join(sorted(_LAWS))}")
        if config.warmup_epochs and config.name not in _EPOCH_LAWS:
            raise RecipeError(f"schedule.warmup_epochs: {config.name} warms up in updates; set schedule.warmup_steps instead")
        warmup = max(config.warmup_steps, config.warmup_epochs * steps_per_epoch)
        if warmup >= total_steps and warmup:
            raise RecipeError(f"schedule: a warm-up of {warmup} updates leaves none of the run's {total_steps}; shorten it")
        self.config, self.base_lr, self.total_steps, self.steps_per_epoch = config, float(base_lr), total_steps, steps_per_epoch
        self.epochs = -(-total_steps // steps_per_epoch)

    def __call__(self, step: int) -> float:
        """The rate of update ``step`` (0-based; ``total_steps`` itself is allowed and gives the end point of the law)."""
        c, epoch = self.config, step // self.steps_per_epoch
        if step < c.warmup_steps:
            return self.base_lr * (c.warmup_from + (1 - c.warmup_from) * (step / c.warmup_steps))
        if epoch < c.warmup_epochs:
            return self.base_lr * (c.warmup_from + (1 - c.warmup_from) * ((step + 1) / (c.warmup_epochs * self.steps_per_epoch)))
        return self.base_lr * _LAWS[c.name](self, epoch if c.name in _EPOCH_LAWS else step - c.warmup_steps)

    def _progress(self, x: int) -> float:
        return x / (self.total_steps - self.config.warmup_steps)

    def _cosine_7_16(self, x: int) -> float:
        return max(0.0, math.cos(7 * math.pi / 16 * self._progress(x)))

    def _cosine_half(self, x: int) -> float:
        return (1 + math.cos(math.pi * self._progress(x))) / 2

    def _exp(self, x: int) -> float:
        return (1 + self.config.gamma * x) ** -self.config.decay

    def _cosine_epoch(self, epoch: int) -> float:
        warmup = self.config.warmup_epochs
        return (1 + math.cos(math.pi * (epoch - warmup) / (self.epochs - warmup))) / 2

    def _multistep(self, epoch: int) -> float:
        return self.config.gamma ** sum(milestone <= epoch for milestone in self.config.milestones)


_LAWS: dict[str, Callable[[LearningRate, int], float]] = {
    "constant": lambda law, x: 1.0,
    "cosine_7_16": LearningRate._cosine_7_16,
    "cosine_half": LearningRate._cosine_half,
    "exp": LearningRate._exp,
    "cosine_epoch": LearningRate._cosine_epoch,
    "multistep": LearningRate._multistep,
}


def sigmoid_ramp(epoch: float, length: float) -> float:
    """exp(-5 (1 - clip(epoch, 0, length) / length)^2): from 0.0067 at epoch 0 to 1 at ``length``; 1 if ``length`` is 0 (Laine and Aila, arXiv:1610.02242)."""
    if length <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(max(epoch, 0.0), length) / length) ** 2)


class Clock:
    """Finished updates and epochs, twice: as host integers for the trainer and as int64 device scalars for methods and captured graphs.

    ``tensors`` keep their address for the whole run; ``tick`` writes them in place without a sync. During update k both copies read k.
    """

    def __init__(self, steps_per_epoch: int, device: str | torch.device = "cpu"):
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self.tensors = ClockTensors(*(torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)))

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    def tick(self) -> None:
        """One update has finished."""
        self.tick_tensors()
        self.tick_host()

    def tick_tensors(self) -> None:
        """The device half of :meth:`tick`: what a captured update contains."""
        self.tensors.step.add_(1)
        torch.div(self.tensors.step, self.steps_per_epoch, rounding_mode="floor", out=self.tensors.epoch)

    def tick_host(self) -> None:
        """The host half of :meth:`tick`: what the trainer does beside a replay."""
        self.step += 1

    def load(self, step: int) -> None:
        """Stand where ``step`` updates have finished."""
        self.step = step
        self.tensors.step.fill_(step)
        self.tensors.epoch.fill_(self.epoch)
