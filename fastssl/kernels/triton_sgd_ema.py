"""Triton side of ``sgd_ema``: one launch over all parameters of a network, whose addresses stand in a table on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.launch import INTERPRETED, Launch

BLOCK = 1 << 16 if INTERPRETED else 2048  # numbers per program
COLUMNS = 6  # addresses of parameter, gradient, momentum buffer (0: none), average (0: none) and rate; how many numbers


@triton.jit
def sgd_ema_kernel(
    table, decays, chunk_tensor, chunk_block, shares, momentum,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, AVERAGE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``shares``: (weight of the old average, weight of the new parameter).  ALIGNED: every address is a multiple of 16."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensor + chunk)
    row = table + tensor.to(tl.int64) * COLUMNS
    parameter = tl.load(row).to(tl.pointer_type(tl.float32))
    gradient = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    buffer = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    average_at = tl.load(row + 3)
    average = average_at.to(tl.pointer_type(tl.float32))
    rate = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32)))
    count = tl.load(row + 5)
    if ALIGNED:
        parameter, gradient = tl.multiple_of(parameter, 16), tl.multiple_of(gradient, 16)
        buffer, average = tl.multiple_of(buffer, 16), tl.multiple_of(average, 16)
    place = tl.load(chunk_block + chunk).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    p = tl.load(parameter + place, mask=inside, other=0.0)
    step = tl.load(gradient + place, mask=inside, other=0.0) + tl.load(decays + tensor) * p
    if MOMENTUM:
        b = momentum * tl.load(buffer + place, mask=inside, other=0.0) + step
        tl.store(buffer + place, b, mask=inside)
        step = step + momentum * b if NESTEROV else b
    p = p - rate * step
    tl.store(parameter + place, p, mask=inside)
    if AVERAGE:
        if average_at != 0:
            a = tl.load(average + place, mask=inside, other=0.0)
            tl.store(average + place, tl.load(shares) * a + tl.load(shares + 1) * p, mask=inside)


@dataclass
class Table:
    """Everything about the tensors of one call that the kernel reads, on their device.  ``host``: what a recorded copy to the device reads from."""

    addresses: Tensor
    decays: Tensor
    chunk_tensor: Tensor
    chunk_block: Tensor
    aligned: bool
    host: list[Tensor]


def make_table(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffers: Sequence[Tensor], averages: Sequence[Tensor | None], rates: Sequence[Tensor],
    decays: Sequence[float],
) -> Table:  # fmt: skip
    """One row per parameter; all lists are as long, ``buffers`` may be empty."""
    device = parameters[0].device
    rows: list[list[int]] = []
    tensors: list[int] = []
    blocks: list[int] = []
    for n, (p, g, a, rate) in enumerate(zip(parameters, gradients, averages, rates, strict=True)):
        rows.append([p.data_ptr(), g.data_ptr(), buffers[n].data_ptr() if buffers else 0, 0 if a is None else a.data_ptr(), rate.data_ptr(), p.numel()])
        count = triton.cdiv(p.numel(), BLOCK)
        tensors += [n] * count
        blocks += range(count)
    aligned = all(address % 16 == 0 for row in rows for address in row[:4])
    host = [torch.tensor(rows, dtype=torch.int64), torch.tensor(decays, dtype=torch.float32), *(torch.tensor(x, dtype=torch.int32) for x in (tensors, blocks))]
    if device.type == "cuda":
        host = [x.pin_memory() for x in host]
    moved = [x.to(device, non_blocking=True) for x in host]
    return Table(moved[0], moved[1], moved[2], moved[3], aligned, host)


def update_launch(table: Table, shares: Tensor | None, momentum: float, nesterov: bool) -> Launch:
    """The call over a table; ``shares``: two float32 numbers on the device, None without an average."""
    arguments = {
        "table": table.addresses, "decays": table.decays, "chunk_tensor": table.chunk_tensor, "chunk_block": table.chunk_block,
        "shares": shares, "momentum": float(momentum),
    }  # fmt: skip
    constants = {
        "COLUMNS": COLUMNS, "BLOCK": BLOCK, "MOMENTUM": momentum != 0, "NESTEROV": nesterov, "AVERAGE": shares is not None, "ALIGNED": table.aligned,
    }  # fmt: skip
    return Launch(sgd_ema_kernel, (len(table.chunk_tensor),), arguments, constants, warps=8, fuse=False)
