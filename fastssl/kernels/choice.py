"""Who computes a kernel's formula: the Triton code or the torch reference beside it.

``auto`` (the default) is Triton for 16- and 32-bit floats on CUDA, the reference for everything else: CPUs, float64, machines without triton.
``use("triton")`` asks for the kernels on a CPU too, where Triton's interpreter runs them (``TRITON_INTERPRET=1`` before triton is imported; tests);
``use("reference")`` turns them off.  The environment variable FASTSSL_KERNELS sets the mode of a whole process.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastssl.errors import RecipeError, nearest

MODES = ("auto", "triton", "reference")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_mode: list[str] = []  # of the innermost use()


@contextmanager
def use(mode: str) -> Iterator[None]:
    """Within: kernels run in this mode, for the whole process.  Raises RecipeError for a mode that does not exist."""
    _check(mode)
    _mode.append(mode)
    try:
        yield
    finally:
        _mode.pop()


def mode() -> str:
    """The mode that holds now."""
    return _mode[-1] if _mode else _check(os.environ.get("FASTSSL_KERNELS", "auto"))


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether a kernel on these floating tensors (None: an argument left out) is to be computed by Triton.

    Raises RecipeError where Triton is asked for and cannot run.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if mode() == "reference" or any(tensor.dtype not in FLOATS for tensor in given):
        return False
    on_cuda = all(tensor.is_cuda for tensor in given)
    if mode() == "auto":
        return on_cuda and _installed()
    if not _installed():
        raise RecipeError("kernels in mode 'triton' need the triton package, which comes with torch for CUDA on Linux; use mode 'auto'")
    if not on_cuda and not _interpreted():
        raise RecipeError(f"kernels in mode 'triton' need CUDA tensors, not ones on {given[0].device.type!r}; use mode 'auto' or 'reference'")
    return True


def _check(mode: str) -> str:
    if mode not in MODES:
        raise RecipeError(f"unknown kernel mode {mode!r}{nearest(mode, MODES)}; known: {', '.join(MODES)}")
    return mode


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    from fastssl.kernels.launch import INTERPRETED

    return INTERPRETED
