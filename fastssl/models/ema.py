"""The teacher: an exponential moving average of the student, with its policy as data (momentum law, buffers, mode, start).

Mean Teacher (Tarvainen & Valpola, NeurIPS 2017); EMAN (Cai et al., CVPR 2021) for averaged BatchNorm statistics.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.errors import RecipeError
from fastssl.models.checkpoints import load_network
from fastssl.models.joint import joint_forward, joint_head
from fastssl.models.norm import running_stats_kept, sync_running_stats
from fastssl.models.shuffle import shuffled_forward, shuffled_head
from fastssl.schema import TeacherConfig

LAWS = ("constant", "warmup", "cosine")
BUFFERS = ("leave", "copy", "average", "copy_matching")
COSINE_LIMIT = 0.996  # above this the published SimMatchV2 code keeps the momentum constant


def teacher_momentum(law: str, momentum: float, k: int, total_steps: int) -> float:
    """Weight of the old average in update ``k`` (1-based) of ``total_steps``; ``momentum`` in [0, 1].

    constant: m.   warmup: min(m, 1 - 1/k), so that update 1 copies the student (Mean Teacher).
    cosine: 1 - (1-m) (cos(pi k/T) + 1)/2, from m to 1 at the end; m above 0.996 stays constant (SimMatchV2's released code).
    """
    _check_law(law)
    if law == "warmup":
        return min(momentum, 1 - 1 / k)
    if law == "cosine" and momentum <= COSINE_LIMIT:
        return 1 - (1 - momentum) * (math.cos(math.pi * k / total_steps) + 1) / 2
    return momentum


class Teacher(nn.Module):
    """A frozen copy of ``network`` that follows the student: ``teacher' = m teacher + (1 - m) student`` in the weights' own precision.

    ``cfg.buffers``: "leave" never touches the teacher's buffers after the start; "copy" takes the student's; "average" averages floating
    buffers like weights and copies integer ones (EMAN); "copy_matching" copies those whose dotted name contains a match of ``buffers_matching``.
    ``cfg.start``: "copy", or a weights file whose teacher never moves.  ``teacher.train()`` puts the network in ``cfg.mode`` (the mode of a
    method's teacher forward), ``teacher.eval()`` in evaluation mode.  ``cfg.shuffle``: in train mode its rows are normalised in other BatchNorm groups than
    the student's (models/shuffle.py).  State: the network's under ``network.`` and the number of updates.
    An update is free of host syncs, reads its momentum from the device, and so can be captured and replayed.
    """

    updates: Tensor

    def __init__(self, network: nn.Module, cfg: TeacherConfig, total_steps: int):
        super().__init__()
        _check_law(cfg.momentum_law)
        if not 0 <= cfg.momentum <= 1:
            raise RecipeError(f"teacher.momentum is {cfg.momentum}; it must lie in [0, 1]")
        if cfg.buffers not in BUFFERS:
            raise RecipeError(f"teacher.buffers is {cfg.buffers!r}; it must be one of {', '.join(BUFFERS)}")
        if cfg.mode not in ("train", "eval"):
            raise RecipeError(f"teacher.mode is {cfg.mode!r}; it must be train or eval")
        self.cfg = cfg
        self.total_steps = total_steps
        self._student: list[nn.Module] = []
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.frozen = cfg.start != "copy"
        if self.frozen:
            load_network(self.network, cfg.start)
        names = [name for name, _ in self.network.named_buffers()]
        self._copied = set(_matching(cfg.buffers_matching, names)) if cfg.buffers == "copy_matching" else set(names)
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        self.train()

    def train(self, mode: bool = True) -> Teacher:
        """Mode of the teacher; in training the network runs in the configured mode, not the student's."""
        super().train(mode)
        self.network.train(mode and self.cfg.mode == "train")
        return self

    @torch.no_grad()
    def forward(self, *views: Tensor) -> Any:
        """Outs of the teacher for one or more views (one joint forward), without gradient."""
        return shuffled_forward(self.network, *views) if self._shuffles() else joint_forward(self.network, *views)

    @torch.no_grad()
    def head(self, name: str, *feats: Tensor) -> Any:
        """An on-request head of the teacher on features, without gradient."""
        return shuffled_head(self.network, name, *feats) if self._shuffles() else joint_head(self.network, name, *feats)

    def untracked(self, *views: Tensor) -> Any:
        """Like ``forward``, with BatchNorm's running statistics left alone in train mode too."""
        with running_stats_kept(self.network):
            return self(*views)

    def _shuffles(self) -> bool:
        return self.cfg.shuffle and self.network.training

    def bind(self, student: nn.Module) -> Teacher:
        """Say whom :meth:`follow` follows."""
        self._student = [student]  # in a list: the student is no part of the teacher's state
        return self

    def follow(self) -> None:
        """Move towards the bound student once (methods that move the teacher themselves)."""
        if self.cfg.when == "by_method":
            self.update(self._student[0])

    def momentum(self) -> Tensor:
        """Momentum of the update numbered ``self.updates`` as a float64 scalar on the device; equals :func:`teacher_momentum`."""
        m, k = self.cfg.momentum, self.updates.to(torch.float64)
        if self.cfg.momentum_law == "warmup":
            return (1 - 1 / k).clamp(max=m)
        if self.cfg.momentum_law == "cosine" and m <= COSINE_LIMIT:
            return 1 - (1 - m) * (torch.cos(math.pi * k / self.total_steps) + 1) / 2
        return torch.full_like(k, m)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move towards ``student`` (the same architecture) once; a frozen teacher keeps its weights. Call on every rank."""
        self.settle()
        if self.frozen:
            return
        self.updates.add_(1)
        averaged, copied = _pairs(self.network.parameters(), student.parameters()), []
        if self.cfg.buffers != "leave":
            for (name, mine), (_, theirs) in zip(self.network.named_buffers(), student.named_buffers(), strict=True):
                if self.cfg.buffers == "average" and mine.is_floating_point():
                    averaged.append((mine, theirs))
                elif name in self._copied:
                    copied.append((mine, theirs))
        self._average(averaged)
        for dtype in {mine.dtype for mine, _ in copied}:  # one fused copy for each dtype
            group = [pair for pair in copied if pair[0].dtype == dtype]
            torch._foreach_copy_([mine for mine, _ in group], [theirs for _, theirs in group])

    @torch.no_grad()
    def settle(self) -> None:
        """Make the ranks equal again: in train mode the teacher's own forwards move its BatchNorm statistics, on each rank by other rows."""
        if self.cfg.mode == "train":
            sync_running_stats(self.network)

    def _average(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        m = self.momentum()
        for dtype in {mine.dtype for mine, _ in pairs}:
            mine = [a for a, _ in pairs if a.dtype == dtype]
            theirs = [b for a, b in pairs if a.dtype == dtype]
            # m a + (1-m) b rather than lerp: with m = 0 it is the student exactly, and m may be a device scalar.
            share = torch._foreach_mul(theirs, (1 - m).to(dtype))
            torch._foreach_mul_(mine, m.to(dtype))
            torch._foreach_add_(mine, share)


def _pairs(mine: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    return list(zip(mine, theirs, strict=True))


def _matching(pattern: str, names: list[str]) -> list[str]:
    try:
        found = [name for name in names if pattern and re.search(pattern, name)]
    except re.error as error:
        raise RecipeError(f"teacher.buffers_matching is {pattern!r}, which is no regular expression: {error}") from None
    if not found:
        raise RecipeError(f"teacher.buffers is copy_matching, but teacher.buffers_matching {pattern!r} matches none of the {len(names)} buffer names "
                          f"(for example {', '.join(names[:3]) or 'there are none'})")  # fmt: skip
    return found


def _check_law(law: str) -> None:
    if law not in LAWS:
        raise RecipeError(f"teacher.momentum_law is {law!r}; it must be one of {', '.join(LAWS)}")
