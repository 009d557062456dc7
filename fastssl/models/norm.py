"""BatchNorm over row groups of the GLOBAL batch, so that the number of processes does not change what a network computes.

``groups: G`` on R ranks: each rank normalises its rows in G/R equal contiguous groups.  ``groups: 1`` (or ``global``) on R > 1 ranks: one
group over all ranks, with statistics exchanged in one differentiable all-reduce per layer (works on any backend, unlike SyncBatchNorm).
Running statistics are the mean over groups of each group's mean and unbiased variance; with local groups :func:`sync_running_stats` adds
the mean over ranks, which is exact because the update is linear in the batch statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fastssl.errors import RecipeError
from fastssl.parallel import rank, sum_over_ranks, world_size
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
        tracks = self.training and self.running_mean is not None
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.over_ranks and world_size() > 1:
            y, mean, var = self._over_ranks(x)
        elif self.groups == 1 and tracks and self.momentum is not None:
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
        like = x if self.running_mean is None else self.running_mean
        # With momentum 1, batch_norm writes each group's own mean and unbiased variance into these rows.
        mean_GC, var_GC = like.new_zeros(2, self.groups, self.num_features).unbind()
        parts = [F.batch_norm(part, mean_GC[g], var_GC[g], self.weight, self.bias, True, 1.0, self.eps) for g, part in enumerate(x.chunk(self.groups))]
        return (parts[0] if self.groups == 1 else torch.cat(parts)), mean_GC.mean(0), var_GC.mean(0)

    def _over_ranks(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.dim())]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var_C, mean_C = torch.var_mean(wide, dims, correction=0)
        # A gather written as a sum: each rank adds its own row, so the gradient comes back through the same collective. Combining
        # per-rank means and variances does not cancel the way sums of squares do.
        own = torch.stack([mean_C, var_C])[None]
        table_R2C = sum_over_ranks(F.pad(own, (0, 0, 0, 0, rank(), world_size() - 1 - rank())))
        means_RC, vars_RC = table_R2C.unbind(1)
        mean_C = means_RC.mean(0)
        var_C = vars_RC.mean(0) + (means_RC - mean_C).square().mean(0)
        scale_C = torch.rsqrt(var_C + self.eps)
        if self.weight is not None:
            scale_C = scale_C * self.weight
        shift_C = -mean_C * scale_C
        if self.bias is not None:
            shift_C = shift_C + self.bias
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = world_size() * x.numel() // self.num_features
        if count < 2:
            raise ValueError(f"BatchNorm in training mode needs more than 1 value per channel, got input {list(x.shape)}")
        y = torch.addcmul(shift_C.view(shape), wide, scale_C.view(shape)).to(x.dtype)
        return y, mean_C.detach(), var_C.detach() * (count / (count - 1))

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

    Layers are replaced only where plain BatchNorm would not do, so one process with one group keeps torch's own layers.  Sets
    ``network.bn_groups`` (groups on this rank), which joint forwards read.
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
    if groups > 1 or over_ranks:
        made: dict[_BatchNorm, GroupedBatchNorm] = {}  # a layer that is used in two places stays one layer
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _BatchNorm):
                    if not _replaceable(child):
                        raise RecipeError(f"this model's {type(child).__name__} cannot be normalised in groups; use one process with batchnorm.groups 1")
                    if child not in made:
                        made[child] = GroupedBatchNorm.like(child, groups=groups, over_ranks=over_ranks)
                    setattr(parent, name, made[child])
    network.bn_groups = groups  # type: ignore[assignment]
    return network


def _replaceable(layer: _BatchNorm) -> bool:
    """Plain layers, and subclasses that only add ``drop`` and ``act`` after the normalisation (timm's BatchNormAct2d)."""
    return type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, GroupedBatchNorm) or (isinstance(layer, nn.BatchNorm2d) and type(layer).__name__ == "BatchNormAct2d")


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
