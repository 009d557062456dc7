"""BatchNorm over row groups of the GLOBAL batch, so that the number of processes does not change what a network computes.

``groups: G`` on R ranks: each rank normalises its rows in G/R equal contiguous groups.  ``groups: 1`` (or ``global``) on R > 1 ranks: one
group over all ranks, with statistics exchanged in one gather per layer and one sum in its backward (works on any backend, unlike SyncBatchNorm).
Running statistics are the mean over groups of each group's mean and unbiased variance; with local groups :func:`sync_running_stats` adds
the mean over ranks, which is exact because the update is linear in the batch statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fastssl.errors import RecipeError
from fastssl.parallel import gather_rows, world_size
from fastssl.schema import BatchNormConfig


class GroupedBatchNorm(_BatchNorm):
    """BatchNorm1d/2d that normalises ``groups`` equal contiguous row groups separately (or one group ``over_ranks``).

    Input [N, C] or [N, C, ...]; N must be a multiple of ``groups`` in training mode (RecipeError otherwise).  Evaluation mode, momentum,
    eps, affine parameters and state-dict keys are those of ``torch.nn.BatchNorm2d``; one training forward moves the running statistics once.
    ``drop`` and ``act`` are applied after the normalisation (for layers that fuse them under these names).
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, *, affine: bool = True, track_running_stats: bool = True,
                 groups: int = 1, over_ranks: bool = False, drop: nn.Module | None = None, act: nn.Module | None = None):  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        if groups < 1 or (over_ranks and groups != 1):
            raise ValueError(f"groups must be at least 1, and 1 where statistics cross ranks; got groups={groups}, over_ranks={over_ranks}")
        self.groups = groups
        self.over_ranks = over_ranks
        self.drop = drop
        self.act = act

    @classmethod
    def like(cls, layer: _BatchNorm, *, groups: int, over_ranks: bool) -> GroupedBatchNorm:
        """A layer that holds the very parameters and buffers of ``layer``."""
        new = cls(layer.num_features, layer.eps, layer.momentum, affine=layer.affine, track_running_stats=layer.track_running_stats,
                  groups=groups, over_ranks=over_ranks, drop=getattr(layer, "drop", None), act=getattr(layer, "act", None))  # fmt: skip
        new.weight, new.bias = layer.weight, layer.bias
        new.running_mean, new.running_var, new.num_batches_tracked = layer.running_mean, layer.running_var, layer.num_batches_tracked
        return new.train(layer.training)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"BatchNorm needs input [N, C, ...], got {list(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        y = self._normalise(x)
        if self.drop is not None:
            y = self.drop(y)
        return y if self.act is None else self.act(y)

    def _normalise(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        tracks = self.training and self.track_running_stats and self.running_mean is not None
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.over_ranks and world_size() > 1:
            y, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps, True)
        elif self.groups == 1 and tracks and self.momentum is not None and not _needs_own_sums(x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps)
        else:
            y, mean, var = self._in_groups(x)
        if tracks:
            self._move_running(mean, var)
        return y

    def _in_groups(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.shape[0] % self.groups:
            raise RecipeError(f"BatchNorm in {self.groups} groups per process cannot split {x.shape[0]} rows evenly; "
                              "choose batchnorm.groups so that it divides every batch size")  # fmt: skip
        if _needs_own_sums(x):
            ys, means, variances = zip(*(_Normalise.apply(part, self.weight, self.bias, self.eps, False) for part in x.chunk(self.groups)), strict=True)
            return (ys[0] if self.groups == 1 else torch.cat(ys)), torch.stack(means).mean(0), torch.stack(variances).mean(0)
        like = x if self.running_mean is None else self.running_mean
        # With momentum 1, batch_norm writes each group's own mean and unbiased variance into these rows.
        mean_GC, var_GC = like.new_zeros(2, self.groups, self.num_features).unbind()
        parts = [F.batch_norm(part, mean_GC[g], var_GC[g], self.weight, self.bias, True, 1.0, self.eps) for g, part in enumerate(x.chunk(self.groups))]
        return (parts[0] if self.groups == 1 else torch.cat(parts)), mean_GC.mean(0), var_GC.mean(0)

    def _move_running(self, mean_C: Tensor, var_C: Tensor) -> None:
        with torch.no_grad():
            for running, batch in ((self.running_mean, mean_C), (self.running_var, var_C)):
                assert running is not None
                if self.momentum is not None:
                    running.lerp_(batch.to(running.dtype), self.momentum)
                else:  # cumulative mean; the factor stays on the device
                    assert self.num_batches_tracked is not None
                    running.lerp_(batch.to(running.dtype), self.num_batches_tracked.to(running.dtype).reciprocal())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}, over_ranks={self.over_ranks}"


