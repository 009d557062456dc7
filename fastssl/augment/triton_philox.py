"""Kernel: the words of ``philox.words`` in one launch instead of a hundred small tensor operations; integers, so equal on every device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_M0, _M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_W0, _W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit(do_not_specialize=["key0", "key1", "lane", "total"])
def philox_kernel(draw, out, key0, key1, lane, total, COUNT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """int64 ``out`` [rows, COUNT]; element i of the ``total`` = rows * BLOCKS counter blocks makes words 4 (i % BLOCKS) .. + 3 of row i // BLOCKS."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, block = i // BLOCKS, i % BLOCKS
    valid = i < total
    position = tl.load(draw + row, mask=valid, other=0)
    k0, k1 = key0.to(tl.uint32), key1.to(tl.uint32)
    c0, c1 = block.to(tl.uint32), (block * 0 + lane).to(tl.uint32)
    c2, c3 = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, c0 * 0 + _M0), c0 * _M0
        high1, low1 = tl.umulhi(c2, c2 * 0 + _M1), c2 * _M1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _W0, k1 + _W1
    place, word = out + row.to(tl.int64) * COUNT + block * 4, block * 4
    tl.store(place, c0.to(tl.int64), mask=valid & (word < COUNT))
    tl.store(place + 1, c1.to(tl.int64), mask=valid & (word + 1 < COUNT))
    tl.store(place + 2, c2.to(tl.int64), mask=valid & (word + 2 < COUNT))
    tl.store(place + 3, c3.to(tl.int64), mask=valid & (word + 3 < COUNT))


def words(seed: int, stream: int, view: int, draw_B: Tensor, count: int) -> Tensor:
    """[B, count] int64 words in [0, 2^32), those of :func:`fastssl.augment.philox.words`; ``count`` >= 1."""
    draw_B = draw_B.to(torch.int64).contiguous()
    out = torch.empty(len(draw_B), count, dtype=torch.int64, device=draw_B.device)
    blocks = (count + 3) // 4
    total = len(draw_B) * blocks
    if total:
        key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        grid = (triton.cdiv(total, 256),)
        with torch.cuda.device_of(draw_B):
            philox_kernel[grid](draw_B, out, *key, (stream << 16) | view, total, COUNT=count, BLOCKS=blocks, BLOCK=256)
    return out
