"""Views: a policy says what, a plan holds every number drawn, a backend computes the pixels."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from fastssl.augment import reference
from fastssl.augment.describe import describe
from fastssl.augment.plan import Plan, draw
from fastssl.augment.policies import ABOUT, POLICIES
from fastssl.augment.policy import LAWS, Law, Policy, build_policy
from fastssl.augment.triton_passes import lacking
from fastssl.errors import RecipeError, nearest

BACKENDS = ("auto", "reference", "triton")
__all__ = ["ABOUT", "BACKENDS", "LAWS", "POLICIES", "Law", "Plan", "Policy", "build_policy", "check_backend", "describe", "draw", "render"]


def check_backend(policy: Policy, backend: str, device: torch.device | str | None = None) -> str:
    """The backend that will render this policy on ``device`` (None: CUDA where there is one): ``reference`` or ``triton``.

    ``auto`` is Triton on CUDA wherever it has every law of the policy, else the reference.  Raises RecipeError for a backend that does not exist,
    lacks a law, or cannot run here.
    """
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    return _backend(policy, backend, kind)


@functools.lru_cache(maxsize=1024)
def _backend(policy: Policy, backend: str, kind: str) -> str:
    if backend not in BACKENDS:
        raise RecipeError(f"unknown augmentation backend {backend!r}{nearest(backend, BACKENDS)}; known: {', '.join(BACKENDS)}")
    missing, installed = lacking(policy), importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return "triton" if kind == "cuda" and installed and not missing else "reference"
    if backend == "triton":
        if missing:
            raise RecipeError(f"augmentation backend 'triton' lacks {missing} of policy {policy.name!r}; use backend 'reference' or 'auto'")
        if not installed:
            raise RecipeError("augmentation backend 'triton' needs the triton package, which comes with torch for CUDA on Linux; use backend 'reference'")
        if kind != "cuda" and not _interpreted():
            raise RecipeError(f"augmentation backend 'triton' needs a CUDA device, not {kind!r}; use backend 'reference' or 'auto'")
    return backend


def _interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter in this process: tests only."""
    from fastssl.augment.triton_launch import INTERPRETED

    return INTERPRETED


def render(policy: Policy, plan: Plan, pixels_BHWC: Tensor, extent_B2: Tensor, out_BCHW: Tensor, backend: str = "auto") -> Tensor:
    """Render one view of B canvases into ``out_BCHW`` and return it.

    ``pixels_BHWC`` uint8, only [:h, :w] of each row is read; ``extent_B2`` int32 (h, w); ``out_BCHW`` float32, bfloat16 or float16,
    [B, channels, size, size], best in channels-last memory.  On an accelerator nothing is read back by the host.
    On the CPU ``auto`` resizes and moves bilinearly with torch's own kernels, several times as fast and a level off in under 1 % of those values;
    ``reference`` is exact.
    """
    if check_backend(policy, backend, pixels_BHWC.device) == "triton":
        from fastssl.augment import triton_renderer  # imports triton, which machines without CUDA may lack

        return triton_renderer.render(policy, plan, pixels_BHWC, extent_B2, out_BCHW)
    exact = backend == "reference" and pixels_BHWC.device.type == "cpu"
    return reference.render(policy, plan, pixels_BHWC, extent_B2, out_BCHW, mode="grouped" if exact else None)
