"""The contract between a method and the house: what a method declares and what it may be asked to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fastssl.types import Batch, HeadSpec, Loss, Task, View, Views

Forward = Callable[..., Any]
"""``student(a)`` -> Out; ``student(a, b)`` -> (Out, Out) from ONE joint forward (one BatchNorm batch); separate calls = separate statistics."""


class Method(nn.Module):
    """A semi-supervised objective: it turns views into a loss and keeps its state in registered buffers.

    A subclass owns one file, declares ``Config`` (frozen dataclass, every published quirk a named field) and implements ``views``
    and ``forward``.  It never touches devices, data, the network's internals or the host: no ``.item()``, no boolean-mask indexing.
    """

    @dataclass(frozen=True)
    class Config:
        pass

    needs_unlabeled: ClassVar[bool] = True
    moves_teacher: ClassVar[bool] = False
    """Whether the method itself moves the teacher's average; ``teacher.when=by_method`` is refused otherwise."""

    def __init__(self, config: Any, task: Task):
        super().__init__()
        self.config = config
        self.task = task

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        """View name -> what to render. The order is the memory order: list views that are forwarded together next to each other."""
        raise NotImplementedError

    @staticmethod
    def heads(config: Any, task: Task) -> dict[str, HeadSpec]:
        """Extra heads that the network builder makes on student and teacher."""
        return {}

    @staticmethod
    def needs_teacher(config: Any) -> bool:
        """Whether ``forward`` calls the teacher (an EMA kept only for evaluation does not count)."""
        return False

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: Forward | None) -> Loss:
        raise NotImplementedError

    def after_backward(self, batch: Batch) -> None:
        """Write banks and priors, after the gradients exist and before the optimiser moves."""

    def on_epoch_start(self, epoch: int) -> None:
        """In-place writes at the start of epoch ``epoch`` (0-based)."""

    def on_epoch_end(self, epoch: int) -> None:
        """In-place writes after the last step of epoch ``epoch``."""


