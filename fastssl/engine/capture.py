"""The whole update as one graph: the first updates run eagerly, then one is recorded, and from then on the recording is replayed.

What a recording holds is the work on the device with every number of the host as it was: rates, clock, draws and images must therefore lie in tensors that
keep their place.  The batch is copied into such tensors before each replay; :class:`CapturedUpdate` raises when something else moved.  Who records is a
:class:`Backend`: CUDA graphs (:mod:`fastssl.engine.graphs`), or a tape of operations on a CPU (:mod:`fastssl.engine.tape`) that proves the same without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastssl.engine.graphs import CudaGraphs
from fastssl.engine.optim import optimizer_tensors, set_lr
from fastssl.engine.step import Updater
from fastssl.errors import RecipeError, TrainingError
from fastssl.methods import get as get_method
from fastssl.schema import Recipe
from fastssl.types import Loss, RawBatch

WARM = 3  # eager updates before the recording: real training, in which everything lazy comes into being
CHECK_EVERY = 64  # replays between two looks at what the recording takes for granted; epochs begin with one too


class Recorded(Protocol):
    """Work that can be done again. ``pending``: recording it did not do it."""

    result: Any
    pending: bool

    def replay(self) -> None: ...


class Backend(Protocol):
    """Who records. ``aside`` is where work belongs that prepares a recording."""

    def aside(self) -> AbstractContextManager[Any]: ...

    def record(self, work: Callable[[], Any]) -> Recorded: ...


@dataclass(frozen=True)
class Capture:
    """Whether updates are recorded, with the sentence for the log; ``asked``: by train.capture = on, so that a failure ends the run."""

    graph: bool
    reason: str
    asked: bool = False


def decide_capture(wish: str, device: torch.device, world: int, *, scaled: bool = False, uncapturable: str = "") -> Capture:
    """How updates run, for ``train.capture`` = ``wish``: ``auto``, ``on`` or ``off``.

    ``scaled``: an fp16 loss scaler is at work.  ``uncapturable``: the method's own reason against a recording, empty for none.
    Raises :class:`RecipeError` for ``on`` where updates cannot be recorded, since running something else than asked would be a lie.
    """
    if wish == "off":
        return Capture(False, "updates run eagerly (train.capture: off)")
    against = ""
    if device.type != "cuda":
        against = f"CUDA graphs need a CUDA device, this is {device.type!r}"
    elif world > 1:
        against = f"recording with {world} processes has not been proven"
    elif scaled:
        against = "the fp16 loss scaler decides on the host; bf16 needs none"
    elif uncapturable:
        against = f"the method cannot be recorded: {uncapturable}"
    if against and wish == "on":
        raise RecipeError(f"train.capture: on: {against}; use 'auto' or 'off', both run eagerly here")
    if against:
        return Capture(False, f"updates run eagerly ({against})")
    return Capture(True, f"updates are recorded as one CUDA graph after {WARM} eager ones", asked=wish == "on")


def capture_of(recipe: Recipe, accelerator: Any) -> Capture:
    """Whether this run's updates are recorded. Raises :class:`RecipeError` where train.capture asks for what cannot be."""
    scaled, against = accelerator.scaler is not None, get_method(recipe.method.name).uncapturable
    return decide_capture(recipe.train.capture, accelerator.device, accelerator.num_processes, scaled=scaled, uncapturable=against)


class CapturedUpdate:
    """Called like an :class:`Updater`: ``warm`` eager updates, one recording, then replays.

    The loss it returns is detached; after the recording it is the same tensors each time, overwritten by the next call.
    Checkpoints, evaluations and epoch hooks may run between calls: they read and write the state in place.  Whoever resumes makes a new one.
    ``asked``: a failed recording raises TrainingError; otherwise ``note`` gets one line and updates go on eagerly.
    """

    def __init__(self, updater: Updater, backend: Backend, *, warm: int = WARM, asked: bool = True, note: Callable[[str], None] = print):
        self.updater, self.backend, self.warm, self.asked, self.note = updater, backend, max(1, warm), asked, note
        self.recorded: Recorded | None = None
        self.gave_up = False
        self._done = 0
        self._raw: dict[str, RawBatch] = {}
        self._standing: dict[str, Any] = {}

    def __call__(self, raw: Mapping[str, RawBatch], step: int) -> Loss:
        """Update number ``step`` (0-based). Raises :class:`TrainingError`, with both values, if a shape, dtype, place or setting is not the recorded one."""
        self._take(raw, step)
        set_lr(self.updater.optimizer, self.updater.learning_rate(step))
        loss = self._update(step)
        self.updater.clock.tick_host()
        self._done += 1
        return loss

    def _update(self, step: int) -> Loss:
        if self.recorded is None and (self.gave_up or self._done < self.warm or not self._record()):
            with self.backend.aside():
                return detached(self.updater.update(self._raw))
        recorded = self.recorded
        assert recorded is not None
        if self._done % CHECK_EVERY == 0 or step % self.updater.clock.steps_per_epoch == 0:
            self.check()
        if recorded.pending:
            recorded.replay()
        recorded.pending = True  # a recording that did the work did it once
        return recorded.result

    def check(self) -> None:
        """Raise :class:`TrainingError` if anything that the recording takes for granted is not as it was."""
        now = standing(self.updater)
        for name in sorted(self._standing.keys() | now.keys()):
            was, found = self._standing.get(name, "not there"), now.get(name, "not there")
            if was != found:
                raise TrainingError(f"{name} changed under the recorded update: recorded with {was}, now {found}; train.capture=off runs without a recording")

    # --- parts ----------------------------------------------------------------------------------------------------------------------------

    def _take(self, raw: Mapping[str, RawBatch], step: int) -> None:
        """Copy the batch to where the recording reads it. The feed's buffers rotate; it orders their reuse behind this very copy."""
        if not self._raw:
            self._raw = {name: RawBatch.allocate(*batch.pixels_BHWC.shape, device=batch.pixels_BHWC.device) for name, batch in raw.items()}
        if raw.keys() != self._raw.keys():
            raise TrainingError(f"update {step}: streams {sorted(raw)} arrived, the recorded update reads {sorted(self._raw)}")
        for stream, batch in raw.items():
            for name, slot in self._raw[stream].tensors().items():
                given = getattr(batch, name)
                if (given.shape, given.dtype) != (slot.shape, slot.dtype):
                    here, there = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (given, slot))
                    raise TrainingError(f"update {step}: {stream}.{name} is {here}, the recorded update reads {there}; batches must keep one shape")
            self._raw[stream].copy_(batch, non_blocking=True)

    def _record(self) -> bool:
        """Record the update. False, after a note, where that fails and nobody insisted."""
        updater = self.updater
        before, sums = standing(updater), dict(updater.meters.sums)
        try:
            recorded = self.backend.record(lambda: detached(updater.update(self._raw)))
        except Exception as cause:
            failure = f"{type(cause).__name__}: {cause}".splitlines()[0]
            message = f"the update cannot be recorded as a graph ({failure})"
            if self.asked:
                raise TrainingError(f"{message}; train.capture=off runs without a recording") from cause
            # What was made while recording lies in memory that goes with the recording.
            updater.optimizer.zero_grad(set_to_none=True)
            updater.meters.sums = sums
            self.gave_up = True
            self.note(f"WARNING: {message}; updates go on eagerly")
            return False
        self.recorded, self._standing = recorded, before
        self.check()  # what came into being in the recording would be made anew by each replay
        return True


