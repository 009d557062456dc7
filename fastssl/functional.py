"""Small pure tensor functions that methods share. No host syncs, no state, no devices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy_rows(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Hard-label cross-entropy per row, [B], natural log. Labels must lie in [0, K)."""
    return F.cross_entropy(logits_BK, label_B, reduction="none")


def confidence(logits_BK: Tensor) -> tuple[Tensor, Tensor]:
    """(max softmax probability [B], its class [B] int64). Ties go to the lowest class."""
    return torch.softmax(logits_BK, dim=-1).max(dim=-1)
