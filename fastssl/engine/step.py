"""One update, from decoded canvases to moved weights, readable from top to bottom. No host sync, fixed shapes, time on the device.

Shape letters: see fastssl/types.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastssl.augment import draw, render
from fastssl.engine.clock import Clock, LearningRate
from fastssl.engine.draws import MethodDraws
from fastssl.engine.meters import Meters
from fastssl.engine.optim import clip_grad, set_lr
from fastssl.methods.base import Forward, Method, TeacherForward
from fastssl.models.ema import Teacher
from fastssl.models.joint import NetworkForward
from fastssl.models.norm import sync_running_stats
from fastssl.types import STREAM_IDS, Batch, Loss, RawBatch, StreamBatch, View, Views


class TrainModule(nn.Module):
    """Network and method in one module with one forward per update: the only thing that Accelerate prepares (DDP, autocast).

    ``compile``: the student, as the method calls it, goes through torch.compile; parameters and their names stay those of ``network``.
    """

    def __init__(self, network: nn.Module, method: Method, compile: bool = False):
        super().__init__()
        self.network = network
        self.method = method
        # One program for each shape: a symbolic one would run slower, and shapes never change within a run.
        self.student: Forward = NetworkForward(torch.compile(network, dynamic=False) if compile else network)  # type: ignore[arg-type]

    def forward(self, views: Views, batch: Batch, teacher: TeacherForward | None) -> Loss:
        return self.method(views, batch, self.student, teacher)


class ViewRenderer:
    """Turns canvases into a method's views: one preallocated channels-last buffer per resolution, each view a row range of it.

    ``policies[name]`` is the compiled policy of view ``name``; ``rows[stream]`` the stream's rows on this rank. A view's place in the method's
    declared order is its id in the random draws, so that a view's numbers depend on nothing but (seed, stream, view, draw position).
    """

    def __init__(
        self,
        views: Mapping[str, View],
        policies: Mapping[str, Any],
        rows: Mapping[str, int],
        *,
        size: int,
        channels: int,
        seed: int,
        device: torch.device,
        backend: str,
    ):
        self.views, self.policies, self.seed, self.backend = dict(views), dict(policies), seed, backend
        sides = {name: view.size or size for name, view in self.views.items()}
        self._out: dict[str, Tensor] = {}
        for side in sorted(set(sides.values())):
            names = [name for name in self.views if sides[name] == side]
            lengths = [rows[self.views[name].stream] if self.views[name].each_step else 0 for name in names]
            buffer = torch.zeros(sum(lengths), channels, side, side, device=device).to(memory_format=torch.channels_last)
            self._out.update(zip(names, buffer.split(lengths), strict=True))
        self.buffers = Views({name: self._out[name] for name, view in self.views.items() if view.each_step})

    def one(self, name: str, rows: int) -> Callable[[RawBatch], Tensor]:
        """A renderer of view ``name`` alone for batches of ``rows`` rows, in a buffer of its own; the numbers are those of draw position ``draw_B``."""
        view, out = self.views[name], self._out[name]
        buffer = torch.zeros(rows, *out.shape[1:], device=out.device).to(memory_format=torch.channels_last)

        @torch.no_grad()
        def render_one(raw: RawBatch) -> Tensor:
            self._render(name, view, raw, buffer)
            return buffer

        return render_one

    @torch.no_grad()
    def __call__(self, raw: Mapping[str, RawBatch]) -> Views:
        """Overwrite the buffers with this step's views. The returned tensors are the same ones at every step."""
        for name in self.buffers:
            view = self.views[name]
            self._render(name, view, raw[view.stream], self._out[name])
        return self.buffers

    def _render(self, name: str, view: View, rows: RawBatch, out: Tensor) -> None:
        plan = draw(
            self.policies[name],
            seed=self.seed,
            stream=STREAM_IDS[view.stream],
            view=list(self.views).index(name),
            draw_B=rows.draw_B.clamp_min(0),  # -1 is padding
            extent_B2=rows.extent_B2,
            size_B2=rows.size_B2,
        )
        render(self.policies[name], plan, rows.pixels_BHWC, rows.extent_B2, out, backend=self.backend)


@dataclass
class Updater:
    """Everything an update touches. ``module`` is the train module as Accelerate prepared it, ``train_module`` the plain one inside."""

    accelerator: Accelerator
    module: nn.Module
    train_module: TrainModule
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    clock: Clock
    renderer: ViewRenderer
    meters: Meters
    teacher: Teacher | None
    teacher_when: str  # after_step, before_forward, by_method
    teacher_forward: TeacherForward | None  # None for methods that read no teacher
    draws: MethodDraws
    clip_norm: float

    def __call__(self, raw: Mapping[str, RawBatch], step: int) -> Loss:
        """Update number ``step`` (0-based): what the host knows is written to the device, then :meth:`update` runs, then the host's clock follows."""
        set_lr(self.optimizer, self.learning_rate(step))
        loss = self.update(raw)
        self.clock.tick_host()
        return loss

    def update(self, raw: Mapping[str, RawBatch]) -> Loss:
        """The part of an update that a graph may record and replay: it runs on the device alone.

        Nothing here may read a number of the host that changes between updates: the rate lies in the optimiser's tensors, step and epoch in the
        clock's, and the same operations with the same scalar arguments run every time.
        """
        network, method = self.train_module.network, self.train_module.method
        unlabeled = raw.get("unlabeled")
        batch = Batch(StreamBatch.of(raw["labeled"]), StreamBatch.of(unlabeled) if unlabeled else None, self.clock.tensors)

        views = self.renderer(raw)
        batch.draws = self.draws(raw, views, self.clock.tensors.step)
        if self.teacher is not None and self.teacher_when == "before_forward":
            self.teacher.update(network)
        loss = self.module(views, batch, self.teacher_forward)

        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss.total)
        method.after_backward(batch)

        self._optimizer_step()
        sync_running_stats(network)
        if self.teacher is not None and self.teacher_when == "after_step":
            self.teacher.update(network)
        elif self.teacher is not None and self.teacher_when == "by_method":
            self.teacher.settle()

        self.meters.add(loss, unlabeled.truth_B if unlabeled else None, self.clock.tensors.step)
        self.clock.tick_tensors()
        return loss

    def _optimizer_step(self) -> None:
        """Clip and step; under fp16 through Accelerate's loss scaler, which skips updates whose gradients overflowed."""
        scaler = self.accelerator.scaler
        if self.clip_norm > 0:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            clip_grad(self.optimizer, self.clip_norm)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
