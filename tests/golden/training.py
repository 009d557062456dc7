"""Drives a recorded training: a small network through real updates with the project's own optimiser and rate law, under the recorded names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.engine.clock import LearningRate
from fastssl.engine.optim import build_optimizer, set_lr
from fastssl.methods.base import Method
from fastssl.models.ema import Teacher
from fastssl.models.joint import joint_forward, joint_head
from fastssl.models.network import Network
from fastssl.schema import OptimConfig, ScheduleConfig
from fastssl.types import Batch, Loss, Out, Views
from tests.golden.recorder import Recorder

TOLERANCE = 1e-5
FLOOR = 0.1  # in float32 a layer's outputs and gradients are sums of terms that cancel: an entry below a tenth of the largest is measured against that tenth


class Probe:
    """A network as a method sees it, which remembers its answers.

    By view name: ``outs``, the last answer, and ``first_outs``. By head name: ``heads``, one tensor per feature tensor.
    """

    def __init__(self, network: Any, names: Mapping[int, str], teacher: Teacher | None = None):
        self.network, self.names, self.teacher = network, names, teacher
        self.outs: dict[str, Out] = {}
        self.first_outs: dict[str, Out] = {}
        self.heads: dict[str, list[Tensor]] = {}

    def __call__(self, *views: Tensor) -> Any:
        answer = self.teacher(*views) if self.teacher is not None else joint_forward(self.network, *views)
        for view, out in zip(views, (answer,) if len(views) == 1 else answer, strict=True):
            retain(out.logits_NC)
            self.outs[self.names[id(view)]] = out
            self.first_outs.setdefault(self.names[id(view)], out)
        return answer

    def head(self, name: str, *feats: Tensor) -> Any:
        answer = joint_head(self.network, name, *feats)
        self.heads[name] = [answer] if len(feats) == 1 else list(answer)
        for tensor in self.heads[name]:
            retain(tensor)
        return answer

    def follow(self) -> None:
        assert self.teacher is not None
        self.teacher.follow()


class Training:
    """A recorded training: the network with its recorded start, its optimiser, and what came out of each step.

    ``names``: recorded name prefix -> prefix in ``network``; ``slow``: recorded prefixes at a tenth of the rate.
    """

    def __init__(self, rec: Recorder, network: Network, names: Mapping[str, str], slow: Sequence[str], lr: float, schedule: ScheduleConfig):
        self.rec, self.network = rec, network.to(rec.device)
        self.names = dict(sorted(names.items(), key=lambda pair: -len(pair[0])))
        self.recorded = [name.removeprefix("init.") for name in rec.names("init.")]
        self.network.load_state_dict({self.ours(name): rec.input(f"init.{name}") for name in self.recorded})
        config = OptimConfig(
            lr=lr,
            momentum=rec.hp("momentum"),
            weight_decay=rec.hp("weight_decay"),
            no_decay=[],
            lr_factors={"^" + self.ours(prefix).replace(".", r"\.") + r"\.": 0.1 for prefix in slow},
        )
        self.optimizer = build_optimizer(self.network, config, torch.tensor(lr, device=rec.device))
        self.learning_rate = LearningRate(schedule, lr, total_steps=10**6, steps_per_epoch=10**6)
        self.out: dict[str, list[Tensor]] = defaultdict(list)

    def ours(self, name: str) -> str:
        for prefix, ours in self.names.items():
            if name == prefix or name.startswith(prefix + "."):
                return ours + name.removeprefix(prefix)
        raise ValueError(f"no place for the recorded {name!r}")

    def rate(self, prefix: str) -> Tensor:
        """The rate that parameters under a recorded prefix have now."""
        ours = self.ours(prefix) + "."
        found = [g["lr"] for g in self.optimizer.param_groups for name in g["param_names"] if name.startswith(ours)]
        if not found or any(lr is not found[0] for lr in found):
            raise ValueError(f"{prefix}: not one rate but {found}")
        return found[0].clone()

    def update(self, method: Method, views: Views, batch: Batch, step: int, student: Probe, teacher: Any = None) -> Loss:
        """One update as the engine does it, up to the optimiser's step; notes gradients and rates."""
        set_lr(self.optimizer, self.learning_rate(step))
        loss = method(views, batch, student, teacher)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        method.after_backward(batch)
        for name in self.recorded:
            if f"grad.{name}" in self.rec.arrays:
                grad = self.network.get_parameter(self.ours(name)).grad
                assert grad is not None, name
                self.note(**{f"grad.{name}": grad})
        self.optimizer.step()
        return loss

    def note(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.out[name].append(value.detach().clone())

    def note_state(self, prefix: str, network: nn.Module) -> None:
        state = network.state_dict()
        self.note(**{f"{prefix}.{name}": state[self.ours(name)] for name in self.recorded})

    def check(self, state_tolerance: float = TOLERANCE) -> None:
        """Compare what was noted: stacks over steps, or the last one where the file holds one (``final``)."""
        for name, values in self.out.items():
            stacked = values[-1] if name.startswith("final") else torch.stack(values)
            is_state = name.split(".")[0] in ("student", "teacher", "final", "final_q", "final_k")
            self.rec.check(name, stacked, state_tolerance if is_state else TOLERANCE, self._floor(name))

    def _floor(self, name: str) -> float:
        """A bias in front of BatchNorm has no gradient but rounding: parameter gradients are measured against the largest one of their layer."""
        if not name.startswith("grad."):
            return FLOOR
        layer = [self.rec.arrays[other] for other in self.rec.names(name.rpartition(".")[0] + ".")]
        largest, own = max(float(abs(array).max()) for array in layer), float(abs(self.rec.arrays[name]).max())
        return FLOOR * largest / own if own else FLOOR


def retain(tensor: Tensor) -> None:
    """Keep the gradient of a tensor that is no leaf."""
    if tensor.requires_grad:
        tensor.retain_grad()
