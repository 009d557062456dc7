"""Pixels of a plan in Triton: a few passes over bytes, statistics on the device, the last pass writes the normalised view.

Equal to ``reference.render`` in its dense mode to the last bit: integer ops are exact, float32 and float64 ones run in the reference's order with
fused multiply-add switched off.  Nothing is read back by the host and every shape is fixed, so a render can be recorded in a CUDA graph; scratch is
allocated at the first call for a (policy, batch, canvas, device) and kept, so that first call belongs before the recording, and two renders of
one key must not run at the same time on two streams.

Runs on CUDA, and on the CPU under Triton's interpreter (``TRITON_INTERPRET=1`` set before triton is imported), which exists for tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.augment.constants import constant
from fastssl.augment.plan import Plan
from fastssl.augment.policy import Policy
from fastssl.augment.triton_launch import INTERPRETED, Buffers, Launch, Launcher, scratch_bytes, table_bytes, tap_words
from fastssl.augment.triton_numbers import Numbers
from fastssl.augment.triton_passes import Pass, Shape, passes_of
from fastssl.errors import DataError, RecipeError


@dataclass
class _Kept:
    """What is made once per key: the passes and their scratch."""

    passes: list[Pass]
    scratch: list[Tensor]
    table: Tensor
    first: Tensor
    weight: Tensor
    mean: Tensor


_KEPT: dict[tuple[object, ...], _Kept] = {}


def _keep(policy: Policy, batch: int, height: int, width: int, device: torch.device) -> _Kept:
    key = (policy, batch, height, width, device)
    if key not in _KEPT:
        passes, c = passes_of(policy, height, width), policy.channels
        first, weight = tap_words(passes)

        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(batch * count, dtype=dtype, device=device)

        scratch = [empty(size, torch.uint8) for size in scratch_bytes(passes, c)]
        words = [empty(count, torch.int32) for count in (first, weight, 1)]
        made = _Kept(passes, scratch, empty(table_bytes(passes, c), torch.uint8), *words)
        if type(words[0]) is not Tensor:  # made under a tracer or fake mode: not to be remembered
            return made
        _KEPT[key] = made
    return _KEPT[key]


def kept_bytes() -> int:
    """Bytes of scratch held on all devices."""
    return sum(t.numel() * t.element_size() for k in _KEPT.values() for t in (*k.scratch, k.table, k.first, k.weight, k.mean))


def launches(policy: Policy, plan: Plan, pixels_BHWC: Tensor, extent_B2: Tensor, out_BCHW: Tensor) -> list[Launch]:
    """The kernel calls that render this batch, in order; the plan's numbers are already turned into the kernels' tensors."""
    if pixels_BHWC.dtype != torch.uint8 or pixels_BHWC.dim() != 4 or pixels_BHWC.shape[3] != policy.channels:
        raise DataError(f"canvases must be uint8 [B, H, W, {policy.channels}], got {pixels_BHWC.dtype} {list(pixels_BHWC.shape)}")
    batch, height, width, c = pixels_BHWC.shape
    if out_BCHW.shape != (batch, c, policy.size, policy.size):
        raise DataError(f"the output buffer has shape {list(out_BCHW.shape)}, the views {[batch, c, policy.size, policy.size]}")
    if pixels_BHWC.stride()[2:] != (c, 1):
        pixels_BHWC = pixels_BHWC.contiguous()
    kept = _keep(policy, batch, height, width, pixels_BHWC.device)
    scale, shift = (1 / (255 * s) for s in policy.std), (-m / s for m, s in zip(policy.mean, policy.std, strict=True))
    norm = constant((*scale, *shift), torch.float32, pixels_BHWC.device)
    numbers = Numbers(policy, plan, extent_B2, Shape(height, width, False))
    extent = extent_B2.to(torch.int32).contiguous()
    buffers = Buffers(pixels_BHWC, extent, norm, out_BCHW, kept.scratch, kept.table, kept.first, kept.weight, kept.mean)
    return Launcher(kept.passes, numbers, buffers, c).launches()


def render(policy: Policy, plan: Plan, pixels_BHWC: Tensor, extent_B2: Tensor, out_BCHW: Tensor) -> Tensor:
    """Render and normalise into ``out_BCHW`` (float32, bfloat16 or float16, any strides, fastest in channels-last memory); returns it.

    Raises RecipeError for a policy with a law that the kernels lack, or on a CPU without the interpreter.
    """
    device = pixels_BHWC.device
    if device.type != "cuda" and not INTERPRETED:
        raise RecipeError(f"augmentation backend 'triton' needs a CUDA device, not {device.type!r}; use backend 'reference' or 'auto'")
    if out_BCHW.shape[0] == 0:
        return out_BCHW
    calls = launches(policy, plan, pixels_BHWC, extent_B2, out_BCHW)
    if device.type == "cuda":
        with torch.cuda.device(device):
            for call in calls:
                call.run()
    else:
        for call in calls:
            call.run()
    return out_BCHW
