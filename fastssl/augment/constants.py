"""Small constant tensors, copied to a device once: a graph capture must not meet a copy from the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value", Tensor, dict[str, Tensor])


def kept(build: Callable[..., Value]) -> Callable[..., Value]:
    """Remember what ``build`` made of its (hashable) arguments, unless it is fake, that is: made while a tracer or FakeTensorMode is active."""
    store: dict[tuple[Any, ...], Value] = {}

    def get(*args: Any) -> Value:
        found = store.get(args)
        if found is None:
            found = build(*args)
            tensors = found.values() if isinstance(found, dict) else [found]
            if all(type(t) is Tensor for t in tensors):
                store[args] = found
        return found

    return get


@kept
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)] tensor on ``device``. Do not write to it."""
    return torch.tensor(values, dtype=dtype, device=device)
