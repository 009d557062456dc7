"""Small pure tensor functions that methods share. No host syncs, no state, no devices.

Logits in 16 bits are read as float32 first: probabilities near a threshold and small losses do not survive 8 bits of mantissa.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy_rows(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Hard-label cross-entropy per row, [B], natural log. Labels must lie in [0, K)."""
    return F.cross_entropy(_at_least_float32(logits_BK), label_B, reduction="none")


def confidence(logits_BK: Tensor) -> tuple[Tensor, Tensor]:
    """(max softmax probability [B], its class [B] int64). Ties go to the lowest class."""
    return torch.softmax(_at_least_float32(logits_BK), dim=-1).max(dim=-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
