"""One forward for several views: concatenation without a copy where memory allows, and equal shares of every view in each BatchNorm group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.errors import RecipeError
from fastssl.models.norm import running_stats_kept
from fastssl.types import Out


class NetworkForward:
    """A network as methods call it: ``student(view, ...)`` and ``student.head(name, feat, ...)``."""

    def __init__(self, network: nn.Module):
        self.network = network

    def __call__(self, *views: Tensor) -> Any:
        return joint_forward(self.network, *views)

    def head(self, name: str, *feats: Tensor) -> Any:
        return joint_head(self.network, name, *feats)

    def untracked(self, *views: Tensor) -> Any:
        with running_stats_kept(self.network):
            return self(*views)


def regroup(sizes: Sequence[int], groups: int) -> tuple[Tensor, Tensor]:
    """(order, inverse) of the rows of concatenated views so that ``groups`` contiguous groups each hold an equal share of every view.

    ``sizes`` are rows per view; group g gets the g-th contiguous piece of each view, in view order.  int64 [sum(sizes)] each:
    ``x[order]`` is the grouped batch, ``y[inverse]`` undoes it.  This is the definition; :func:`joint_forward` does the same by slicing.
    """
    check_shares(sizes, groups)
    starts = [sum(sizes[:v]) for v in range(len(sizes))]
    rows = [start + g * size // groups + i for g in range(groups) for start, size in zip(starts, sizes, strict=True) for i in range(size // groups)]
    order = torch.tensor(rows, dtype=torch.int64)
    return order, torch.argsort(order)


def joint_forward(network: nn.Module, *views: Tensor) -> Out | tuple[Out, ...]:
    """``network`` on all views as ONE batch; an Out for one view, otherwise one Out per view.

    Views are [N_v, C, H, W] of one image shape.  In training mode with BatchNorm groups (``network.bn_groups`` on this rank) each N_v must be
    a multiple of the groups (RecipeError otherwise).  Adjacent row ranges of one buffer are forwarded in place.
    """
    sizes = [view.shape[0] for view in views]
    groups = int(getattr(network, "bn_groups", 1)) if network.training else 1
    if len(views) == 1:
        check_shares(sizes, groups)
        return network(views[0])
    if groups == 1:
        out = network(concatenate(views))
        return tuple(Out(*parts) for parts in _split(out, lambda t: t.split(sizes)))
    check_shares(sizes, groups)
    pieces = [view.chunk(groups) for view in views]
    out = network(torch.cat([piece[g] for g in range(groups) for piece in pieces]))
    return tuple(Out(*parts) for parts in _split(out, ungroup(sizes, groups)))


def joint_head(network: nn.Module, name: str, *feats: Tensor) -> Tensor | tuple[Tensor, ...]:
    """The head ``name`` of ``network`` on several feature tensors [N_v, D] as ONE batch; a tensor for one, otherwise a tuple. Groups as above."""
    head: nn.Module = network.heads[name]  # type: ignore[index,assignment]
    sizes = [feat.shape[0] for feat in feats]
    groups = int(getattr(network, "bn_groups", 1)) if network.training else 1
    check_shares(sizes, groups)
    if len(feats) == 1:
        return head(feats[0])
    if groups == 1:
        return head(torch.cat(feats)).split(sizes)
    pieces = [feat.chunk(groups) for feat in feats]
    return tuple(ungroup(sizes, groups)(head(torch.cat([piece[g] for g in range(groups) for piece in pieces]))))


def ungroup(sizes: Sequence[int], groups: int) -> Callable[[Tensor], list[Tensor]]:
    """From rows in groups, each with an equal share of every view, back to the views."""
    shares = [size // groups for size in sizes]
    return lambda t: [part.flatten(0, 1) for part in t.unflatten(0, (groups, -1)).split(shares, dim=1)]


def concatenate(views: Sequence[Tensor]) -> Tensor:
    """Rows of all views; no copy when they are adjacent row ranges of one buffer and carry no gradient of their own."""
    first = views[0]
    base = first._base
    end = first.storage_offset()
    adjacent = base is not None
    for view in views:
        adjacent = bool(
            adjacent and view._base is base and view.storage_offset() == end and view.stride() == first.stride()
            and view.shape[1:] == first.shape[1:] and view.dtype == first.dtype and not view.requires_grad
        )  # fmt: skip
        end = view.storage_offset() + view.shape[0] * view.stride(0)
    if not adjacent:
        return torch.cat(list(views))
    assert base is not None
    return base.as_strided((sum(v.shape[0] for v in views), *first.shape[1:]), first.stride(), first.storage_offset())


def _split(out: Out, cut) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    logits, feats = cut(out.logits_NC), cut(out.feat_ND)
    heads = {name: cut(value) for name, value in out.heads.items()}
    return [(logits[v], feats[v], {name: parts[v] for name, parts in heads.items()}) for v in range(len(logits))]


def check_shares(sizes: Sequence[int], groups: int) -> None:
    """RecipeError unless every view's rows are a multiple of ``groups``."""
    uneven = [size for size in sizes if size % groups]
    if uneven:
        raise RecipeError(f"BatchNorm in {groups} groups per process cannot share a view of {uneven[0]} rows evenly; "
                          "choose batchnorm.groups so that it divides both batch sizes")  # fmt: skip
