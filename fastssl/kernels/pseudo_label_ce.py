"""Pseudo-labels and the masked cross-entropy that they teach, in one pass over the logits.

Shape letters: U unlabelled rows, C classes, V strong views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.functional import cross_entropy_rows, exceeds
from fastssl.kernels.choice import FLOATS, runs_triton


class PseudoLabelCE(NamedTuple):
    """``loss_VU``: each strong view's rows, masked and weighted.  ``mask_U``: 0 or 1, before any weight.  ``target_UC``: the soft target, if asked for."""

    loss_VU: Tensor
    confidence_U: Tensor
    label_U: Tensor
    mask_U: Tensor
    target_UC: Tensor | None


def pseudo_label_ce(
    weak_UC: Tensor,
    strong: Sequence[Tensor] = (),
    *,
    threshold: float | Tensor = 0.0,
    strict: bool = False,
    weak_shift_C: Tensor | None = None,
    temperature: float = 1.0,
    strong_shift_C: Tensor | None = None,
    weight_U: Tensor | None = None,
    counted_U: Tensor | None = None,
    soft: bool = False,
) -> PseudoLabelCE:
    """What a confident row's weak view says, and how far each strong view is from it.

        q_i = softmax((weak_i + weak_shift) / temperature)      h_i, p_i = argmax, max of q_i (ties: lowest class)
        m_i = 1[p_i >= threshold, or > if strict; or counted_i]
        loss_vi = weight_i m_i CE(strong_vi + strong_shift, h_i),  or with the target q_i if ``soft``
        d loss_vi / d strong_vi = weight_i m_i (softmax(strong_vi + strong_shift) - target_i)

    FixMatch's rule (arXiv:2001.07685) with the knobs of its successors.  ``threshold``: a number, a scalar tensor, or one per class [C] that is read at
    h_i (FlexMatch); ``weak_shift_C``: -log prior (DebiasMatch, ACR), +log prior (SimPro), log ratio for distribution alignment; ``strong_shift_C``:
    logit adjustment; ``weight_U``: any number per row (SoftMatch, with threshold 0); ``counted_U``: bool, rows that count whatever their confidence.
    ``strong`` may be empty: then only the pseudo-labels are computed.  Only strong logits get a gradient.  Every term whose target or weight is 0 counts as
    0, also where the logit is -inf; a row whose weak logits are all -inf, or hold a NaN, has confidence NaN and never passes a threshold.

    Triton and reference differ by rounding only: at a confidence within rounding of the threshold the mask may differ, and where two logits differ but
    their probabilities round to one number the reference calls it a tie, Triton does not.  16-bit logits are read as float32.
    """
    weak_UC = weak_UC.detach()
    weak_shift_C, strong_shift_C, weight_U = (t.detach() if t is not None else None for t in (weak_shift_C, strong_shift_C, weight_U))
    per_row = threshold.detach() if isinstance(threshold, Tensor) else None
    if runs_triton(weak_UC, *strong, weak_shift_C, strong_shift_C, weight_U, per_row):
        number = 0.0 if isinstance(threshold, Tensor) else float(threshold)
        return _triton(weak_UC, strong, weak_shift_C, strong_shift_C, weight_U, per_row, counted_U, number, temperature, strict, soft)
    needed = threshold if per_row is None else per_row
    return reference(weak_UC, strong, weak_shift_C, strong_shift_C, weight_U, needed, counted_U, temperature, strict, soft)


def reference(
    weak_UC: Tensor, strong: Sequence[Tensor], weak_shift_C: Tensor | None, strong_shift_C: Tensor | None, weight_U: Tensor | None,
    threshold: float | Tensor, counted_U: Tensor | None, temperature: float, strict: bool, soft: bool,
) -> PseudoLabelCE:  # fmt: skip
    """The same in torch operations, in the logits' own precision (at least float32)."""
    weak_UC = _at_least_float32(weak_UC)
    adjusted_UC = _shifted(weak_UC, weak_shift_C)
    target_UC = torch.softmax(adjusted_UC if temperature == 1 else adjusted_UC / temperature, dim=-1)
    confidence_U, label_U = target_UC.max(dim=-1)
    needed = threshold[label_U] if isinstance(threshold, Tensor) and threshold.dim() else threshold
    passed_U = exceeds(confidence_U, needed, strict)  # type: ignore[arg-type]
    mask_U = (passed_U if counted_U is None else passed_U | counted_U).to(weak_UC.dtype)  # a prior in float64 moves no loss to float64
    used_U = mask_U if weight_U is None else mask_U * weight_U
    losses = []
    for logits_UC in strong:
        logits_UC = _shifted(_at_least_float32(logits_UC), strong_shift_C)
        rows_U = _soft_rows(logits_UC, target_UC) if soft else cross_entropy_rows(logits_UC, label_U)
        losses.append(torch.where(used_U != 0, used_U * rows_U, 0.0))
    loss_VU = torch.stack(losses) if losses else weak_UC.new_empty(0, len(weak_UC))
    return PseudoLabelCE(loss_VU, confidence_U, label_U, mask_U, target_UC if soft else None)


def _shifted(logits_UC: Tensor, shift_C: Tensor | None) -> Tensor:
    return logits_UC if shift_C is None else logits_UC + shift_C


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in FLOATS else x


def _soft_rows(logits_UC: Tensor, target_UC: Tensor) -> Tensor:
    counts_UC = target_UC > 0
    return -(torch.where(counts_UC, target_UC, 0.0) * torch.where(counts_UC, torch.log_softmax(logits_UC, dim=-1), 0.0)).sum(-1)


# --- Triton --------------------------------------------------------------------------------------------------------------------------------------------