class _Normalise(torch.autograd.Function):
    """(y, mean [C], unbiased variance [C]) of one BatchNorm batch in training mode: the rows of ``x`` [N, C, ...], or of all ranks' ``x`` (equally many).

    Mean and variance of each rank are taken in two passes and merged from means and squared deviations (Chan et al., 1979), so nothing large
    cancels; sums over rows are torch's pairwise ones, sums over ranks are float64 on the CPU.  Backward, with n values per channel over all ranks and
    xh the normalised x:  dx = weight / std (dy - sum(dy) / n - xh sum(dy xh) / n), sums over all ranks; gradients of weight and bias stay each rank's
    own, which DDP then averages like all others.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, over_ranks: bool) -> tuple[Tensor, Tensor, Tensor]:
        ranks = world_size() if over_ranks else 1
        count = ranks * x.numel() // x.shape[1]
        if count < 2:
            raise ValueError(f"BatchNorm in training mode needs more than 1 value per channel, got input {list(x.shape)}")
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        table_2C = torch.stack(_var_mean(wide))
        if ranks == 1:
            var_C, mean_C = table_2C
        else:
            vars_RC, means_RC = gather_rows(table_2C[None]).unbind(1)
            mean_C = means_RC.mean(0)
            var_C = vars_RC.mean(0) + (means_RC - mean_C).square().mean(0)
        inverse_C = torch.rsqrt(var_C + eps)
        scale_C = inverse_C if weight is None else inverse_C * weight
        shift_C = -mean_C * scale_C if bias is None else bias - mean_C * scale_C
        y = _affine(wide, scale_C, shift_C).to(x.dtype)
        ctx.save_for_backward(x, weight, mean_C, inverse_C)
        ctx.has_bias, ctx.ranks, ctx.count = bias is not None, ranks, count
        unbiased_C = var_C * (count / (count - 1))
        ctx.mark_non_differentiable(mean_C, unbiased_C)
        return y, mean_C, unbiased_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean_C, inverse_C = ctx.saved_tensors
        wide, dy = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (x, dy))
        normal = _affine(wide, inverse_C, -mean_C * inverse_C)
        own_2C = torch.stack([_channel_sums(dy), _channel_sums(dy * normal)])
        sums_2C = own_2C.to(mean_C.dtype, copy=True)
        if ctx.ranks > 1:
            dist.all_reduce(sums_2C)
        scale_C = inverse_C if weight is None else inverse_C * weight
        shift_C, slope_C = -sums_2C * scale_C / ctx.count
        dx = _affine(dy, scale_C, shift_C).addcmul_(normal, _like_rows(slope_C, dy)).to(x.dtype)
        own_2C = own_2C.to(dy.dtype)
        return dx, None if weight is None else own_2C[1].to(weight.dtype), own_2C[0] if ctx.has_bias else None, None, None


def _needs_own_sums(x: Tensor) -> bool:
    """torch's channels-last BatchNorm on the CPU adds up rows one by one in float32.  On images with plain backgrounds that costs three to four
    digits (weight gradients off by 3e-3), and what one process computes would not be what two compute."""
    return x.device.type == "cpu" and not x.is_contiguous()


def _all_but_channel(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Of per-channel sums: float64 costs nothing on a CPU."""
    return torch.float64 if x.device.type == "cpu" or x.dtype == torch.float64 else torch.float32


def _channel_sums(x: Tensor) -> Tensor:
    """Sum over all but the channel, in the dtype of :func:`_sum_dtype`.

    Channels-last rows on the CPU go through a matrix product in small blocks of rows, whose sums are added in float64: as exact as torch's
    pairwise reduction and, on two cores, many times as fast.
    """
    if x.device.type != "cpu" or x.dim() < 3 or x.is_contiguous():
        return x.sum(_all_but_channel(x)).to(_sum_dtype(x))
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    block = next((b for b in (32, 28, 16, 49, 8) if rows.shape[0] % b == 0), 1)
    return torch.matmul(rows.new_ones(1, block), rows.view(-1, block, rows.shape[1])).sum((0, 1), dtype=_sum_dtype(x))


def _var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """(biased variance [C], mean [C]) of all rows, in two passes, in the dtype of :func:`_sum_dtype`."""
    count = x.numel() // x.shape[1]
    pilot_C = _channel_sums(x) / count
    deviation = x - _like_rows(pilot_C, x)
    # The pilot was rounded to the dtype of x when it was subtracted; what is left of the mean is in the deviations.
    rest_C = _channel_sums(deviation) / count
    return _channel_sums(deviation.square_()) / count - rest_C.square(), pilot_C.to(x.dtype).to(pilot_C.dtype) + rest_C


