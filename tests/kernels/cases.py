"""What training would launch, one call per case, with tensors that are never read: for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.kernels import triton_instance as instance
from fastssl.kernels import triton_pseudo_label_ce as pseudo
from fastssl.kernels import triton_sgd_ema as sgd
from fastssl.kernels import triton_soft_ce as soft_ce
from fastssl.kernels.launch import Launch

BF16, FP32 = torch.bfloat16, torch.float32


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def pseudo_forward(rows: int, classes: int, *, soft: bool, full: bool, dtype: torch.dtype = BF16) -> Launch:
    """``full``: with shifts, thresholds per class, weights and counted rows."""
    weak, strong = empty(rows, classes, dtype=dtype), empty(rows, classes, dtype=dtype)
    shift, weight, counted = (empty(classes), empty(rows), empty(rows, dtype=torch.bool)) if full else (None, None, None)
    return pseudo.forward_launch(
        weak, strong, shift, shift, shift, weight, counted, pseudo.empty_outputs(weak, strong, soft),
        threshold=0.95, temperature=1.0, strict=False, soft=soft, write_target=soft,
    )  # fmt: skip


def pseudo_backward(rows: int, classes: int, *, soft: bool, dtype: torch.dtype = BF16) -> Launch:
    weak, strong = empty(rows, classes, dtype=dtype), empty(rows, classes, dtype=dtype)
    out, shift = pseudo.empty_outputs(weak, strong, False), empty(classes)
    kept = {name: out[name] for name in ("confidence", "label", "used", "weak_max", "strong_lse")}
    return pseudo.backward_launch(empty(rows), weak, strong, shift, shift, kept, torch.empty_like(strong), temperature=1.0, soft=soft)


def sgd_update(*, average: bool) -> Launch:
    """A network of 23 parameters."""
    lists = [[empty(1 << 14) for _ in range(23)] for _ in range(4)]
    parameters, gradients, buffers, averages = lists
    table = sgd.make_table(parameters, gradients, buffers, averages, [empty()] * 23, [5e-4] * 23)
    return sgd.update_launch(table, empty(2) if average else None, 0.9, True)


def instance_call(which: str, rows: int, entries: int, classes: int, width: int = 128) -> Launch:
    """SimMatch's instance branch; the bank's first dimension is what it says, its memory one row."""
    student, teacher, bank = empty(rows, width), empty(rows, width), empty(1, width).expand(entries, width)
    label, prob = torch.empty(1, dtype=torch.int64).expand(entries), empty(rows, classes)
    if which == "statistics":
        return instance.statistics_launch(student, teacher, bank, label, prob, empty(6, 1, rows), 0.1, 0.1)
    if which == "neighbours":
        return instance.neighbours_launch(teacher, bank, label, empty(rows), prob, 0.1)
    kept = {name: empty(rows) for name in ("teacher_lse", "student_lse", "allowed")}
    return instance.backward_launch(student, teacher, bank, label, prob, kept, empty(rows), empty(1, rows, width), 0.1, 0.1)


def consistency_call(which: str, rows: int, classes: int, kind: str) -> Launch:
    """``which``: forward or backward."""
    student, teacher = empty(rows, classes, dtype=BF16), empty(rows, classes, dtype=BF16)
    tensors: dict[str, Tensor | None] = {"student": student, "teacher": teacher, "student_shift": None, "teacher_shift": None, "weight": empty(rows)}
    numbers = soft_ce.numbers(rows, student.device)
    if which == "forward":
        return soft_ce.launch(soft_ce.consistency_forward_kernel, {**tensors, **numbers}, kind, False, 1.0, 0.4)
    numbers["grad_loss"] = numbers.pop("loss")
    return soft_ce.launch(soft_ce.consistency_backward_kernel, {**tensors, **numbers, "grad": student}, kind, False, 1.0, 0.4)


CASES: dict[str, Callable[[], Launch]] = {
    "pseudo_label_ce forward 448 x 10": lambda: pseudo_forward(448, 10, soft=False, full=False),
    "pseudo_label_ce forward 448 x 1000": lambda: pseudo_forward(448, 1000, soft=False, full=True),
    "pseudo_label_ce forward 448 x 21841": lambda: pseudo_forward(448, 21841, soft=True, full=True),
    "pseudo_label_ce backward 448 x 10": lambda: pseudo_backward(448, 10, soft=False),
    "pseudo_label_ce backward 448 x 1000": lambda: pseudo_backward(448, 1000, soft=False),
    "pseudo_label_ce backward 448 x 21841": lambda: pseudo_backward(448, 21841, soft=True),
    "sgd_ema": lambda: sgd_update(average=True),
    "sgd_ema without average": lambda: sgd_update(average=False),
    **{
        f"consistency {which} {kind} 448 x {classes}": lambda which=which, kind=kind, classes=classes: consistency_call(which, 448, classes, kind)
        for which in ("forward", "backward")
        for kind, classes in (("kl", 1000), ("squared", 10), ("squared", 21841))
    },
    **{
        f"instance {which} 320 x {entries} of {width}": lambda which=which, entries=entries, width=width: instance_call(which, 320, entries, 1000, width)
        for which in ("statistics", "neighbours", "backward")
        for entries, width in ((12811, 128), (1281167, 128))
    },
}
