"""Recording device work in CUDA graphs.

Rules that PyTorch gives for recording a whole update, and where they are kept: work that warms up runs on the very side stream that records (autograd
remembers streams); other threads may call CUDA meanwhile (the feed does: ``thread_local``); gradients are dropped before backward, so that they are made in
the graph's own memory; random numbers come from generators that the graph knows, whose offsets move at each replay; autocast's cache of cast weights is off
(:mod:`fastssl.engine.launch`), so that none outlives a recording.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch


class CudaGraphs:
    """Records on one device. ``generators``: CUDA generators that the work draws from besides the device's default one, which is always known."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = ()):
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self.generators = tuple(generators)
        self.stream = torch.cuda.Stream(self.device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work on the side stream, between what the current stream did before and what it does next."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def record(self, work: Callable[[], Any]) -> CudaRecorded:
        """Record ``work`` without doing it. What CUDA refuses to record raises, and leaves the device fit to go on eagerly."""
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        default = torch.cuda.default_generators[self.device.index]
        untouched = default.clone_state()
        gc.collect()  # tensors in dead cycles must not be freed in the middle of the recording
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                result = work()
        except Exception:
            with suppress(RuntimeError):
                default.graphsafe_set_state(untouched)  # one that was left recording refuses to draw
            raise
        return CudaRecorded(graph, result)


class CudaRecorded:
    """A CUDA graph and what its work answered: tensors that each replay overwrites."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Any):
        self.graph, self.result, self.pending = graph, result, True

    def replay(self) -> None:
        """Do the work again, on the current stream."""
        self.graph.replay()