def update_of(updater: Updater, capture: Capture, note: Callable[[str], None] = print) -> Updater | CapturedUpdate:
    """What to call for each update: the updater itself, or its recording in CUDA graphs."""
    if not capture.graph:
        return updater
    return CapturedUpdate(updater, CudaGraphs(updater.accelerator.device), asked=capture.asked, note=note)


class ReplayedForward:
    """Evaluation's forward passes: ``self(key, work)`` does ``work`` eagerly at its first call, then records it, then replays.

    ``work`` must read and write the same tensors at each call under one key; the answer is overwritten by the next call under that key.
    """

    def __init__(self, backend: Backend, note: Callable[[str], None] = print):
        self.backend, self.note = backend, note
        self._known: dict[Any, Recorded | None] = {}

    def __call__(self, key: Any, work: Callable[[], Tensor]) -> Tensor:
        if key not in self._known:
            self._known[key] = None
            with self.backend.aside():
                return work()
        recorded = self._known[key]
        if recorded is None:
            try:
                recorded = self._known[key] = self.backend.record(work)
            except Exception as cause:
                self.note(f"WARNING: evaluation cannot be recorded as a graph ({type(cause).__name__}: {cause}); it goes on eagerly".splitlines()[0])
                recorded = self._known[key] = _Eager(work)
        if recorded.pending:
            recorded.replay()
        recorded.pending = True
        return recorded.result


class _Eager:
    """Work that is simply done again."""

    def __init__(self, work: Callable[[], Tensor]):
        self.work, self.pending = work, True
        self.result: Any = None

    def replay(self) -> None:
        self.result = self.work()


def detached(loss: Loss) -> Loss:
    """The same figures without the way back, which would keep an update's autograd graph alive."""
    return Loss(loss.total.detach(), {name: part.detach() for name, part in loss.parts.items()}, loss.pseudo)


def standing(updater: Updater) -> dict[str, Any]:
    """Everything that a recording takes for granted, by name: places, shapes and dtypes of tensors, modes of modules, numbers of the host."""
    inner, teacher = updater.train_module, updater.teacher
    found: dict[str, Any] = {}

    def tensor(name: str, t: Tensor) -> None:
        trained = ", trained" if t.requires_grad else ""
        found[name] = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} at {t.data_ptr():#x}{trained}"

    parts = {"network": inner.network, "method": inner.method, **({"teacher": teacher} if teacher is not None else {})}
    for part, module in parts.items():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            tensor(f"{part}: {name}", t)
        for name, child in module.named_modules():
            found[f"mode of {part}: {name or 'itself'}"] = "training" if child.training else "evaluation"
    for name, t in optimizer_tensors(updater.optimizer).items():
        tensor(f"optimizer: {name}", t)
    for n, group in enumerate(updater.optimizer.param_groups):
        tensor(f"optimizer: rate of group {n}", group["lr"])
        found.update({f"optimizer: {k} of group {n}": v for k, v in group.items() if k not in ("params", "param_names", "lr", "lr_factor")})
    for name, t in (*updater.meters.sums.items(), ("first bad step", updater.meters.first_bad_step)):
        tensor(f"meter: {name}", t)
    for name, t in updater.renderer.buffers.items():
        tensor(f"view: {name}", t)
    tensor("clock: step", updater.clock.tensors.step)
    tensor("clock: epoch", updater.clock.tensors.epoch)
    found["optim.clip_norm"], found["teacher.when"] = updater.clip_norm, updater.teacher_when
    found["train.precision"], found["method's settings"] = updater.accelerator.mixed_precision, repr(inner.method.config)
    return found
