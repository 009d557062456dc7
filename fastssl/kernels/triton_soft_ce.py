"""Triton side of ``consistency``: a tile of rows in one program, classes in blocks with running maxima; float32 throughout."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.launch import Launch, tile
from fastssl.kernels.triton_pseudo_label_ce import adjusted, finite

KINDS = {"ce": 0, "kl": 1, "squared": 2}


@triton.jit
def log_sum(logits, shift, row_offset, wanted, inverse, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr):
    """log sum exp of each wanted row, NaN where all of it is -inf."""
    high = tl.full([ROWS], -float("inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for start in range(0, C, BLOCK):
        x = adjusted(logits, shift, start + tl.arange(0, BLOCK), row_offset, wanted[:, None], inverse, C, SHIFT)
        new = tl.maximum(high, tl.max(x, axis=1))
        mass = mass * tl.exp(high - finite(new)) + tl.sum(tl.exp(x - finite(new)[:, None]), axis=1)
        high = new
    nothing = high == -float("inf")
    return tl.where(nothing, float("nan"), high + tl.log(tl.where(nothing, 1.0, mass)))


@triton.jit
def target_of(teacher, shift, c, row_offset, wanted, inverse, lse, C: tl.constexpr, SHIFT: tl.constexpr, GIVEN: tl.constexpr):
    """(probabilities, their logarithms where they are not 0) of a tile of the teacher; GIVEN: it holds probabilities already."""
    if GIVEN:
        p = tl.load(teacher + row_offset[:, None] + c[None, :], mask=wanted & (c < C)[None, :], other=0.0).to(tl.float32)
        logarithm = tl.log(tl.where(p > 0, p, 1.0))
    else:
        x = adjusted(teacher, shift, c, row_offset, wanted, inverse, C, SHIFT)
        p = tl.where(wanted, tl.exp(x - lse[:, None]), 0.0)
        logarithm = tl.where(p > 0, x - lse[:, None], 0.0)
    return p, logarithm


@triton.jit
def consistency_forward_kernel(
    student, teacher, student_shift, teacher_shift, weight, loss, student_lse, teacher_lse, moment, rows, student_stride, teacher_stride,
    inverse_s, inverse_t,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, GIVEN: tl.constexpr, WEIGHT: tl.constexpr,
    STUDENT_SHIFT: tl.constexpr, TEACHER_SHIFT: tl.constexpr,
):  # fmt: skip
    """``moment``: what the gradient needs of the whole row: sum of the target, or for the squared error sum q (q - p)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    place = row.to(tl.int64)
    w = tl.zeros([ROWS], tl.float32) + 1.0
    if WEIGHT:
        w = tl.load(weight + row, mask=alive, other=0.0).to(tl.float32)
    wanted = alive & (w != 0)
    s_lse = log_sum(student, student_shift, place * student_stride, wanted, inverse_s, C, BLOCK, ROWS, STUDENT_SHIFT)
    t_lse = tl.zeros([ROWS], tl.float32)
    if not GIVEN:
        t_lse = log_sum(teacher, teacher_shift, place * teacher_stride, wanted, inverse_t, C, BLOCK, ROWS, TEACHER_SHIFT)
    total, moments = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        p, log_p = target_of(teacher, teacher_shift, c, place * teacher_stride, wanted[:, None], inverse_t, t_lse, C, TEACHER_SHIFT, GIVEN)
        y = adjusted(student, student_shift, c, place * student_stride, wanted[:, None], inverse_s, C, STUDENT_SHIFT)
        if KIND == 2:
            q = tl.where(wanted[:, None], tl.exp(y - s_lse[:, None]), 0.0)
            total += tl.sum((q - p) * (q - p), axis=1)
            moments += tl.sum(q * (q - p), axis=1)
        else:
            log_q = tl.where(p > 0, y - s_lse[:, None], 0.0)
            total += tl.sum(p * ((log_p - log_q) if KIND == 1 else -log_q), axis=1)
            moments += tl.sum(p, axis=1)
    tl.store(loss + row, tl.where(wanted, w * total, 0.0), mask=alive)
    tl.store(student_lse + row, tl.where(wanted, s_lse, 0.0), mask=alive)
    tl.store(teacher_lse + row, tl.where(wanted, t_lse, 0.0), mask=alive)
    tl.store(moment + row, moments, mask=alive)


@triton.jit
def consistency_backward_kernel(
    grad_loss, student, teacher, student_shift, teacher_shift, weight, student_lse, teacher_lse, moment, grad, rows, student_stride, teacher_stride,
    inverse_s, inverse_t,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, GIVEN: tl.constexpr, WEIGHT: tl.constexpr,
    STUDENT_SHIFT: tl.constexpr, TEACHER_SHIFT: tl.constexpr,
):  # fmt: skip
    """Zeros, without reading a logit, where the weight is 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    place = row.to(tl.int64)
    w = tl.zeros([ROWS], tl.float32) + 1.0
    if WEIGHT:
        w = tl.load(weight + row, mask=alive, other=0.0).to(tl.float32)
    wanted = alive & (w != 0)
    scale = tl.where(wanted, w * inverse_s * tl.load(grad_loss + row, mask=alive, other=0.0).to(tl.float32), 0.0)
    s_lse = tl.load(student_lse + row, mask=wanted, other=0.0)
    t_lse = tl.load(teacher_lse + row, mask=wanted, other=0.0)
    m = tl.load(moment + row, mask=wanted, other=0.0)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        p, log_p = target_of(teacher, teacher_shift, c, place * teacher_stride, wanted[:, None], inverse_t, t_lse, C, TEACHER_SHIFT, GIVEN)
        q = tl.exp(adjusted(student, student_shift, c, place * student_stride, wanted[:, None], inverse_s, C, STUDENT_SHIFT) - s_lse[:, None])
        g = 2.0 * q * (q - p - m[:, None]) if KIND == 2 else q * m[:, None] - p
        g = tl.where(wanted[:, None], scale[:, None] * g, 0.0)
        tl.store(grad + place[:, None] * C + c[None, :], g.to(grad.dtype.element_ty), mask=alive[:, None] & (c < C)[None, :])


def launch(kernel: object, tensors: dict[str, Tensor | None], kind: str, given: bool, student_temperature: float, teacher_temperature: float) -> Launch:
    """Either call; ``tensors`` by the kernel's names."""
    student, teacher = tensors["student"], tensors["teacher"]
    assert student is not None and teacher is not None
    rows, classes = student.shape
    tile_rows, block = tile(rows, classes)
    arguments = {
        **tensors, "rows": rows, "student_stride": student.stride(0), "teacher_stride": teacher.stride(0), "inverse_s": 1.0 / student_temperature,
        "inverse_t": 1.0 / teacher_temperature,
    }  # fmt: skip
    constants = {
        "C": classes, "BLOCK": block, "ROWS": tile_rows, "KIND": KINDS[kind], "GIVEN": given, "WEIGHT": tensors["weight"] is not None,
        "STUDENT_SHIFT": tensors["student_shift"] is not None, "TEACHER_SHIFT": tensors["teacher_shift"] is not None,
    }  # fmt: skip
    return Launch(kernel, (triton.cdiv(rows, tile_rows),), arguments, constants)


def numbers(rows: int, device: torch.device) -> dict[str, Tensor]:
    """Room for what the forward kernel writes."""
    return {name: torch.empty(rows, dtype=torch.float32, device=device) for name in ("loss", "student_lse", "teacher_lse", "moment")}
