"""Triton side of ``instance_matching``: similarities to the bank in tiles that no memory ever sees, computed anew by each pass.

Programs take a block of rows and a share of the bank each, so that few rows still fill a device; shares are put together by sums over a few numbers per
row.  Products are float32 with three tf32 products each ("tf32x3"): a temperature of 0.1 makes errors of plain tf32 visible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.launch import INTERPRETED, Launch

PROGRAMS = 264  # to aim at: two for each multiprocessor of an H100
STATISTICS = 6  # teacher: largest logit, sum, sum times prob, sum times prob times student logit; student: largest logit, sum


@triton.jit
def rows_of(x, row, alive, d, D: tl.constexpr):
    """float32 [rows, padded D] of a contiguous matrix."""
    return tl.load(x + row.to(tl.int64)[:, None] * D + d[None, :], mask=alive[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def logits(query, bank, row, alive, n, inside, inverse, D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr):
    """query . bank / temperature, -inf outside the bank; CHUNK dimensions at a time, so that operands fit into registers."""
    x = tl.zeros([ROWS, ENTRIES], tl.float32)
    for start in range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)
        x = tl.dot(rows_of(query, row, alive, d, D), tl.trans(rows_of(bank, n, inside, d, D)), x, input_precision="tf32x3")
    return tl.where(inside[None, :], x * inverse, -float("inf"))


@triton.jit
def both_logits(
    student, teacher, bank, row, alive, n, inside, inverse_s, inverse_t, D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr
):
    """(teacher's, student's), with one read of the bank."""
    t, s = tl.zeros([ROWS, ENTRIES], tl.float32), tl.zeros([ROWS, ENTRIES], tl.float32)
    for start in range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)
        tile = tl.trans(rows_of(bank, n, inside, d, D))
        t = tl.dot(rows_of(teacher, row, alive, d, D), tile, t, input_precision="tf32x3")
        s = tl.dot(rows_of(student, row, alive, d, D), tile, s, input_precision="tf32x3")
    return tl.where(inside[None, :], t * inverse_t, -float("inf")), tl.where(inside[None, :], s * inverse_s, -float("inf"))


@triton.jit
def instance_statistics_kernel(
    student, teacher, bank, label, prob, statistics, rows, inverse_s, inverse_t,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """statistics [STATISTICS, shares, rows]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    t_max = tl.full([ROWS], -float("inf"), tl.float32)
    s_max = tl.full([ROWS], -float("inf"), tl.float32)
    t_sum, s_sum = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    allowed, crossed = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    first = tl.program_id(1) * TILES * ENTRIES
    for i in range(0, TILES):
        n = first + i * ENTRIES + tl.arange(0, ENTRIES)
        inside = n < N
        t, s = both_logits(student, teacher, bank, row, alive, n, inside, inverse_s, inverse_t, D, CHUNK, ROWS, ENTRIES)
        kind = tl.load(label + n, mask=inside, other=0)
        p = tl.load(prob + row.to(tl.int64)[:, None] * K + kind[None, :], mask=alive[:, None] & inside[None, :], other=0.0).to(tl.float32)
        new_t, new_s = tl.maximum(t_max, tl.max(t, axis=1)), tl.maximum(s_max, tl.max(s, axis=1))
        safe_t, safe_s = tl.where(new_t == -float("inf"), 0.0, new_t), tl.where(new_s == -float("inf"), 0.0, new_s)
        shrink = tl.exp(t_max - safe_t)
        w = tl.exp(t - safe_t[:, None])
        t_sum = t_sum * shrink + tl.sum(w, axis=1)
        w = w * p
        allowed = allowed * shrink + tl.sum(w, axis=1)
        crossed = crossed * shrink + tl.sum(w * tl.where(inside[None, :], s, 0.0), axis=1)
        s_sum = s_sum * tl.exp(s_max - safe_s) + tl.sum(tl.exp(s - safe_s[:, None]), axis=1)
        t_max, s_max = new_t, new_s
    out = statistics + tl.program_id(1) * rows + row
    step = tl.num_programs(1) * rows
    tl.store(out, t_max, mask=alive)
    tl.store(out + step, t_sum, mask=alive)
    tl.store(out + 2 * step, allowed, mask=alive)
    tl.store(out + 3 * step, crossed, mask=alive)
    tl.store(out + 4 * step, s_max, mask=alive)
    tl.store(out + 5 * step, s_sum, mask=alive)