def _triton(
    weak_UC: Tensor, strong: Sequence[Tensor], weak_shift_C: Tensor | None, strong_shift_C: Tensor | None, weight_U: Tensor | None,
    thresholds: Tensor | None, counted_U: Tensor | None, threshold: float, temperature: float, strict: bool, soft: bool,
) -> PseudoLabelCE:  # fmt: skip
    """One launch per strong view: the second finds the weak logits in the cache."""
    losses: list[Tensor] = []
    confidence_U = label_U = mask_U = target_UC = None
    views: list[Tensor | None] = list(strong) or [None]
    for n, view in enumerate(views):
        out = _forward(
            weak_UC, view, weak_shift_C, strong_shift_C, thresholds, weight_U, counted_U, threshold, temperature, strict, soft, soft and n == 0
        )  # fmt: skip
        if n == 0:
            _, confidence_U, label_U, mask_U, *_, target_UC = out
        losses.append(out[0])
    assert confidence_U is not None and label_U is not None and mask_U is not None
    loss_VU = torch.stack(losses) if strong else confidence_U.new_empty(0, len(weak_UC))
    return PseudoLabelCE(loss_VU, confidence_U, label_U, mask_U, target_UC if soft else None)


@torch.library.custom_op("fastssl::pseudo_label_ce", mutates_args=())
def _forward(
    weak: Tensor, strong: Tensor | None, weak_shift: Tensor | None, strong_shift: Tensor | None, thresholds: Tensor | None, weight: Tensor | None,
    counted: Tensor | None, threshold: float, temperature: float, strict: bool, soft: bool, write_target: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastssl.kernels import triton_pseudo_label_ce as side

    out = side.empty_outputs(weak, strong, write_target)
    side.forward_launch(
        _rows(weak), None if strong is None else _rows(strong), weak_shift, strong_shift, thresholds, weight, counted, out,
        threshold=threshold, temperature=temperature, strict=strict, soft=soft, write_target=write_target,
    ).run()  # fmt: skip
    return out["loss"], out["confidence"], out["label"], out["mask"], out["used"], out["weak_max"], out["strong_lse"], out["target"]


@_forward.register_fake
def _(weak, strong, weak_shift, strong_shift, thresholds, weight, counted, threshold, temperature, strict, soft, write_target):  # type: ignore[no-untyped-def]
    numbers = [weak.new_empty(len(weak), dtype=torch.float32) for _ in range(3)]
    taught = [weak.new_empty(len(weak) if strong is not None else 0, dtype=torch.float32) for _ in range(3)]
    label = weak.new_empty(len(weak), dtype=torch.int64)
    target = weak.new_empty(len(weak) if write_target else 0, weak.shape[1], dtype=torch.float32)
    return taught[0], numbers[0], label, numbers[1], taught[1], numbers[2], taught[2], target


@torch.library.custom_op("fastssl::pseudo_label_ce_backward", mutates_args=())
def _backward(
    grad_loss: Tensor, weak: Tensor, strong: Tensor, weak_shift: Tensor | None, strong_shift: Tensor | None, confidence: Tensor, label: Tensor,
    used: Tensor, weak_max: Tensor, strong_lse: Tensor, temperature: float, soft: bool,
) -> Tensor:  # fmt: skip
    from fastssl.kernels import triton_pseudo_label_ce as side

    grad = torch.empty(strong.shape, dtype=strong.dtype, device=strong.device)
    kept = {"confidence": confidence, "label": label, "used": used, "weak_max": weak_max, "strong_lse": strong_lse}
    call = side.backward_launch(
        grad_loss.contiguous(), _rows(weak), _rows(strong), weak_shift, strong_shift, kept, grad, temperature=temperature, soft=soft
    )  # fmt: skip
    call.run()
    return grad


@_backward.register_fake
def _(grad_loss, weak, strong, weak_shift, strong_shift, confidence, label, used, weak_max, strong_lse, temperature, soft):  # type: ignore[no-untyped-def]
    return strong.new_empty(strong.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weak, strong, weak_shift, strong_shift, *_ = inputs
    _, confidence, label, mask, used, weak_max, strong_lse, target = output
    ctx.save_for_backward(weak, strong, weak_shift, strong_shift, confidence, label, used, weak_max, strong_lse)
    ctx.temperature, ctx.soft = inputs[8], inputs[10]
    ctx.mark_non_differentiable(confidence, label, mask, used, weak_max, strong_lse, target)
    ctx.set_materialize_grads(False)


def _grads(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    grad = None if grad_loss is None or ctx.saved_tensors[1] is None else _backward(grad_loss, *ctx.saved_tensors, ctx.temperature, ctx.soft)
    return None, grad, *[None] * 10


_forward.register_autograd(_grads, setup_context=_setup)


def _rows(x: Tensor) -> Tensor:
    """A matrix whose rows are contiguous; ranges of rows stay where they are."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def bytes_moved(rows: int, classes: int, views: int = 1, *, itemsize: int = 2, soft: bool = False, selected: float = 1.0) -> tuple[int, int]:
    """(bytes that the forward and backward kernels move through memory, the least that any implementation must).

    ``selected``: share of rows whose weight is not 0.  Least: weak and strong logits read once, gradients written once.  Second reads of the weak logits
    by the same program count as served from the cache; the backward pass reads strong logits (and weak ones for a soft target) again.
    """
    logits = rows * classes * itemsize
    taught = int(selected * logits)
    numbers = rows * (4 * 6 + 8) * (views or 1) + rows * (4 * 5 + 8) * views
    target = rows * classes * 4 if soft else 0
    forward = (views or 1) * logits + views * taught + target
    backward = views * (taught * (2 if soft else 1) + logits)
    return forward + backward + numbers, logits + views * taught + target + views * logits
