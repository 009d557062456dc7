"""Recording work on a CPU, operation by operation: what a CUDA graph does to an update, provable without a GPU.

A replay runs no Python of the recorded work: it repeats every operation on the very tensors of the recording, with every number of the host as it was then, and
writes new results where the old ones lie.  What a CUDA graph refuses is refused: values that the host reads, shapes that data decide.  Work that does not go
through PyTorch's operations (a kernel launched outside a custom operator, NumPy) is not on the tape.  Slow, and it keeps every intermediate: for checks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.errors import TrainingError

READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "is_nonzero", "equal", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Tape:
    """Records on the CPU."""

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, work: Callable[[], Any]) -> TapeRecorded:
        """Do ``work`` and write down how. Raises :class:`TrainingError` where the host reads a value."""
        writer = _Writer()
        with writer:
            result = work()
        return TapeRecorded(writer.operations, result)


class TapeRecorded:
    """Operations in order: (operation, arguments, keyword arguments, the recorded tensors that take its new results)."""

    def __init__(self, operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None]]], result: Any):
        self.operations, self.result, self.pending = operations, result, False

    @torch.no_grad()
    def replay(self) -> None:
        """Do the work again."""
        for operation, args, kwargs, places in self.operations:
            found = pytree.tree_leaves(operation(*args, **kwargs))
            for place, new in zip(places, found, strict=True):
                if place is not None:
                    place.copy_(new)


class _Writer(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in READS or (name in INDEXING and any(t.dtype == torch.bool for t in pytree.tree_leaves(args[1]) if isinstance(t, Tensor))):
            raise TrainingError(f"{func} lets data decide what the host sees, which a recorded update must not")
        found = func(*args, **kwargs)
        memory = {t.untyped_storage()._cdata for t in given}
        leaves = pytree.tree_leaves(found)
        places = [leaf.detach() if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in memory else None for leaf in leaves]
        if any(place is not None for place in places) or func._schema.is_mutable:  # anything else is a view, and views stay where they are
            self.operations.append((func, args, kwargs, places))
        return found
