"""Part 2 of the GPU suite: every fused kernel against its reference, forward and backward, then its speed, bytes, and ratio to torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_common import Item, Settings, ceiling, seconds, share
from fastssl import functional
from fastssl.kernels import pseudo_label_ce, sgd_ema, similarity, soft_ce
from fastssl.kernels.choice import use
from fastssl.kernels.similarity import instance_matching
from fastssl.kernels.soft_ce import consistency

Answers = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """``call(inputs)`` -> answers, the first of which is differentiated to ``inputs[trained]``. ``bytes``: what the kernels move. ``tolerance``: relative."""

    inputs: tuple[Tensor, ...]
    call: Callable[..., Answers]
    trained: int
    bytes: float
    tolerance: float
    flop: float = 0.0


def items(settings: Settings) -> dict[str, Item]:
    rows = settings.pick(448, 6)
    cases: dict[str, Callable[[], Case]] = {}
    for classes in settings.pick((10, 1000, 21841), (37,)):
        for soft in (False, True):
            cases[f"pseudo_label_ce {'soft' if soft else 'hard'} {rows} x {classes}"] = lambda c=classes, s=soft: pseudo(settings, rows, c, s)  # type: ignore[misc]
        for kind in ("ce", "kl", "squared"):
            cases[f"consistency {kind} {rows} x {classes}"] = lambda c=classes, k=kind: consistent(settings, rows, c, k)  # type: ignore[misc]
    queries, width = settings.pick((320, 128), (4, 16))
    for entries in settings.pick((13_000, 128_000, 1_281_167), (70,)):
        cases[f"instance_matching {queries} x {entries} of {width}"] = lambda n=entries: instance(settings, queries, n, width)  # type: ignore[misc]
    found: dict[str, Item] = {name: lambda make=make: measure(settings, make()) for name, make in cases.items()}  # type: ignore[misc]
    return {**found, "sgd_ema": lambda: optimiser(settings)}


def _random(settings: Settings, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(settings.device, dtype)


def pseudo(settings: Settings, rows: int, classes: int, soft: bool) -> Case:
    weak, strong = (_random(settings, rows, classes, dtype=torch.bfloat16, scale=6.0 + n) for n in range(2))

    def call(strong: Tensor, weak: Tensor) -> Answers:
        out = pseudo_label_ce(weak, [strong], threshold=0.5, soft=soft)
        return out.loss_VU, out.confidence_U, out.mask_U

    moved = pseudo_label_ce_bytes(rows, classes, soft)
    return Case((strong, weak), call, 0, moved, 2e-2)


def pseudo_label_ce_bytes(rows: int, classes: int, soft: bool) -> float:
    from fastssl.kernels.pseudo_label_ce import bytes_moved

    return float(bytes_moved(rows, classes, soft=soft)[0])


def consistent(settings: Settings, rows: int, classes: int, kind: str) -> Case:
    student, teacher = (_random(settings, rows, classes, dtype=torch.bfloat16, scale=2.0 + n) for n in range(2))
    call = lambda student, teacher: (consistency(student, teacher, kind, teacher_temperature=0.4),)  # noqa: E731
    return Case((student, teacher), call, 0, float(soft_ce.bytes_moved(rows, classes)[0]), 2e-2)


def instance(settings: Settings, rows: int, entries: int, width: int, classes: int = 1000) -> Case:
    classes = settings.pick(classes, 10)
    student, teacher, bank = (functional.unit_rows(_random(settings, n, width)) for n in (rows, rows + 1, entries))
    label = torch.arange(entries, device=settings.device) % classes
    prob = torch.softmax(_random(settings, rows, classes), 1)
    call = lambda *given: instance_matching(*given, student_temperature=0.1, teacher_temperature=0.1)  # noqa: E731
    done = similarity.work(rows, entries, width, classes)
    return Case((student, teacher[:rows], bank, label, prob), call, 0, done["bytes"], 1e-4, flop=done["flop"])


def both_ways(case: Case, call: Callable[..., Answers]) -> Callable[[], tuple[Answers, Tensor]]:
    """Forward, and backward with an upstream gradient that differs by row."""
    inputs = list(case.inputs)
    inputs[case.trained] = inputs[case.trained].detach().clone().requires_grad_()
    upstream: list[Tensor] = []

    def run() -> tuple[Answers, Tensor]:
        answers = call(*inputs)
        if not upstream:
            upstream.append(torch.linspace(0.5, 1.5, answers[0].numel(), device=answers[0].device).view_as(answers[0]).to(answers[0].dtype))
        (gradient,) = torch.autograd.grad(answers[0], inputs[case.trained], upstream[0])
        return answers, gradient

    return run


def largest(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) if a.numel() else 0.0


def measure(settings: Settings, case: Case) -> dict[str, Any]:
    ours = both_ways(case, case.call)
    with use("triton"):
        answers, gradient = ours()
    with use("reference"):
        expected, wanted = ours()
    off = max(largest(a, b) for a, b in zip(answers, expected, strict=True))
    row: dict[str, Any] = {"largest_difference": off, "largest_gradient_difference": largest(gradient, wanted), "tolerance": case.tolerance}
    row["equal"] = max(off, row["largest_gradient_difference"]) <= case.tolerance
    clock = {"device": settings.device, "dry": settings.dry}
    with use("triton"):
        row["seconds"] = seconds(ours, **clock)
    with use("reference"):
        row["eager_s"] = seconds(ours, **clock)
        compiled = torch.compile(case.call, dynamic=False, backend="eager" if settings.dry else "inductor")
        row["compiled_s"] = seconds(both_ways(case, compiled), **clock)
    row |= {"bytes": case.bytes, "bandwidth_share": share(case.bytes, row["seconds"], ceiling(settings, "copy"))}
    if case.flop:
        row["flop_per_s"] = case.flop / row["seconds"]
    return row | {"over_eager": round(row["eager_s"] / row["seconds"], 2), "over_compiled": round(row["compiled_s"] / row["seconds"], 2)}


def optimiser(settings: Settings) -> dict[str, Any]:
    """SGD with Nesterov momentum and the average in one pass, against torch's fused SGD with a foreach average, over a ResNet-50's parameters."""
    sizes = settings.pick([2048 * 1000, *([512 * 512 * 9] * 3), *([256 * 1024] * 40), *([64] * 110)], [37, 1025, 5])

    def lists() -> list[list[Tensor]]:
        return [[_random(settings, size, scale=1 / (n + 1)) for size in sizes] for n in range(4)]

    rate, m = torch.tensor(0.03, device=settings.device), torch.tensor(0.999, device=settings.device)
    arguments = {"momentum": 0.9, "nesterov": True, "average_momentum": m}
    ours, expected = lists(), lists()

    def step(tensors: list[list[Tensor]]) -> None:
        sgd_ema.sgd_ema_(*tensors, [rate] * len(sizes), [5e-4] * len(sizes), **arguments)

    with use("triton"):
        step(ours)
    with use("reference"):
        step(expected)
    off = max(largest(a, b) for one, other in zip(ours, expected, strict=True) for a, b in zip(one, other, strict=True))
    parameters, gradients, _, averages = lists()
    leaves = [p.requires_grad_() for p in parameters]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient
    theirs = torch.optim.SGD(leaves, lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)

    @torch.no_grad()
    def apart() -> None:
        theirs.step()
        torch._foreach_lerp_(averages, [leaf.detach() for leaf in leaves], 0.001)

    clock = {"device": settings.device, "dry": settings.dry}
    with use("triton"):
        took = seconds(lambda: step(ours), **clock)
    eager, moved = seconds(apart, **clock), float(sgd_ema.bytes_moved(sum(sizes))[0])
    return {
        "largest_difference": off, "tolerance": 1e-6, "equal": off <= 1e-6, "seconds": took, "eager_s": eager, "bytes": moved,
        "bandwidth_share": share(moved, took, ceiling(settings, "copy")), "over_eager": round(eager / took, 2),
    }  # fmt: skip
