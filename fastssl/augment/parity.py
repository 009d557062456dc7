"""The Triton renderer against the reference: values that differ, and what a render takes, eager and replayed from a CUDA graph."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.augment import reference
from fastssl.augment.plan import draw
from fastssl.augment.policy import Policy
from fastssl.augment.triton_account import bytes_account


@dataclass(frozen=True)
class Parity:
    """How two renderings of one plan compare: how many of ``values`` differ, by how much at most (in normalised units), in which rows."""

    policy: str
    values: int
    different: int
    largest: float
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds of one render of a batch: drawing and rendering eagerly, and the same replayed from a graph (None without CUDA); bytes as accounted."""

    policy: str
    eager_s: float
    graph_s: float | None
    bytes_worst: int
    bytes_floor: int


def sample_canvases(rows: int, height: int, width: int, channels: int, *, seed: int = 0, mixed: bool = True) -> tuple[Tensor, Tensor]:
    """uint8 canvases of coarse blobs with noise, and int32 extents: whole canvases, or with ``mixed`` any from half of it on; padding is noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(rows, channels, max(1, height // 8), max(1, width // 8), generator=generator) * 255
    blobs = torch.nn.functional.interpolate(coarse, size=(height, width), mode="nearest")
    image = blobs + torch.randn(blobs.shape, generator=generator) * 12
    span = torch.rand(rows, 1, 1, 1, generator=generator) * 0.8 + 0.2  # some dull images: contrast laws need room to act
    pixels = (image * span + 255 * (1 - span) / 3).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    extent = torch.tensor([[height, width]], dtype=torch.int32).repeat(rows, 1)
    if mixed:
        low = torch.tensor([(height + 1) // 2, (width + 1) // 2])
        extent = (low + (torch.rand(rows, 2, generator=generator) * (extent + 1 - low)).long()).to(torch.int32)
        extent[0] = torch.tensor([height, width])
    return pixels, extent


def _buffer(policy: Policy, rows: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.zeros(rows, policy.channels, policy.size, policy.size, dtype=dtype, device=device).to(memory_format=torch.channels_last)


def compare(policy: Policy, pixels_BHWC: Tensor, extent_B2: Tensor, *, seed: int = 0, dtype: torch.dtype = torch.float32, replayed: bool = False) -> Parity:
    """Render one plan by both backends on the device of ``pixels_BHWC`` and compare every value.  Reads the result on the host.

    ``replayed``: the Triton side is recorded in a CUDA graph and replayed into a cleared buffer (CUDA only).
    """
    from fastssl.augment.triton_renderer import render

    rows, device = len(pixels_BHWC), pixels_BHWC.device
    plan = draw(policy, seed=seed, stream=1, view=0, draw_B=torch.arange(rows, device=device), extent_B2=extent_B2)
    expected, got = _buffer(policy, rows, dtype, device), _buffer(policy, rows, dtype, device)
    reference.render(policy, plan, pixels_BHWC, extent_B2, expected, mode="dense")
    render(policy, plan, pixels_BHWC, extent_B2, got)
    if replayed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            render(policy, plan, pixels_BHWC, extent_B2, got)
        got.zero_()
        graph.replay()
    wrong = expected != got
    places = wrong.flatten(1).any(1).cpu().tolist()
    largest = float((expected.float() - got.float()).abs().max()) if rows else 0.0
    return Parity(policy.name, wrong.numel(), int(wrong.sum()), largest, tuple(i for i, hit in enumerate(places) if hit))


def measure(policy: Policy, pixels_BHWC: Tensor, extent_B2: Tensor, *, dtype: torch.dtype = torch.bfloat16, repeats: int = 20) -> Timing:
    """Time drawing and rendering one batch, best of ``repeats``, after one call that compiles and allocates."""
    from fastssl.augment.triton_renderer import render

    rows, device = len(pixels_BHWC), pixels_BHWC.device
    out, position = _buffer(policy, rows, dtype, device), torch.arange(rows, device=device)

    def once() -> None:
        plan = draw(policy, seed=0, stream=1, view=0, draw_B=position, extent_B2=extent_B2)
        render(policy, plan, pixels_BHWC, extent_B2, out)

    def best(call: object) -> float:
        found = float("inf")
        for _ in range(repeats):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()  # type: ignore[operator]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found = min(found, time.perf_counter() - start)
        return found

    once()
    eager, graph_s = best(once), None
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        graph_s = best(graph.replay)
    account = bytes_account(policy, rows, (pixels_BHWC.shape[1], pixels_BHWC.shape[2]), dtype)
    return Timing(policy.name, eager, graph_s, account.worst, account.floor)
