"""Triton side of ``pseudo_label_ce``: a tile of rows in one program, classes in blocks with running maxima; float32 throughout.

Every logit is read once by the forward pass (weak ones again where the target is soft) and strong ones of selected rows once by the backward pass,
which computes their softmax anew instead of keeping it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.launch import Launch, tile


@triton.jit
def adjusted(logits, shift, c, row_offset, valid, inverse, C: tl.constexpr, SHIFT: tl.constexpr):
    """float32 (logits + shift) * inverse of a [rows, classes] tile; -inf where not valid."""
    inside = valid & (c < C)[None, :]
    x = tl.load(logits + row_offset[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        x += tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside, x * inverse, -float("inf"))


@triton.jit
def finite(largest):
    """What may be subtracted from logits: the largest one, or 0 where all of them are -inf."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def pseudo_label_ce_forward_kernel(
    weak, strong, weak_shift, strong_shift, thresholds, weight, counted,
    loss, confidence, label, mask, used, weak_max, strong_lse, target,
    rows, weak_stride, strong_stride, threshold, inverse,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SOFT: tl.constexpr, WEAK_SHIFT: tl.constexpr, STRONG_SHIFT: tl.constexpr,
    THRESHOLDS: tl.constexpr, STRICT: tl.constexpr, WEIGHT: tl.constexpr, COUNTED: tl.constexpr, STRONG: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """THRESHOLDS: 0 the number ``threshold``, 1 one tensor element, 2 one per class.  STRONG, TARGET: whether those tensors are there."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    place = row.to(tl.int64)
    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    best_class = tl.zeros([ROWS], tl.int32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = adjusted(weak, weak_shift, c, place * weak_stride, alive[:, None], inverse, C, WEAK_SHIFT)
        top, top_place = tl.max(x, axis=1, return_indices=True, return_indices_tie_break_left=True)
        best_class = tl.where(top > best, start + top_place, best_class)
        new = tl.maximum(best, top)
        total = total * tl.exp(best - finite(new)) + tl.sum(tl.exp(x - finite(new)[:, None]), axis=1)
        best = new
    nothing = best == -float("inf")
    sure = tl.where(nothing, float("nan"), 1.0 / tl.where(nothing, 1.0, total))
    tl.store(confidence + row, sure, mask=alive)
    tl.store(label + row, best_class.to(tl.int64), mask=alive)
    tl.store(weak_max + row, best, mask=alive)

    if THRESHOLDS == 2:
        needed = tl.load(thresholds + best_class, mask=alive, other=0.0).to(tl.float32)
    elif THRESHOLDS == 1:
        needed = tl.load(thresholds).to(tl.float32) + tl.zeros([ROWS], tl.float32)
    else:
        needed = tl.zeros([ROWS], tl.float32) + threshold
    passed = sure > needed if STRICT else sure >= needed
    if COUNTED:
        passed = passed | (tl.load(counted + row, mask=alive, other=0) != 0)
    w = tl.where(passed, 1.0, 0.0)
    tl.store(mask + row, w, mask=alive)
    if WEIGHT:
        w = w * tl.load(weight + row, mask=alive, other=0.0).to(tl.float32)
    if STRONG:
        tl.store(used + row, w, mask=alive)
    selected = alive & (w != 0)

    if STRONG or TARGET:
        high = tl.full([ROWS], -float("inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        picked = tl.zeros([ROWS], tl.float32)
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            p = tl.zeros([ROWS, BLOCK], tl.float32)
            if SOFT:
                x = adjusted(weak, weak_shift, c, place * weak_stride, (alive if TARGET else selected)[:, None], inverse, C, WEAK_SHIFT)
                p = tl.exp(x - finite(best)[:, None]) * sure[:, None]
                if TARGET:
                    tl.store(target + place[:, None] * C + c[None, :], p, mask=alive[:, None] & (c < C)[None, :])
            else:
                p = tl.where(c[None, :] == best_class[:, None], 1.0, 0.0)
            if STRONG:
                y = adjusted(strong, strong_shift, c, place * strong_stride, selected[:, None], 1.0, C, STRONG_SHIFT)
                new = tl.maximum(high, tl.max(y, axis=1))
                mass = mass * tl.exp(high - finite(new)) + tl.sum(tl.exp(y - finite(new)[:, None]), axis=1)
                high = new
                picked += tl.sum(p * tl.where(p > 0, y, 0.0), axis=1)
        if STRONG:
            lse = tl.where(high == -float("inf"), float("nan"), high + tl.log(tl.where(high == -float("inf"), 1.0, mass)))
            tl.store(strong_lse + row, tl.where(selected, lse, 0.0), mask=alive)
            tl.store(loss + row, tl.where(selected, w * (lse - picked), 0.0), mask=alive)


@triton.jit
def pseudo_label_ce_backward_kernel(
    grad_loss, weak, strong, weak_shift, strong_shift, confidence, label, used, weak_max, strong_lse, grad,
    rows, weak_stride, strong_stride, inverse,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SOFT: tl.constexpr, WEAK_SHIFT: tl.constexpr, STRONG_SHIFT: tl.constexpr,
):  # fmt: skip
    """grad = grad_loss weight (softmax(strong) - target), zeros without reading a logit where the weight is 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    place = row.to(tl.int64)
    w = tl.load(used + row, mask=alive, other=0.0)
    selected = alive & (w != 0)
    scale = tl.where(selected, w * tl.load(grad_loss + row, mask=alive, other=0.0).to(tl.float32), 0.0)
    lse = tl.load(strong_lse + row, mask=selected, other=0.0)
    best = tl.load(weak_max + row, mask=selected, other=0.0)
    sure = tl.load(confidence + row, mask=selected, other=0.0)
    kind = tl.load(label + row, mask=selected, other=0)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        y = adjusted(strong, strong_shift, c, place * strong_stride, selected[:, None], 1.0, C, STRONG_SHIFT)
        if SOFT:
            x = adjusted(weak, weak_shift, c, place * weak_stride, selected[:, None], inverse, C, WEAK_SHIFT)
            p = tl.exp(x - finite(best)[:, None]) * sure[:, None]
        else:
            p = tl.where(c[None, :] == kind[:, None], 1.0, 0.0)
        g = tl.where(selected[:, None], scale[:, None] * (tl.exp(y - lse[:, None]) - p), 0.0)
        tl.store(grad + place[:, None] * C + c[None, :], g.to(grad.dtype.element_ty), mask=alive[:, None] & (c < C)[None, :])


