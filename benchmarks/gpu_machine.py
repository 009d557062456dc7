"""Part 1 of the GPU suite: what the machine is, and the two ceilings that everything else is held against."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_common import Item, Settings, seconds
from benchmarks.host import commit, machine, versions


def items(settings: Settings) -> dict[str, Item]:
    return {"environment": lambda: environment(settings), "copy": lambda: copy(settings), "matmul": lambda: matmul(settings)}


def environment(settings: Settings) -> dict[str, Any]:
    """Names and versions."""
    found: dict[str, Any] = {"commit": commit(), **machine(), "device": settings.device.type}
    found["versions"] = versions("torch", "torchvision", "triton", "accelerate", "timm", "kornia", "nvidia-dali-cuda130")
    if settings.device.type == "cuda":
        card = torch.cuda.get_device_properties(settings.device)
        found |= {"gpu": card.name, "memory_gib": round(card.total_memory / 2**30, 1), "multiprocessors": card.multi_processor_count}
        found |= {"capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def copy(settings: Settings) -> dict[str, Any]:
    """Bytes per second, read and written, of a copy within the device's memory."""
    count = settings.pick(2**30, 2**20)
    source = torch.empty(count, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    took = seconds(lambda: target.copy_(source), settings.device, dry=settings.dry)
    return {"seconds": took, "per_s": 2 * count / took, "unit": "bytes/s"}


def matmul(settings: Settings) -> dict[str, Any]:
    """Floating-point operations per second of a square bf16 product."""
    side = settings.pick(8192, 128)
    a, b = (torch.randn(side, side, device=settings.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    took = seconds(lambda: torch.matmul(a, b, out=out), settings.device, dry=settings.dry)
    return {"seconds": took, "per_s": 2 * side**3 / took, "unit": "FLOP/s"}
