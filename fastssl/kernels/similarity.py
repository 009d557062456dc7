"""SimMatch's instance branch without the [batch, bank] matrices.

Shape letters: B rows, N bank entries, K classes, D embedding dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl import functional
from fastssl.kernels.choice import mode, runs_triton

CROSSOVER = 1 << 25  # entries of one [B, N] matrix (128 MB) from which mode "auto" takes Triton; chosen for memory, not measured
TORCH_WRITES, TORCH_READS = 13, 17  # of [B, N] matrices, forward and backward; counted by a test
WIDEST = 128  # embedding dimensions that the kernels hold at once


def instance_matching(
    student_BD: Tensor, teacher_BD: Tensor, bank_ND: Tensor, label_N: Tensor, prob_BK: Tensor, *, student_temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """(loss [B], class distribution of the teacher's neighbours [B, K]) of :func:`fastssl.functional.instance_matching`, which is the reference.

        W = softmax_j(teacher . bank_j / tt)      S = softmax_j(student . bank_j / st)      Wc_ij ~ W_ij prob_i,label(j), rows sum to 1 or 0
        loss_i = -sum_j Wc_ij log S_ij = lse_i - sum_j Wc_ij s_ij       neighbours_ik = sum over entries j of class k of W_ij
        d loss_i / d student_i = sum_j (S_ij - Wc_ij) bank_j / st

    Triton keeps running maxima and sums over tiles of the bank and computes similarities anew for the neighbours and for the gradient: memory
    O(B (shares D + K)) with a few dozen shares of the bank, instead of O(B N).  ``bank_ND`` with at most 128 columns, else the reference.  Neighbours are
    added up in any order, so two runs may differ in their last bits, and with them what is made of the neighbours; loss and gradient of given arguments
    are the same every time.  A row whose prob allows no class of the bank has loss 0 and no gradient.
    """
    large = mode() == "triton" or len(student_BD) * len(bank_ND) >= CROSSOVER
    temperatures = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
    if large and bank_ND.shape[1] <= WIDEST and runs_triton(student_BD, teacher_BD, bank_ND, prob_BK):
        fixed = (teacher_BD.detach().contiguous(), bank_ND.detach().contiguous(), label_N.contiguous(), prob_BK.detach().contiguous())
        loss_B, neighbours_BK, *_ = _forward(student_BD.contiguous(), *fixed, student_temperature, teacher_temperature)
        return loss_B, neighbours_BK
    return functional.instance_matching(student_BD, teacher_BD, bank_ND, label_N, prob_BK, **temperatures)


@torch.library.custom_op("fastssl::instance_matching", mutates_args=())
def _forward(
    student: Tensor, teacher: Tensor, bank: Tensor, label: Tensor, prob: Tensor, student_temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastssl.kernels import triton_instance as side

    return side.forward(student, teacher, bank, label, prob, student_temperature, teacher_temperature)


@_forward.register_fake
def _(student, teacher, bank, label, prob, student_temperature, teacher_temperature):  # type: ignore[no-untyped-def]
    numbers = [student.new_empty(len(student), dtype=torch.float32) for _ in range(4)]
    return numbers[0], prob.new_empty(prob.shape, dtype=torch.float32), *numbers[1:]


@torch.library.custom_op("fastssl::instance_matching_backward", mutates_args=())
def _backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, bank: Tensor, label: Tensor, prob: Tensor, teacher_lse: Tensor, student_lse: Tensor,
    allowed: Tensor, student_temperature: float, teacher_temperature: float,
) -> Tensor:  # fmt: skip
    from fastssl.kernels import triton_instance as side

    kept = {"teacher_lse": teacher_lse, "student_lse": student_lse, "allowed": allowed}
    upstream = grad_loss.to(torch.float32).contiguous()
    return side.backward(student, teacher, bank, label, prob, kept, upstream, student_temperature, teacher_temperature).to(student.dtype)


@_backward.register_fake
def _(grad_loss, student, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(student)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5], *output[2:])
    ctx.temperatures = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
    return None if grad_loss is None else _backward(grad_loss, *ctx.saved_tensors, *ctx.temperatures), *[None] * 6


_forward.register_autograd(_grads, setup_context=_setup)


def work(rows: int, entries: int, width: int, classes: int, *, row_block: int = 32, tile: int = 64, programs: int = 264) -> dict[str, float]:
    """What the kernels and the torch version do: ``flop`` and ``bytes`` (forward and backward, float32, labels int64), ``held`` = bytes held at once.

    Kernels: 6 products of 2 B N D (teacher and student, teacher again, both again, the gradient); torch: 3.  The bank is read 3 times by each of B / 32
    row blocks, of which all but the first find it in the cache if the cache holds it: ``bytes`` counts one memory read per pass, ``bytes_cold`` all of them.
    torch writes 13 [B, N] matrices from the similarities to the gradient, reads them 17 times, and holds 5 at once.
    """
    product, matrix = 2.0 * rows * entries * width, 4.0 * rows * entries
    bank, small = entries * (4.0 * width + 8), 4.0 * rows * (6 * width + 3 * classes)
    blocks = -(-rows // row_block)
    shares = min(-(-entries // tile), max(1, programs // blocks))
    partial = 4.0 * rows * shares * (width + 6)
    return {
        "flop": 6 * product,
        "flop_torch": 3 * product,
        "flop_floor": 3 * product,
        "bytes": 3 * bank + small + 2 * partial,
        "bytes_cold": 3 * bank * blocks + small + 2 * partial,
        "bytes_floor": 2 * bank + small,
        "bytes_torch": TORCH_WRITES * matrix + TORCH_READS * matrix + 3 * bank + small,
        "held": 4.0 * rows * (width + classes + 8) + partial,
        "held_torch": 5 * matrix,
    }
