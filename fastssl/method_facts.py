"""What there is to say about a method, found out from its file and by running it: views, state, options, and forwards per image.

Forwards are counted, not declared: the method takes one step on random images with a small network, and every view that student or teacher is given is
noted. A method that forwards images of its own making (mixed or perturbed ones) is noted by their number.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastssl import methods
from fastssl.engine.draws import MethodDraws
from fastssl.methods.base import Method
from fastssl.models.joint import NetworkForward
from fastssl.models.zoo import build_network
from fastssl.recipe import describe_config
from fastssl.recipe_values import show
from fastssl.schema import ModelConfig
from fastssl.types import Batch, ClockTensors, RawBatch, StreamBatch, Task, View, Views

ROWS = {"labeled": 3, "unlabeled": 7}  # no multiple of each other, so that rows tell their stream
CLASSES, SIDE = 5, 8
SIZES = {"K": CLASSES, "N_l": 13, "N_u": 17}


@dataclass(frozen=True)
class Cost:
    """Forwards per image of the batch at each update: student with and without gradient, teacher; labelled and unlabelled images.

    ``once``: teacher forwards per unlabelled image once before training.
    """

    student_labeled: float = 0
    student_unlabeled: float = 0
    student_free_labeled: float = 0
    student_free_unlabeled: float = 0
    teacher_labeled: float = 0
    teacher_unlabeled: float = 0
    once: float = 0


@dataclass(frozen=True)
class Option:
    """A field of a method's Config."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Facts:
    """A method at one Config. ``state``: buffer -> shape in letters (K classes, N_l and N_u images of the lists, B_l and B_u of the batches)."""

    name: str
    paper: str
    text: str
    views: dict[str, str]
    heads: dict[str, str]
    state: dict[str, str]
    reads_teacher: bool
    moves_teacher: bool
    options: tuple[Option, ...]
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def facts_of(name: str, config: Any = None) -> Facts:
    """Facts of method ``name`` at ``config`` (default: its own defaults)."""
    method_class = methods.get(name)
    config = method_class.Config() if config is None else config
    text = inspect.getdoc(method_class) or ""
    views = method_class.views(config)
    method = method_class(config, _task())
    heads = {head: f"{spec.kind}{', on request' if spec.on_request else ''}" for head, spec in method_class.heads(config, method.task).items()}
    return Facts(
        name,
        text.split("\n", 1)[0],
        text,
        {view: _describe(wish) for view, wish in views.items()},
        heads,
        {buffer: _shape(tensor) for buffer, tensor in method.state_dict().items()},
        bool(method_class.needs_teacher(config)),
        bool(method_class.moves_teacher),
        options_of(config, text),
        forwards_of(method),
    )


def options_of(config: Any, text: str) -> tuple[Option, ...]:
    """The fields of ``config`` with their meaning: the comment behind the field, else its entry in the class's text."""
    infos = {info.key.removeprefix("method."): info for info in describe_config(type(config)())}
    return tuple(Option(name, info.type, show(info.default), info.help or _entry(name, text)) for name, info in infos.items())


def forwards_of(method: Method) -> Cost:
    """Count one step of ``method``, whose task must have the batches of :data:`ROWS`."""
    torch_state = torch.get_rng_state()
    try:
        return _count(method)
    finally:
        torch.set_rng_state(torch_state)


class _Counting(NetworkForward):
    """A network that notes what it is given."""

    def __init__(self, network: Any, rows: Mapping[int, str], teacher: bool):
        super().__init__(network)
        self.rows, self.teacher = rows, teacher
        self.seen: dict[tuple[str, str], int] = {}

    def __call__(self, *views: Tensor) -> Any:
        free = self.teacher or not torch.is_grad_enabled()
        who = "teacher" if self.teacher else "student_free" if free else "student"
        for view in views:
            stream = self.rows.get(view.data_ptr()) or ("labeled" if len(view) % ROWS["labeled"] == 0 else "unlabeled")
            self.seen[who, stream] = self.seen.get((who, stream), 0) + len(view)
        with torch.set_grad_enabled(not free):
            return super().__call__(*views)

    def head(self, name: str, *feats: Tensor) -> Any:
        with torch.set_grad_enabled(not self.teacher and torch.is_grad_enabled()):
            return super().head(name, *feats)

    def follow(self) -> None:
        """The average would move here."""


