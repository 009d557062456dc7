"""Momentum SGD and the moving average of its result in one pass over the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.kernels.choice import runs_triton


@torch.no_grad()
def sgd_ema_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    averages: Sequence[Tensor | None],
    rates: Sequence[Tensor],
    decays: Sequence[float],
    *,
    momentum: float,
    nesterov: bool = False,
    average_momentum: Tensor | None = None,
) -> None:
    """Move parameters, momentum buffers and averages in place.

        g = gradient + decay p        b <- momentum b + g        step = g + momentum b with Nesterov's rule, else b
        p <- p - rate step            average <- m average + (1 - m) p, the new p

    torch.optim.SGD's update (without dampening; buffers start at 0, so that the first b is g) and then the average of Mean Teacher (Tarvainen and Valpola,
    NeurIPS 2017).  Float tensors, one entry per parameter in each list: ``rates`` scalars on the device (a group's may repeat), ``decays`` numbers,
    ``averages`` None where there is no average; ``buffers`` is empty if ``momentum`` is 0.  ``average_momentum`` m: scalar on the device, None = leave
    averages alone.  All tensors of one parameter must lie in memory alike (gradients are copied if they do not); raises ValueError for others.
    """
    if not parameters:
        return
    gradients = [g if _alike(g, p) else torch.empty_like(p).copy_(g) for g, p in zip(gradients, parameters, strict=True)]
    followed = [a for a in averages if a is not None] if average_momentum is not None else []
    if runs_triton(*parameters, *gradients, *buffers, *followed) and all(t.dtype == torch.float32 for t in (*parameters, *gradients, *buffers, *followed)):
        for others in (buffers, averages):
            for p, other in zip(parameters, others, strict=False):
                if other is not None and not _alike(other, p):
                    raise ValueError(f"a parameter has strides {p.stride()}, its buffer or average {other.stride()}: they must lie in memory alike")
        groups = list({id(rate): rate for rate in rates}.values())
        group_of = {id(rate): n for n, rate in enumerate(groups)}
        has = [a is not None and bool(followed) for a in averages]
        _update(
            list(parameters), gradients, list(buffers), followed, [r.to(torch.float32) for r in groups], [group_of[id(r)] for r in rates], has,
            list(decays), momentum, nesterov, average_momentum if followed else None,
        )  # fmt: skip
    else:
        reference(parameters, gradients, buffers, averages, rates, decays, momentum, nesterov, average_momentum)


def reference(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffers: Sequence[Tensor], averages: Sequence[Tensor | None], rates: Sequence[Tensor],
    decays: Sequence[float], momentum: float, nesterov: bool, average_momentum: Tensor | None,
) -> None:  # fmt: skip
    """The same in torch operations, tensor by tensor."""
    for n, (p, g, average, rate, decay) in enumerate(zip(parameters, gradients, averages, rates, decays, strict=True)):
        step = g + decay * p
        if momentum:
            buffers[n].mul_(momentum).add_(step)
            step = step + momentum * buffers[n] if nesterov else buffers[n]
        p.sub_(rate.to(p.dtype) * step)
        if average is not None and average_momentum is not None:
            m = average_momentum.to(torch.float64)
            average.mul_(m.to(average.dtype)).add_((1 - m).to(average.dtype) * p)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether equal places in memory hold equal places of the tensors, without gaps."""
    if a.shape != b.shape:
        return False
    last = a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last) and b.is_contiguous(memory_format=torch.channels_last)
    return last or (a.is_contiguous() and b.is_contiguous())


_tables: dict[tuple[Any, ...], Any] = {}
_KEPT_TABLES = 8
_held: list[Any] = []  # tables that a recorded graph reads


@torch.library.custom_op("fastssl::sgd_ema", mutates_args=("parameters", "buffers", "averages"))
def _update(
    parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], averages: list[Tensor], rates: list[Tensor], group: list[int],
    has_average: list[bool], decays: list[float], momentum: float, nesterov: bool, average_momentum: Tensor | None,
) -> None:  # fmt: skip
    from fastssl.kernels import triton_sgd_ema as side

    remaining = iter(averages)
    paired = [next(remaining) if has else None for has in has_average]
    tensors = [*parameters, *gradients, *buffers, *averages, *rates]
    key = (parameters[0].device, side.BLOCK, *(t.data_ptr() for t in tensors), *(t.numel() for t in parameters), *group, *has_average, *decays)
    if key not in _tables:
        if len(_tables) >= _KEPT_TABLES:
            _tables.pop(next(iter(_tables)))
        _tables[key] = side.make_table(parameters, gradients, buffers, paired, [rates[n] for n in group], decays)
    if parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _held.append(_tables[key])  # a replay reads it again, long after newer tables took its place here
    shares = None
    if average_momentum is not None:
        m = average_momentum.to(torch.float64)
        shares = torch.stack([m, 1 - m]).to(torch.float32)
    side.update_launch(_tables[key], shares, momentum, nesterov).run()


class SgdEma(torch.optim.SGD):
    """torch.optim.SGD whose step also moves averages of the parameters.

    Takes parameter groups with ``lr`` (tensors on the parameters' device, read at each step without a host sync), ``weight_decay``, ``momentum`` and
    ``nesterov``; the state is SGD's ``momentum_buffer``, there from the start.  Parameters without a gradient are left out of a step, averages included.
    """

    def __init__(self, groups: Any, lr: Tensor, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False):
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, foreach=False)
        self._average_of: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor):
                raise TypeError("SgdEma needs every lr as a tensor on the parameters' device, so that no step waits for the host")
            for p in group["params"]:
                if group["momentum"]:
                    self.state[p] = {"momentum_buffer": torch.zeros_like(p, memory_format=torch.preserve_format)}

    def average_into(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """(average, parameter) pairs that steps with an ``average_momentum`` move; replaces earlier ones."""
        self._average_of = {parameter: average for average, parameter in pairs}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, average_momentum: Tensor | None = None) -> Any:  # type: ignore[override]
        """One update; with ``average_momentum`` m (scalar on the device) also average <- m average + (1 - m) parameter."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_rule: dict[tuple[float, bool], list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            rule = (float(group["momentum"]), bool(group["nesterov"]))
            by_rule.setdefault(rule, []).extend((p, group) for p in group["params"] if p.grad is not None)
        for (momentum, nesterov), pairs in by_rule.items():
            parameters = [p for p, _ in pairs]
            sgd_ema_(
                parameters,
                [p.grad for p in parameters if p.grad is not None],
                [self.state[p]["momentum_buffer"] for p in parameters] if momentum else [],
                [self._average_of.get(p) for p in parameters],
                [group["lr"] for _, group in pairs],
                [float(group["weight_decay"]) for _, group in pairs],
                momentum=momentum,
                nesterov=nesterov,
                average_momentum=average_momentum,
            )
        return loss


def bytes_moved(count: int, *, momentum: bool = True, average: bool = True) -> tuple[int, int]:
    """(bytes that one step over ``count`` float32 parameters moves, bytes of SGD and the average as separate passes).

    Together: parameter, gradient, buffer and average read, all but the gradient written: also the least possible.  Apart: torch's fused SGD, then the
    average as a product, a product in place and a sum in place.
    """
    sgd = 4 * (3 + 2 * momentum)
    return count * (sgd + 8 * average), count * (sgd + 28 * average)
