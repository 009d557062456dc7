"""Two heads that learn from pseudo-labels of one of them (ACR), built of :func:`pseudo_label_ce`.

Shape letters: U unlabelled rows, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastssl.functional import cross_entropy_rows
from fastssl.kernels.pseudo_label_ce import pseudo_label_ce


class TwoHeads(NamedTuple):
    """What :func:`two_head_losses` says of a step: four scalar terms, then rows [U]: label and mask of both heads, and what the balanced head itself sees."""

    sup: Tensor
    unsup: Tensor
    sup_balanced: Tensor
    unsup_balanced: Tensor
    label_U: Tensor
    mask_U: Tensor
    confidence_U: Tensor
    label_balanced_U: Tensor
    mask_balanced_U: Tensor
    seen_U: Tensor
    seen_mask_U: Tensor


def two_head_losses(
    standard: Sequence[Tensor], balanced: Sequence[Tensor], label_B: Tensor, shifts: Sequence[Tensor], threshold: float, temperature: float
) -> TwoHeads:
    """Consistency with two heads whose hard labels both come from the standard head, freed of the labelled class distribution (ACR).

    ``standard`` and ``balanced``: logits of (x, u_w, strong views ...). ``shifts``, three of [K]: taken from the standard head's logits for its own labels
    and for the balanced head's labels, and added to the balanced head's labelled logits. A row counts for the standard head if its label or the bare head
    is confident (>= threshold), for the balanced head if its label or the balanced head itself is; other rows stay in the denominator.
    """
    sup, sup_balanced = (cross_entropy_rows(logits, label_B).mean() for logits in (standard[0], balanced[0] + shifts[2]))
    bare, seen = (pseudo_label_ce(logits[1], threshold=threshold, temperature=temperature) for logits in (standard, balanced))
    own, given = (
        pseudo_label_ce(standard[1], head[2:], threshold=threshold, temperature=temperature, weak_shift_C=-shift_K, counted_U=other.mask_U > 0)
        for head, shift_K, other in ((standard, shifts[0], bare), (balanced, shifts[1], seen))
    )
    return TwoHeads(
        sup, own.loss_VU.mean(), sup_balanced, given.loss_VU.mean(), own.label_U, own.mask_U, own.confidence_U, given.label_U, given.mask_U,
        seen.label_U, seen.mask_U > 0,
    )  # fmt: skip