def _like_rows(value_C: Tensor, x: Tensor) -> Tensor:
    return value_C.to(x.dtype).view([1, -1] + [1] * (x.dim() - 2))


def _affine(x: Tensor, scale_C: Tensor, shift_C: Tensor) -> Tensor:
    """x scale + shift per channel, one pass, in the dtype and memory format of ``x``."""
    return torch.addcmul(_like_rows(shift_C, x), x, _like_rows(scale_C, x))


def local_groups(groups: Any, world: int) -> tuple[int, bool]:
    """(groups on each rank, whether one group spans all ranks) for the recipe's ``batchnorm.groups`` on ``world`` ranks."""
    if groups == "global":
        groups = 1
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise RecipeError(f"batchnorm.groups is {groups!r}; it must be 'global' or a whole number from 1")
    if groups == 1:
        return 1, world > 1
    if groups % world:
        raise RecipeError(f"batchnorm.groups is {groups}, which {world} processes cannot share evenly; use 1 (one group over all processes) "
                          f"or a multiple of {world}: {world}, {2 * world}, {3 * world}, ...")  # fmt: skip
    return groups // world, False


def convert_batchnorm(network: nn.Module, cfg: BatchNormConfig, world: int = 1) -> nn.Module:
    """Apply ``cfg`` to every BatchNorm1d/2d of ``network`` in place; layers keep their parameters, buffers and state-dict keys.

    Sets ``network.bn_groups`` (groups on this rank), which joint forwards read.  One process with one group converts too (its layers hand
    over to torch's BatchNorm wherever that is exact enough) and leaves kinds alone that cannot be converted; otherwise those are a RecipeError.
    """
    groups, over_ranks = local_groups(cfg.groups, world)
    if cfg.momentum is not None and not 0 <= cfg.momentum <= 1:
        raise RecipeError(f"batchnorm.momentum is {cfg.momentum}; it must lie in [0, 1]")
    if cfg.eps is not None and cfg.eps <= 0:
        raise RecipeError(f"batchnorm.eps is {cfg.eps}; it must be positive")
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = layer.momentum if cfg.momentum is None else cfg.momentum
            layer.eps = layer.eps if cfg.eps is None else cfg.eps
    made: dict[_BatchNorm, GroupedBatchNorm] = {}  # a layer that is used in two places stays one layer
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, _BatchNorm):
                continue
            if not _replaceable(child):
                if groups == 1 and not over_ranks:
                    continue
                raise RecipeError(f"this model's {type(child).__name__} cannot be normalised in groups; use one process with batchnorm.groups 1")
            if child not in made:
                made[child] = GroupedBatchNorm.like(child, groups=groups, over_ranks=over_ranks)
            setattr(parent, name, made[child])
    network.bn_groups = groups  # type: ignore[assignment]
    return network


def _replaceable(layer: _BatchNorm) -> bool:
    """Plain layers, and subclasses that only add ``drop`` and ``act`` after the normalisation (timm's BatchNormAct2d)."""
    return type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, GroupedBatchNorm) or (isinstance(layer, nn.BatchNorm2d) and type(layer).__name__ == "BatchNormAct2d")


@contextmanager
def running_stats_kept(network: nn.Module) -> Iterator[None]:
    """Within it, forwards in training mode normalise by their batch as always and leave the running statistics of every BatchNorm layer alone."""
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def sync_running_stats(network: nn.Module) -> None:
    """Make BatchNorm running statistics the mean over ranks, in one flat all-reduce; nothing on one process. Call on every rank."""
    if world_size() == 1:
        return
    stats: list[Tensor] = []
    for layer in network.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and not getattr(layer, "over_ranks", False):
            assert layer.running_var is not None
            stats += [layer.running_mean, layer.running_var]
    if stats:
        flat = torch.cat(stats)
        dist.all_reduce(flat)
        torch._foreach_copy_(stats, list((flat / world_size()).split([s.numel() for s in stats])))


_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def is_norm_layer(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer (torch's, or a library's whose class name says so and that holds a 1-D weight)."""
    if isinstance(module, _NORMS):
        return True
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def named_norm_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameter name -> parameter, for all scales and shifts of normalisation layers."""
    found = {}
    for prefix, module in network.named_modules():
        if is_norm_layer(module):
            for name, parameter in module.named_parameters(prefix, recurse=False):
                found[name] = parameter
    return found


def is_norm_parameter(network: nn.Module, name: str) -> bool:
    """Whether the parameter called ``name`` in ``network`` belongs to a normalisation layer."""
    owner, _, _ = name.rpartition(".")
    return is_norm_layer(network.get_submodule(owner))