def _count(method: Method) -> Cost:
    torch.manual_seed(0)
    wishes = method.views(method.config)
    streams = [s for s in ROWS if any(view.stream == s for view in wishes.values())]
    images = {name: torch.randn(ROWS[view.stream], 3, SIDE, SIDE) for name, view in wishes.items() if view.each_step}
    views = Views(images)
    raw = {}
    for stream in streams:
        raw[stream] = RawBatch.allocate(ROWS[stream], 1, 1)
        for ids in (raw[stream].row_B, raw[stream].index_B, raw[stream].draw_B):
            ids.copy_(torch.arange(ROWS[stream]))
    raw["labeled"].label_B.copy_(torch.arange(ROWS["labeled"]) % CLASSES)
    clock = ClockTensors(torch.tensor(4), torch.tensor(2))
    batch = Batch(StreamBatch.of(raw["labeled"]), StreamBatch.of(raw["unlabeled"]) if "unlabeled" in raw else None, clock)
    batch.draws = MethodDraws(method.draws(method.config, method.task), wishes, seed=0, device=torch.device("cpu"))(raw, views, clock.step)
    heads = method.heads(method.config, method.task)
    network = build_network(ModelConfig("small_cnn", {"width": 4, "layers": 2}), in_channels=3, num_classes=CLASSES, heads=heads)
    rows = {tensor.data_ptr(): wishes[name].stream for name, tensor in images.items()}
    student, teacher = _Counting(network.train(), rows, False), _Counting(network, rows, True)
    method(views, batch, student, teacher if method.needs_teacher(method.config) else None)
    seen = {**student.seen, **teacher.seen}
    shares = {f"{who}_{stream}": count / ROWS[stream] for (who, stream), count in seen.items()}
    shares["once"] = sum(not view.each_step for view in wishes.values())
    return Cost(**{f.name: shares.get(f.name, 0) for f in fields(Cost)})


def _task() -> Task:
    labels = tuple(i % CLASSES for i in range(SIZES["N_l"]))
    return Task(
        num_classes=CLASSES,
        num_labeled=SIZES["N_l"],
        num_unlabeled=SIZES["N_u"],
        labeled_class_counts=tuple(labels.count(c) for c in range(CLASSES)),
        labeled_batch=ROWS["labeled"],
        unlabeled_batch=ROWS["unlabeled"],
        total_steps=10,
        steps_per_epoch=2,
        labeled_labels=labels,
    )


def _describe(view: View) -> str:
    size = "" if view.size is None else f", {view.size} px"
    return f"{view.stream} {view.policy}{size}{'' if view.each_step else ', once before training'}"


def _shape(tensor: Tensor) -> str:
    """``[N_l, 128]``; a whole multiple of the unlabelled batch or of the classes is written as such."""
    letters = {size: letter for letter, size in SIZES.items()}

    def letter(size: int) -> str:
        if size in letters:
            return letters[size]
        for name, unit in (("B_u", ROWS["unlabeled"]), ("K", CLASSES)):
            if size > 20 and size % unit == 0:
                return f"{size // unit} {name}"
        return "K + 1" if size == CLASSES + 1 else str(size)

    return f"[{', '.join(map(letter, tensor.shape))}]" if tensor.dim() else "scalar"


def _entry(name: str, text: str) -> str:
    """The entry ``  name   meaning`` of a docstring, with the lines that go on below it; "" if there is none."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        match = re.match(rf"^(\s+)(?:\w+, )*{re.escape(name)}(?:, \w+)*(?::|\s{{2,}})\s*(\S.*)$", line)
        if match:
            parts = [match[2]]
            for below in lines[number + 1 :]:
                if not below.strip() or len(below) - len(below.lstrip()) <= len(match[1]):
                    break
                parts.append(below.strip())
            return re.sub(r"\s{2,}", " ", " ".join(parts))
    return ""