def forward_launch(
    weak: Tensor, strong: Tensor | None, weak_shift: Tensor | None, strong_shift: Tensor | None, thresholds: Tensor | None, weight: Tensor | None,
    counted: Tensor | None, out: dict[str, Tensor], *, threshold: float, temperature: float, strict: bool, soft: bool, write_target: bool,
) -> Launch:  # fmt: skip
    """The forward call; ``out``: what the kernel writes, by its names."""
    rows, classes = weak.shape
    tile_rows, block = tile(rows, classes)
    arguments = {
        "weak": weak, "strong": strong, "weak_shift": weak_shift, "strong_shift": strong_shift, "thresholds": thresholds, "weight": weight,
        "counted": counted, **out, "rows": rows, "weak_stride": weak.stride(0), "strong_stride": strong.stride(0) if strong is not None else 0,
        "threshold": threshold, "inverse": 1.0 / temperature,
    }  # fmt: skip
    constants = {
        "C": classes, "BLOCK": block, "ROWS": tile_rows, "SOFT": soft, "WEAK_SHIFT": weak_shift is not None, "STRONG_SHIFT": strong_shift is not None,
        "THRESHOLDS": 0 if thresholds is None else 2 if thresholds.dim() else 1, "STRICT": strict, "WEIGHT": weight is not None,
        "COUNTED": counted is not None, "STRONG": strong is not None, "TARGET": write_target,
    }  # fmt: skip
    return Launch(pseudo_label_ce_forward_kernel, (triton.cdiv(rows, tile_rows),), arguments, constants)


def backward_launch(
    grad_loss: Tensor, weak: Tensor, strong: Tensor, weak_shift: Tensor | None, strong_shift: Tensor | None, kept: dict[str, Tensor], grad: Tensor,
    *, temperature: float, soft: bool,
) -> Launch:  # fmt: skip
    """The backward call; ``kept``: confidence, label, used, weak_max and strong_lse of the forward call."""
    rows, classes = strong.shape
    tile_rows, block = tile(rows, classes)
    arguments = {
        "grad_loss": grad_loss, "weak": weak, "strong": strong, "weak_shift": weak_shift, "strong_shift": strong_shift, **kept, "grad": grad,
        "rows": rows, "weak_stride": weak.stride(0), "strong_stride": strong.stride(0), "inverse": 1.0 / temperature,
    }  # fmt: skip
    constants = {"C": classes, "BLOCK": block, "ROWS": tile_rows, "SOFT": soft, "WEAK_SHIFT": weak_shift is not None, "STRONG_SHIFT": strong_shift is not None}
    return Launch(pseudo_label_ce_backward_kernel, (triton.cdiv(rows, tile_rows),), arguments, constants)


def empty_outputs(weak: Tensor, strong: Tensor | None, write_target: bool) -> dict[str, Tensor]:
    """Room for what the forward kernel writes; no rows for what it does not."""
    rows = len(weak)

    def numbers(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=weak.device)

    out = {name: numbers(rows) for name in ("confidence", "mask", "weak_max")}
    out |= {name: numbers(rows if strong is not None else 0) for name in ("loss", "used", "strong_lse")}
    out["label"] = torch.empty(rows, dtype=torch.int64, device=weak.device)
    out["target"] = torch.empty(rows if write_target else 0, weak.shape[1], dtype=torch.float32, device=weak.device)
    return out
