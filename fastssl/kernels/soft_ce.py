"""How far a student's distribution is from a teacher's, row by row, with temperatures, logit adjustment and weights.

Shape letters: B rows, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.kernels.choice import FLOATS, runs_triton

KINDS = ("ce", "kl", "squared")


def consistency(
    student_BC: Tensor,
    teacher_BC: Tensor,
    kind: str = "ce",
    *,
    target_given: bool = False,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    student_shift_C: Tensor | None = None,
    teacher_shift_C: Tensor | None = None,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Loss [B]: weight times, with p the target and q the student's distribution,

        ce       -sum_c p_c log q_c             gradient  (q sum p - p) / Ts
        kl       sum_c p_c (log p_c - log q_c)            the same
        squared  sum_c (q_c - p_c)^2                      2 q (q - p - sum q (q - p)) / Ts
        q = softmax((student + student_shift) / Ts)      p = softmax((teacher + teacher_shift) / Tt), or ``teacher`` itself if ``target_given``

    Only student logits get a gradient.  A target of 0 counts as 0, also where the student's logit is -inf; so does a row of weight 0, whatever it holds.
    Sums are over classes: a mean squared error divides by C itself.  Raises ValueError for another ``kind``.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    teacher_BC = teacher_BC.detach()
    student_shift_C, teacher_shift_C, weight_B = (t.detach() if t is not None else None for t in (student_shift_C, teacher_shift_C, weight_B))
    rest = (student_shift_C, teacher_shift_C, weight_B, kind, target_given, float(student_temperature), float(teacher_temperature))
    if runs_triton(student_BC, teacher_BC, student_shift_C, teacher_shift_C, weight_B):
        return _forward(student_BC, teacher_BC, *rest)[0]
    return reference(student_BC, teacher_BC, *rest)


def reference(
    student_BC: Tensor, teacher_BC: Tensor, student_shift_C: Tensor | None, teacher_shift_C: Tensor | None, weight_B: Tensor | None, kind: str,
    target_given: bool, student_temperature: float, teacher_temperature: float,
) -> Tensor:  # fmt: skip
    """The same in torch operations, in the logits' own precision (at least float32)."""
    log_q_BC = torch.log_softmax(_adjusted(student_BC, student_shift_C, student_temperature), dim=-1)
    p_BC = _adjusted(teacher_BC, None, 1.0) if target_given else torch.softmax(_adjusted(teacher_BC, teacher_shift_C, teacher_temperature), dim=-1)
    counts_BC = p_BC > 0
    if kind == "squared":
        loss_B = (log_q_BC.exp() - p_BC).square().sum(-1)
    else:
        p_BC = torch.where(counts_BC, p_BC, 0.0)
        loss_B = -(p_BC * torch.where(counts_BC, log_q_BC, 0.0)).sum(-1)
        loss_B = loss_B + torch.xlogy(p_BC, p_BC).sum(-1) if kind == "kl" else loss_B
    return loss_B if weight_B is None else torch.where(weight_B != 0, weight_B * loss_B, 0.0)


def _adjusted(logits_BC: Tensor, shift_C: Tensor | None, temperature: float) -> Tensor:
    logits_BC = logits_BC.float() if logits_BC.dtype in FLOATS else logits_BC
    logits_BC = logits_BC if shift_C is None else logits_BC + shift_C
    return logits_BC if temperature == 1 else logits_BC / temperature


# --- Triton --------------------------------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastssl::consistency", mutates_args=())
def _forward(
    student: Tensor, teacher: Tensor, student_shift: Tensor | None, teacher_shift: Tensor | None, weight: Tensor | None, kind: str, given: bool,
    student_temperature: float, teacher_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastssl.kernels import triton_soft_ce as side

    out = side.numbers(len(student), student.device)
    tensors = {"student": _rows(student), "teacher": _rows(teacher), "student_shift": student_shift, "teacher_shift": teacher_shift, "weight": weight, **out}
    side.launch(side.consistency_forward_kernel, tensors, kind, given, student_temperature, teacher_temperature).run()
    return out["loss"], out["student_lse"], out["teacher_lse"], out["moment"]


@_forward.register_fake
def _(student, *_):  # type: ignore[no-untyped-def]
    return tuple(student.new_empty(len(student), dtype=torch.float32) for _ in range(4))


@torch.library.custom_op("fastssl::consistency_backward", mutates_args=())
def _backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, student_shift: Tensor | None, teacher_shift: Tensor | None, weight: Tensor | None,
    student_lse: Tensor, teacher_lse: Tensor, moment: Tensor, kind: str, given: bool, student_temperature: float, teacher_temperature: float,
) -> Tensor:  # fmt: skip
    from fastssl.kernels import triton_soft_ce as side

    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    tensors = {
        "grad_loss": grad_loss.contiguous(), "student": _rows(student), "teacher": _rows(teacher), "student_shift": student_shift,
        "teacher_shift": teacher_shift, "weight": weight, "student_lse": student_lse, "teacher_lse": teacher_lse, "moment": moment, "grad": grad,
    }  # fmt: skip
    side.launch(side.consistency_backward_kernel, tensors, kind, given, student_temperature, teacher_temperature).run()
    return grad


@_backward.register_fake
def _(grad_loss, student, *_):  # type: ignore[no-untyped-def]
    return student.new_empty(student.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.rest = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
    return None if grad_loss is None else _backward(grad_loss, *ctx.saved_tensors, *ctx.rest), *[None] * 8


_forward.register_autograd(_grads, setup_context=_setup)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def bytes_moved(rows: int, classes: int, *, itemsize: int = 2, target_itemsize: int = 2, selected: float = 1.0) -> tuple[int, int]:
    """(bytes that the forward and backward kernels move through memory, the least that any implementation must).

    ``selected``: share of rows whose weight is not 0; ``target_itemsize``: 4 for given float32 probabilities.  Least: both matrices read once, gradients
    written once.  The backward pass reads both again; second and third reads by one program count as served from the cache.
    """
    student, teacher = int(selected * rows * classes * itemsize), int(selected * rows * classes * target_itemsize)
    written = rows * classes * itemsize
    return 2 * (student + teacher) + written + rows * 4 * 10, student + teacher + written
