"""Views: a policy says what, a plan holds every number drawn, a backend computes the pixels."""

from __future__ import annotations

from torch import Tensor

from fastssl.augment import reference
from fastssl.augment.describe import describe
from fastssl.augment.plan import Plan, draw
from fastssl.augment.policy import LAWS, POLICIES, Law, Policy, build_policy
from fastssl.errors import RecipeError, nearest

BACKENDS = ("auto", "reference", "triton")
__all__ = ["BACKENDS", "LAWS", "POLICIES", "Law", "Plan", "Policy", "build_policy", "check_backend", "describe", "draw", "render"]


def check_backend(policy: Policy, backend: str) -> str:
    """The backend that will render this policy: ``reference``.  Raises RecipeError for one that does not exist or lacks a law."""
    if backend not in BACKENDS:
        raise RecipeError(f"unknown augmentation backend {backend!r}{nearest(backend, BACKENDS)}; known: {', '.join(BACKENDS)}")
    if backend == "triton":
        laws = ", ".join(law.name for law in policy.laws)
        raise RecipeError(f"augmentation backend 'triton' is not built yet for policy {policy.name!r} ({laws}); use backend 'reference'")
    return "reference"


def render(policy: Policy, plan: Plan, pixels_BHWC: Tensor, extent_B2: Tensor, out_BCHW: Tensor, backend: str = "auto") -> Tensor:
    """Render one view of B canvases into ``out_BCHW`` and return it.

    ``pixels_BHWC`` uint8, only [:h, :w] of each row is read; ``extent_B2`` int32 (h, w); ``out_BCHW`` float32, bfloat16 or float16,
    [B, channels, size, size], best in channels-last memory.  On an accelerator nothing is read back by the host.
    """
    check_backend(policy, backend)
    return reference.render(policy, plan, pixels_BHWC, extent_B2, out_BCHW)
