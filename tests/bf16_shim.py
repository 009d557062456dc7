"""Triton's interpreter cuts float32 to bfloat16 off; devices round to even.  ``rounded_bf16()`` makes the interpreter's casts do so too.

Only casts are mended: kernels compute in float32 and cast when they store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def to_bf16(values: np.ndarray) -> np.ndarray:
    """uint16 bits of float32 values rounded to bfloat16, halves to the even number; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


@contextmanager
def rounded_bf16() -> Iterator[None]:
    """Within: casts from float32 to bfloat16 round as on a device."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    original = builder.cast_impl

    def cast(self: Any, source: Any, kind: Any) -> Any:
        if kind.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return interpreter.TensorHandle(to_bf16(source.data), kind.scalar)
        return original(self, source, kind)

    builder.cast_impl = cast
    try:
        yield
    finally:
        builder.cast_impl = original