@triton.jit
def instance_neighbours_kernel(
    teacher, bank, label, teacher_lse, neighbours, rows, inverse_t,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """neighbours[i, label_j] += W_ij, which starts from zeros; sums in any order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    lse = tl.load(teacher_lse + row, mask=alive, other=0.0)
    first = tl.program_id(1) * TILES * ENTRIES
    for i in range(0, TILES):
        n = first + i * ENTRIES + tl.arange(0, ENTRIES)
        inside = n < N
        t = logits(teacher, bank, row, alive, n, inside, inverse_t, D, CHUNK, ROWS, ENTRIES)
        kind = tl.load(label + n, mask=inside, other=0)
        place = neighbours + row.to(tl.int64)[:, None] * K + kind[None, :]
        tl.atomic_add(place, tl.exp(t - lse[:, None]), mask=alive[:, None] & inside[None, :], sem="relaxed")


@triton.jit
def instance_backward_kernel(
    student, teacher, bank, label, prob, teacher_lse, student_lse, allowed, upstream, grads, rows, inverse_s, inverse_t,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """grads [shares, rows, D]: what each share of the bank adds to the student's gradient."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    d = tl.arange(0, PADDED)
    t_lse = tl.load(teacher_lse + row, mask=alive, other=0.0)
    s_lse = tl.load(student_lse + row, mask=alive, other=0.0)
    total = tl.load(allowed + row, mask=alive, other=0.0)
    scale = tl.where(total > 0, tl.load(upstream + row, mask=alive, other=0.0) * inverse_s, 0.0)
    over = scale / tl.where(total > 0, total, 1.0)
    gradient = tl.zeros([ROWS, PADDED], tl.float32)
    first = tl.program_id(1) * TILES * ENTRIES
    for i in range(0, TILES):
        n = first + i * ENTRIES + tl.arange(0, ENTRIES)
        inside = n < N
        t, s = both_logits(student, teacher, bank, row, alive, n, inside, inverse_s, inverse_t, D, CHUNK, ROWS, ENTRIES)
        kind = tl.load(label + n, mask=inside, other=0)
        p = tl.load(prob + row.to(tl.int64)[:, None] * K + kind[None, :], mask=alive[:, None] & inside[None, :], other=0.0).to(tl.float32)
        g = scale[:, None] * tl.exp(s - s_lse[:, None]) - over[:, None] * p * tl.exp(t - t_lse[:, None])
        gradient = tl.dot(g, rows_of(bank, n, inside, d, D), gradient, input_precision="tf32x3")
    place = grads + (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * D + d[None, :]
    tl.store(place, gradient, mask=alive[:, None] & (d < D)[None, :])


def shares_of(rows: int, entries: int) -> tuple[int, int, int, int]:
    """(rows per program, bank entries per tile, tiles per program, shares of the bank)."""
    row_block, tile = (max(16, triton.next_power_of_2(rows)), 256) if INTERPRETED else (32, 64)
    tiles = triton.cdiv(entries, tile)
    wanted = 2 if INTERPRETED else max(1, PROGRAMS // triton.cdiv(rows, row_block))
    each = triton.cdiv(tiles, min(tiles, wanted))
    return row_block, tile, each, triton.cdiv(tiles, each)


def call(kernel: object, arguments: dict[str, object], bank: Tensor, rows: int, classes: int) -> Launch:
    """A call over row blocks and shares of the bank."""
    row_block, tile, each, shares = shares_of(rows, len(bank))
    constants = {
        "N": len(bank), "D": bank.shape[1], "K": classes, "PADDED": max(16, triton.next_power_of_2(bank.shape[1])), "ROWS": row_block,
        "CHUNK": 16 if bank.shape[1] <= 16 else 32, "ENTRIES": tile, "TILES": each,
    }  # fmt: skip
    return Launch(kernel, (triton.cdiv(rows, row_block), shares), {**arguments, "rows": rows}, constants, warps=8, stages=2)


def statistics_launch(student: Tensor, teacher: Tensor, bank: Tensor, label: Tensor, prob: Tensor, out: Tensor, st: float, tt: float) -> Launch:
    """``out``: float32 [STATISTICS, shares, rows]."""
    arguments: dict[str, object] = {
        "student": student, "teacher": teacher, "bank": bank, "label": label, "prob": prob, "statistics": out, "inverse_s": 1 / st, "inverse_t": 1 / tt,
    }  # fmt: skip
    return call(instance_statistics_kernel, arguments, bank, len(student), prob.shape[1])


def neighbours_launch(teacher: Tensor, bank: Tensor, label: Tensor, lse: Tensor, out: Tensor, tt: float) -> Launch:
    """``out``: float32 [rows, classes], zeros."""
    arguments: dict[str, object] = {"teacher": teacher, "bank": bank, "label": label, "teacher_lse": lse, "neighbours": out, "inverse_t": 1 / tt}
    return call(instance_neighbours_kernel, arguments, bank, len(teacher), out.shape[1])


def backward_launch(
    student: Tensor, teacher: Tensor, bank: Tensor, label: Tensor, prob: Tensor, kept: dict[str, Tensor], upstream: Tensor, out: Tensor, st: float, tt: float
) -> Launch:
    """``kept``: teacher_lse, student_lse, allowed; ``out``: float32 [shares, rows, D]."""
    arguments: dict[str, object] = {
        "student": student, "teacher": teacher, "bank": bank, "label": label, "prob": prob, **kept, "upstream": upstream, "grads": out,
        "inverse_s": 1 / st, "inverse_t": 1 / tt,
    }  # fmt: skip
    return call(instance_backward_kernel, arguments, bank, len(student), prob.shape[1])


def forward(student: Tensor, teacher: Tensor, bank: Tensor, label: Tensor, prob: Tensor, st: float, tt: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [B], neighbours [B, K], teacher's log sum, student's log sum, allowed = sum of W times prob, [B] each)."""
    rows = len(student)
    shares = shares_of(rows, len(bank))[3] if rows else 1
    statistics = torch.zeros(STATISTICS, shares, rows, dtype=torch.float32, device=student.device)
    statistics_launch(student, teacher, bank, label, prob, statistics, st, tt).run()
    t_max, t_sum, allowed, crossed, s_max, s_sum = statistics.unbind(0)
    t_top, s_top = t_max.amax(0), s_max.amax(0)
    t_scale = torch.exp(t_max - t_top)
    total = (t_scale * t_sum).sum(0)
    allowed, crossed = (t_scale * allowed).sum(0) / total, (t_scale * crossed).sum(0) / total
    t_lse, s_lse = t_top + total.log(), s_top + (torch.exp(s_max - s_top) * s_sum).sum(0).log()
    neighbours = torch.zeros(rows, prob.shape[1], dtype=torch.float32, device=student.device)
    neighbours_launch(teacher, bank, label, t_lse, neighbours, tt).run()
    loss = torch.where(allowed > 0, s_lse - crossed / allowed, 0.0)
    return loss, neighbours, t_lse, s_lse, allowed


def backward(
    student: Tensor, teacher: Tensor, bank: Tensor, label: Tensor, prob: Tensor, kept: dict[str, Tensor], upstream: Tensor, st: float, tt: float
) -> Tensor:
    """The student's gradient, float32 [B, D]."""
    shares = shares_of(len(student), len(bank))[3] if len(student) else 1
    grads = torch.zeros(shares, *student.shape, dtype=torch.float32, device=student.device)
    backward_launch(student, teacher, bank, label, prob, kept, upstream, grads, st, tt).run()
    return grads.sum(0)
