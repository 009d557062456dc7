"""Sums, means and row gathers over ranks; each is the identity on one process.

Method state is replicated: whatever changes it is first gathered here, in global draw order, so that every rank writes the same rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _SumOverRanks(torch.autograd.Function):
    """Forward: all-reduce sum. Backward: all-reduce sum of the upstream gradients (each rank's input feeds every rank's output)."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of ``x`` (any shape) over ranks, differentiable."""
    return x if world_size() == 1 else _SumOverRanks.apply(x)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of ``x`` (any shape) over ranks, differentiable."""
    return x if world_size() == 1 else sum_over_ranks(x) / world_size()


def gather_rows(x_B: Tensor) -> Tensor:
    """Rows of all ranks in rank order, [R*B, ...], no gradient. Every rank must hold the same number of rows."""
    if world_size() == 1:
        return x_B.detach()
    x_B = x_B.detach().contiguous()
    out = x_B.new_empty((world_size() * x_B.shape[0], *x_B.shape[1:]))
    dist.all_gather_into_tensor(out, x_B)
    return out


class _GatherRows(torch.autograd.Function):
    """Forward: rows of all ranks. Backward: the sum over ranks of the gradients at this rank's rows."""

    @staticmethod
    def forward(ctx: object, x_B: Tensor) -> Tensor:
        return gather_rows(x_B)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return own_rows(grad)


def gather_rows_with_gradient(x_B: Tensor) -> Tensor:
    """Like :func:`gather_rows`, differentiable: where every rank's loss reads the rows, each rank gets the gradient of the sum of all losses."""
    return x_B if world_size() == 1 else _GatherRows.apply(x_B)


def own_rows(x_N: Tensor) -> Tensor:
    """This rank's piece of rows in global order, [N / R, ...]; N must be a multiple of the ranks."""
    share = len(x_N) // world_size()
    return x_N[rank() * share : (rank() + 1) * share]
