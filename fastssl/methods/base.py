"""The contract between a method and the house: what a method declares and what it may be asked to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from fastssl.types import Batch, Draw, HeadSpec, Loss, Out, Task, View, Views


class Forward(Protocol):
    """A network as a method sees it. The teacher's answers carry no gradient."""

    def __call__(self, *views: Tensor) -> Any:
        """``net(a)`` -> Out; ``net(a, b)`` -> (Out, Out) from ONE joint forward (one BatchNorm batch); separate calls = separate statistics."""

    def head(self, name: str, *feats: Tensor) -> Any:
        """Apply an on-request head to features: one tensor -> one tensor, several -> a tuple from ONE joint forward (one BatchNorm batch)."""

    def untracked(self, *views: Tensor) -> Any:
        """The same answer as ``net(...)``, gradients included, but BatchNorm's running statistics stay as they are."""


class TeacherForward(Forward, Protocol):
    """The teacher; ``follow`` moves its average towards the student at once (methods with ``moves_teacher``, under ``teacher.when=by_method``)."""

    def follow(self) -> None: ...


Predict = Callable[[str], Iterator[tuple[Tensor, Out]]]
"""``predict(view)`` yields (index_B, Out) with each row of the view's stream exactly once: the TEACHER in eval mode, no gradient, one draw of the view."""


class Method(nn.Module):
    """A semi-supervised objective: it turns views into a loss and keeps its state in registered buffers.

    A subclass owns one file, declares ``Config`` (frozen dataclass, every published quirk a named field) and implements ``views``
    and ``forward``.  It never touches devices, data, the network's internals or the host: no ``.item()``, no boolean-mask indexing.

    ``Loss.total`` of a rank is scaled so that the mean over ranks is the spec's formula on the GLOBAL batch: means over rows need nothing (ranks hold
    equally many rows), sums over rows times the world size, data-dependent denominators and statistics through ``fastssl.parallel`` first.
    Buffers are replicated: write them from rows gathered over ranks, so that every rank holds the same.
    What ``forward`` must hand to ``after_backward`` goes through :meth:`keep` and :meth:`kept`.
    """

    @dataclass(frozen=True)
    class Config:
        pass

    needs_unlabeled: ClassVar[bool] = True
    moves_teacher: ClassVar[bool] = False
    """Whether the method itself moves the teacher's average; ``teacher.when=by_method`` is refused otherwise."""
    labeled_rows: ClassVar[Literal["split", "all"]] = "split"
    """"all": every row of the split's dataset is labelled with its true label (the oracle)."""
    uncapturable: ClassVar[str] = ""
    """Why an update cannot be recorded as a graph; empty = it can."""

    def __init__(self, config: Any, task: Task):
        super().__init__()
        self.config = config
        self.task = task
        self._kept: dict[str, Tensor] = {}

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        """View name -> what to render. The order is the memory order: list views that are forwarded together next to each other."""
        raise NotImplementedError

    @staticmethod
    def heads(config: Any, task: Task) -> dict[str, HeadSpec]:
        """Extra heads that the network builder makes on student and teacher."""
        return {}

    @staticmethod
    def draws(config: Any, task: Task) -> dict[str, Draw]:
        """Random numbers of each step, found in ``batch.draws`` under the same names."""
        return {}

    @staticmethod
    def needs_teacher(config: Any) -> bool:
        """Whether ``forward`` calls the teacher (an EMA kept only for evaluation does not count)."""
        return False

    @staticmethod
    def frozen(config: Any) -> tuple[str, ...]:
        """Regular expressions of network parameters that are never trained (beside ``optim.freeze``); ``backbone`` frozen also means its eval mode."""
        return ()

    @staticmethod
    def predict(config: Any, out: Out) -> Tensor:
        """Logits [N, K] that evaluation scores."""
        return out.logits_NC

    def prepare(self, predict: Predict) -> None:
        """Called once before the first update of a fresh run (never after a resume): fill buffers from predictions of the starting teacher."""

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        raise NotImplementedError

    def after_backward(self, batch: Batch) -> None:
        """Write banks and priors, after the gradients exist and before the optimiser moves."""

    def on_epoch_start(self, epoch: int) -> None:
        """In-place writes at the start of epoch ``epoch`` (0-based)."""

    def on_epoch_end(self, epoch: int) -> None:
        """In-place writes after the last step of epoch ``epoch``."""

    def keep(self, **tensors: Tensor) -> None:
        """Hold detached tensors of this step for ``after_backward``; no state: never saved, overwritten at the next step."""
        self._kept = {name: tensor.detach() for name, tensor in tensors.items()}

    def kept(self, name: str) -> Tensor:
        """What :meth:`keep` holds."""
        return self._kept[name]


def check_range(config: Any, *names: str, low: float = 0.0, high: float = math.inf) -> None:
    """For a Config's ``__post_init__``: ValueError that names the field, its value and the range unless low <= value <= high for every named field."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ValueError(f"{name} = {value} must be {f'at least {low:g}' if high == math.inf else f'in [{low:g}, {high:g}]'}")


def check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """The same for a field that must be one of a few words."""
    if getattr(config, name) not in choices:
        raise ValueError(f"{name} = {getattr(config, name)!r} must be one of {', '.join(choices)}")
