"""Small pure tensor functions that methods share. No host syncs, no state, no devices.

Logits in 16 bits are read as float32 first: probabilities near a threshold and small losses do not survive 8 bits of mantissa.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.parallel import gather_rows, own_rows, world_size
from fastssl.types import Out, View


def cross_entropy_rows(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Hard-label cross-entropy per row, [B], natural log. Labels must lie in [0, K)."""
    return F.cross_entropy(_at_least_float32(logits_BK), label_B, reduction="none")


def confidence(logits_BK: Tensor) -> tuple[Tensor, Tensor]:
    """(max softmax probability [B], its class [B] int64). Ties go to the lowest class."""
    return torch.softmax(_at_least_float32(logits_BK), dim=-1).max(dim=-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def log_prior(prior_K: Tensor, exponent: float | Tensor, floor: float = 1e-12) -> Tensor:
    """log(prior^exponent + floor), [K]: what logit adjustment adds. ``exponent`` > 0; classes of prior zero get log(floor), not minus infinity."""
    return (prior_K**exponent + floor).log()


def symmetric_kl(p_K: Tensor, q_K: Tensor, floor: float = 1e-12) -> Tensor:
    """(KL(p|q) + KL(q|p)) / 2, scalar, natural log. 0 log 0 = 0; a denominator below ``floor`` counts as ``floor``, so that it stays finite."""

    def kl(a_K: Tensor, b_K: Tensor) -> Tensor:
        return (torch.xlogy(a_K, a_K) - a_K * b_K.clamp_min(floor).log()).sum()

    return (kl(p_K, q_K) + kl(q_K, p_K)) / 2


def class_presence(label_B: Tensor, counted_B: Tensor, num_classes: int, *, last_only: bool = False) -> Tensor:
    """Which classes occur as the label of a row with ``counted_B`` (bool): bool [K].

    ``last_only``: only the last row of each class, in row order, is asked whether it counts.
    """
    is_class_BK = label_B[:, None] == torch.arange(num_classes, device=label_B.device)
    if not last_only:
        return (is_class_BK & counted_B[:, None]).any(0)
    row_B = torch.arange(len(label_B), device=label_B.device)
    last_K = torch.where(is_class_BK, row_B[:, None], -1).amax(0)
    return (last_K >= 0) & counted_B[last_K.clamp_min(0)]


def unit_rows(x_BD: Tensor) -> Tensor:
    """Rows of length 1 (a norm below 1e-12 counts as 1e-12), at least float32."""
    return F.normalize(_at_least_float32(x_BD), dim=-1, eps=1e-12)


def align_rows(prob_BK: Tensor, mean_K: Tensor) -> Tensor:
    """Distribution alignment to the uniform prior: rows of prob / mean, rescaled to sum 1. A class whose mean is 0 counts with the smallest number instead."""
    ratio_BK = prob_BK / mean_K.to(prob_BK.dtype).clamp_min(torch.finfo(prob_BK.dtype).tiny)
    return ratio_BK / ratio_BK.sum(-1, keepdim=True)


def last_of_same(index_B: Tensor) -> Tensor:
    """For each row the last row of the batch with the same index, int64 [B]: writing ``x[last]`` at ``index`` lets the last one win in any order of writes."""
    rows_B = torch.arange(len(index_B), device=index_B.device)
    return torch.where(index_B[:, None] == index_B, rows_B, -1).amax(1)


def similarity(query_BD: Tensor, bank_ND: Tensor) -> Tensor:
    """Inner products [B, N], at least float32 also under autocast: a temperature of 0.1 makes errors of 16-bit cosines ten times larger."""
    with torch.autocast(query_BD.device.type, enabled=False):
        query_BD = _at_least_float32(query_BD)
        return query_BD @ bank_ND.to(query_BD.dtype).T


class InstanceDistributions(NamedTuple):
    """Distributions over a bank of N labelled embeddings: the teacher's, the teacher's calibrated by class probabilities, and the student's logarithm."""

    teacher_BN: Tensor
    calibrated_BN: Tensor
    log_student_BN: Tensor


def instance_distributions(
    student_BD: Tensor, teacher_BD: Tensor, bank_ND: Tensor, label_N: Tensor, prob_BK: Tensor, *, student_temperature: float, teacher_temperature: float
) -> InstanceDistributions:
    """What :func:`instance_matching` compares, as whole matrices."""
    teacher_BN = torch.softmax(similarity(teacher_BD, bank_ND) / teacher_temperature, dim=-1)
    unfolded_BN = teacher_BN * prob_BK[:, label_N]
    calibrated_BN = unfolded_BN / unfolded_BN.sum(-1, keepdim=True).clamp_min(torch.finfo(unfolded_BN.dtype).tiny)
    return InstanceDistributions(teacher_BN, calibrated_BN, torch.log_softmax(similarity(student_BD, bank_ND) / student_temperature, dim=-1))


def instance_matching(
    student_BD: Tensor, teacher_BD: Tensor, bank_ND: Tensor, label_N: Tensor, prob_BK: Tensor, *, student_temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """SimMatch's instance branch (arXiv:2203.06915): (loss [B], class distribution of the teacher's neighbours [B, K]).

    Unit rows ``student_BD`` and ``teacher_BD`` are compared with a bank of unit rows with labels in [0, K).  With W = softmax_j(teacher . bank_j / tt)
    and S the student's at ``student_temperature``:  loss_i = -sum_j Wc_ij log S_ij  with  Wc_ij ~ W_ij prob_i,label(j)  (rows sum to 1, or 0 where the bank
    holds no class that prob allows);  neighbours_ik = sum over entries j of class k of W_ij.  Only ``student_BD`` gets a gradient.
    """
    with torch.no_grad():
        prob_BK = prob_BK.detach()
        teacher_BD = teacher_BD.detach()
    terms = instance_distributions(
        student_BD, teacher_BD, bank_ND, label_N, prob_BK, student_temperature=student_temperature, teacher_temperature=teacher_temperature
    )
    loss_B = -(terms.calibrated_BN * terms.log_student_BN).sum(-1)
    neighbours_BK = torch.zeros_like(prob_BK, dtype=terms.teacher_BN.dtype).index_add(1, label_N, terms.teacher_BN)
    return loss_B, neighbours_BK


def edge_matching(student_SBD: Tensor, teacher_BD: Tensor, bank_ND: Tensor, label_NK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """SimMatchV2's edges to a bank of unit rows with soft labels: (edge-edge loss [S, B], class scores read through the student's edges [S, B, K]).

    With T = softmax(student . bank / t) of each of S views and R that of the teacher:  loss = -sum_j R_j log T_j,  scores = T label.
    Only ``student_SBD`` gets a gradient.
    """
    target_BN = relation(teacher_BD.detach(), bank_ND, temperature).exp()
    log_SBN = relation(student_SBD.flatten(0, 1), bank_ND, temperature).unflatten(0, student_SBD.shape[:2])
    with torch.autocast(student_SBD.device.type, enabled=False):
        scores_SBK = log_SBN.exp() @ label_NK.to(log_SBN.dtype)
    return -(target_BN * log_SBN).sum(-1), scores_SBK


def relation(query_BD: Tensor, bank_ND: Tensor, temperature: float) -> Tensor:
    """log softmax of inner products / temperature, [B, N]."""
    return torch.log_softmax(similarity(query_BD, bank_ND) / temperature, dim=-1)


def propagation_weights(node_BVD: Tensor, *, alpha: float, temperature: float) -> Tensor:
    """Weight with which each of V nodes votes on the label of node 0 after label propagation in a graph of its own for each of B rows, [B, V], rows sum to 1.

    Row 0 of (1 - alpha) (I - alpha M)^-1 with M = row softmax of (node . node / temperature) without self-edges, 0 <= alpha < 1 (SimMatchV2).
    The Neumann series by repeated squaring: the terms left out weigh alpha^(2^rounds), below the rounding of the dtype.  A solver would ask the host
    whether it succeeded.
    """
    node_BVD = _at_least_float32(node_BVD)
    with torch.autocast(node_BVD.device.type, enabled=False):
        loops_VV = torch.eye(node_BVD.shape[1], dtype=torch.bool, device=node_BVD.device)
        power_BVV = alpha * torch.softmax((node_BVD @ node_BVD.mT / temperature).masked_fill(loops_VV, -1e9), dim=-1)
        terms = math.log(torch.finfo(node_BVD.dtype).eps) / math.log(alpha) if alpha > 0 else 1.0
        rounds = max(1, math.ceil(math.log2(max(terms, 1.0)))) + 1
        row_BV = loops_VV[:1].to(node_BVD.dtype).expand(len(node_BVD), -1)
        for n in range(rounds):
            row_BV = row_BV + (row_BV[:, None] @ power_BVV)[:, 0]
            power_BVV = power_BVV @ power_BVV if n + 1 < rounds else power_BVV
    return (1 - alpha) * row_BV


def shrink_loss(score_BK: Tensor, aux_BK: Tensor, confidence_B: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """ShrinkMatch's loss of uncertain rows (arXiv:2308.06777) without its weight: (loss [B], first class that is kept again [B] int64).

    Classes sorted by ``score``, descending (ties: lowest class first), p_0 >= p_1 >= ...:  purity_c = p_0 / (p_0 + p_c + ... + p_K-1),
    c* = the first c >= 2 with purity_c >= threshold, else K - 1.  Kept: class 0 and classes from c* on.  Where ``confidence`` < threshold and purity is
    reached:  loss = confidence (logsumexp of the kept ``aux`` - aux_0), elsewhere 0 (always with fewer than three classes).  Only ``aux`` gets a gradient.
    """
    score_BK, confidence_B = score_BK.detach(), confidence_B.detach()
    sorted_BK, order_BK = score_BK.sort(dim=1, descending=True, stable=True)
    rest_BK = sorted_BK.flip(1).cumsum(1).flip(1)
    place_K = torch.arange(score_BK.shape[1], device=score_BK.device)
    pure_BK = (sorted_BK[:, :1] / (sorted_BK[:, :1] + rest_BK) >= threshold) & (place_K >= 2)
    first_B = torch.where(pure_BK, place_K, score_BK.shape[1] - 1).amin(1)
    aux_BK = _at_least_float32(aux_BK).gather(1, order_BK)
    kept_BK = (place_K == 0) | (place_K >= first_B[:, None])
    loss_B = aux_BK.masked_fill(~kept_BK, -math.inf).logsumexp(1) - aux_BK[:, 0]
    weight_B = torch.where((confidence_B < threshold) & pure_BK.any(1), confidence_B, 0.0)
    return weight_B.to(loss_B.dtype) * loss_B, first_B


# --- the labelled loss and the grouping of forwards ----------------------------------------------------------------------------------------------------


def labeled_views(strong_weight: float) -> dict[str, View]:
    """``x``, the weak labelled view, and ``x_s``, the strong one, if its loss has a weight."""
    weak = {"x": View("labeled", "weak")}
    return weak | {"x_s": View("labeled", "strong")} if strong_weight else weak


def supervised(outs: Mapping[str, Out], label_B: Tensor, strong_weight: float) -> Tensor:
    """mean CE(x, t) + strong_weight mean CE(x_s, t) of the views of :func:`labeled_views`; a scalar."""
    loss = cross_entropy_rows(outs["x"].logits_NC, label_B).mean()
    return loss + strong_weight * cross_entropy_rows(outs["x_s"].logits_NC, label_B).mean() if strong_weight else loss


def forward_views(
    network: Callable[..., Any], views: Mapping[str, Tensor], groups: Sequence[Sequence[str]], no_gradient: Collection[str] = ()
) -> dict[str, Out]:
    """The Out of every named view.

    Each group is one joint forward (one BatchNorm batch), in order; a group all of whose views are in ``no_gradient`` records no graph.
    """
    outs: dict[str, Out] = {}
    for group in groups:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not all(name in no_gradient for name in group)):
            answer = network(*(views[name] for name in group))
        outs |= zip(group, (answer,) if len(group) == 1 else answer, strict=True)
    return outs


def groups_of(names: Sequence[str], separate: bool) -> list[list[str]]:
    """One joint forward of all views, or one forward each."""
    return [[name] for name in names] if separate else [list(names)]


# --- confidence, soft targets, ramps -------------------------------------------------------------------------------------------------------------------


def exceeds(confidence_B: Tensor, threshold: float | Tensor, strict: bool) -> Tensor:
    """confidence > threshold if strict, else >=; bool [B]."""
    return confidence_B > threshold if strict else confidence_B >= threshold


def probabilities(logits_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(logits / temperature), at least in float32."""
    return torch.softmax(_at_least_float32(logits_BK) / temperature, dim=-1)


def soft_cross_entropy_rows(logits_BK: Tensor, target_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_k target_k log softmax(logits / temperature)_k per row, [B]."""
    return -(target_BK * torch.log_softmax(_at_least_float32(logits_BK) / temperature, dim=-1)).sum(-1)


def sigmoid_ramp(epoch: Tensor, length: float, like: Tensor) -> Tensor:
    """exp(-5 (1 - clip(epoch, 0, length) / length)^2), 1 if ``length`` is 0 (Laine and Aila, arXiv:1610.02242); a scalar in the dtype of ``like``."""
    share = (epoch.to(like.dtype) / length).clamp(0, 1) if length > 0 else torch.ones_like(epoch, dtype=like.dtype)
    return torch.exp(-5 * (1 - share) ** 2)


# --- gradients, tables ---------------------------------------------------------------------------------------------------------------------------------


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficient: Tensor) -> Tensor:
        ctx.save_for_backward(coefficient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return -ctx.saved_tensors[0].to(grad.dtype) * grad, None


def reverse_gradient(x: Tensor, coefficient: Tensor) -> Tensor:
    """``x`` itself; its gradient is multiplied by minus ``coefficient``, a scalar (gradient reversal, Ganin and Lempitsky, arXiv:1409.7495)."""
    return _ReverseGradient.apply(x, coefficient)


def last_writer(index_N: Tensor, size: int, writes_N: Tensor | None = None) -> Tensor:
    """What ``for n in 0..N-1: table[index[n]] = n`` would leave at each row's own place: int64 [N], -1 where no row writes.

    ``index_N``: int64 in [0, size); ``writes_N``: bool [N], rows that write at all.  Deterministic on every device, whatever repeats.
    """
    place_N = torch.arange(len(index_N), device=index_N.device)
    if writes_N is not None:
        place_N = torch.where(writes_N, place_N, -1)
    return index_N.new_full((size,), -1).scatter_reduce_(0, index_N, place_N, "amax")[index_N]


def present_class_average(prior_K: Tensor, present_K: Tensor, anchors_AK: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """(prior [K] moved towards the uniform distribution over the classes ``present_K`` (bool), its symmetric divergence to each anchor [A]).

    Where no class is present: the prior as it is, and zeros.
    """
    some, share_K = present_K.any(), present_K.to(prior_K.dtype)
    moved_K = momentum * prior_K + (1 - momentum) * share_K / share_K.sum().clamp_min(1)
    divergence_A = torch.stack([symmetric_kl(moved_K, anchor_K) for anchor_K in anchors_AK])
    return torch.where(some, moved_K, prior_K), torch.where(some, divergence_A, 0.0)


# --- mixing, sharpening, alignment to a prior ----------------------------------------------------------------------------------------------------------


def one_hot(label_B: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Rows [B, K] of the identity; labels in [0, K). A comparison: torch's own asks the host about the range on some devices."""
    return (label_B[:, None] == torch.arange(num_classes, device=label_B.device)).to(dtype)


def sharpen(prob_BK: Tensor, temperature: float) -> Tensor:
    """Rows prob^(1 / temperature), rescaled to sum 1; temperature > 0. By logarithms, so that no power of a small number vanishes before the rescaling."""
    return torch.softmax(prob_BK.clamp_min(torch.finfo(prob_BK.dtype).tiny).log() / temperature, dim=-1)


def align_to(prob_BK: Tensor, mean_K: Tensor, target_K: Tensor) -> Tensor:
    """Distribution alignment: rows prob target / mean, rescaled to sum 1. A mean of 0 counts as the smallest number; a row that is 0 throughout stays 0."""
    smallest = torch.finfo(prob_BK.dtype).tiny
    raised_BK = prob_BK * (target_K.to(prob_BK.dtype) / mean_K.to(prob_BK.dtype).clamp_min(smallest))
    return raised_BK / raised_BK.sum(-1, keepdim=True).clamp_min(smallest)


def mixup(parts: Sequence[Tensor], partner_N: Tensor, weight_N: Tensor) -> list[Tensor]:
    """MixUp (Zhang et al., arXiv:1710.09412) of rows of several parts with partners from all parts of all ranks; no gradient.

    The global list is part 0 of all ranks in rank order, then part 1, ...: N rows.  Row n becomes w_n row_n + (1 - w_n) row_partner(n); this rank's
    rows of each part come back, in fresh tensors.  ``partner_N``: int64, ``weight_N`` in [0, 1], both the same on every rank.
    """
    pool = torch.cat([gather_rows(part) for part in parts])
    mixed, start = [], 0
    for part in parts:
        rows = len(part) * world_size()
        partner_B, weight_B = (own_rows(all_N[start : start + rows]) for all_N in (partner_N, weight_N))
        weight = weight_B.to(part.dtype).view(-1, *[1] * (part.dim() - 1))
        mixed.append(weight * part.detach() + (1 - weight) * pool[partner_B])
        start += rows
    return mixed


def quarter_turns(x_BCHW: Tensor, turns_B: Tensor) -> Tensor:
    """Each square image turned counter-clockwise by its number of quarter turns, int64 [B] in 0 .. 3 (``torch.rot90`` row by row)."""
    turns = turns_B.view(-1, 1, 1, 1)
    x = torch.where(turns % 2 == 1, x_BCHW.mT, x_BCHW)
    x = torch.where((turns == 1) | (turns == 2), x.flip(-2), x)
    return torch.where(turns >= 2, x.flip(-1), x)
