"""Shuffled BatchNorm: a teacher's rows are normalised among other rows than the student's.

With BatchNorm in groups, student and teacher would see an image among the same neighbours, and statistics that both share give the image away (MoCo's
ShuffleBN, He et al., CVPR 2020; SimMatch's teacher).  Published code draws a permutation of all ranks' rows at each step; here it is a fixed one, that
spreads every group evenly over all groups and keeps equal shares of every view in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastssl.models.joint import check_shares, ungroup
from fastssl.parallel import gather_rows, rank, world_size
from fastssl.types import Out


def spread(groups: int, rows: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(order, inverse) of ``groups`` contiguous groups of ``rows`` rows, int64 [groups * rows]: row p of group g moves to row p of group (g + p) mod groups.

    ``x[order]`` is the spread batch, ``y[inverse]`` undoes it.  Two rows of one group meet again only if their places differ by a multiple of ``groups``.
    """
    group, place = torch.arange(groups, device=device)[:, None], torch.arange(rows, device=device)
    return ((group - place) % groups * rows + place).flatten(), ((group + place) % groups * rows + place).flatten()


def shuffled_forward(network: nn.Module, *views: Tensor) -> Out | tuple[Out, ...]:
    """What :func:`~fastssl.models.joint.joint_forward` answers, but normalised in the groups that :func:`spread` makes of the rows of ALL ranks.

    Call on every rank, without gradient.  Each view's rows must be a multiple of the BatchNorm groups on this rank (RecipeError otherwise).
    """

    def run(rows: Tensor) -> dict[str, Tensor]:
        out = network(rows)
        return {"logits": out.logits_NC, "feat": out.feat_ND, **{f"head.{name}": value for name, value in out.heads.items()}}

    parts = _shuffled(run, views, _groups(network))
    names = [name for name in parts if name.startswith("head.")]
    outs = tuple(Out(parts["logits"][v], parts["feat"][v], {n.removeprefix("head."): parts[n][v] for n in names}) for v in range(len(views)))
    return outs[0] if len(outs) == 1 else outs


def shuffled_head(network: nn.Module, name: str, *feats: Tensor) -> Tensor | tuple[Tensor, ...]:
    """The head ``name`` of ``network`` on features, normalised in the groups of :func:`shuffled_forward`."""
    head: nn.Module = network.heads[name]  # type: ignore[index,assignment]
    answers = tuple(_shuffled(lambda rows: {"head": head(rows)}, feats, _groups(network))["head"])
    return answers[0] if len(answers) == 1 else answers


def _groups(network: nn.Module) -> int:
    return int(getattr(network, "bn_groups", 1))


def _shuffled(run: Callable[[Tensor], dict[str, Tensor]], views: Sequence[Tensor], groups: int) -> dict[str, list[Tensor]]:
    """``run`` on the spread rows; each of its tensors back in the order of the views, cut into them."""
    sizes = [view.shape[0] for view in views]
    check_shares(sizes, groups)
    mine = slice(rank() * sum(sizes), (rank() + 1) * sum(sizes))
    order, inverse = (index[mine] for index in spread(groups * world_size(), sum(sizes) // groups, views[0].device))
    pieces = [view.chunk(groups) for view in views]
    grouped = torch.cat([piece[g] for g in range(groups) for piece in pieces])
    return {name: ungroup(sizes, groups)(_pick(answer, inverse)) for name, answer in run(_pick(grouped, order)).items()}


def _pick(x: Tensor, row_B: Tensor) -> Tensor:
    """Rows ``row_B`` of the rows of all ranks, in the memory format of ``x``."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return gather_rows(x.permute(0, 2, 3, 1))[row_B].permute(0, 3, 1, 2)
    return gather_rows(x)[row_B]
