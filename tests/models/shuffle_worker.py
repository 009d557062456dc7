"""A tiny shuffled teacher that some processes share, each with its slices of the views. Imports little: starting is what takes the time."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from fastssl.models.ema import Teacher
from fastssl.models.heads import mlp
from fastssl.models.network import Network
from fastssl.models.norm import convert_batchnorm, sync_running_stats
from fastssl.schema import BatchNormConfig, TeacherConfig

GROUPS, SIZES = 4, (4, 12)  # one and three rows of the views in each group


def make_network(groups: int, world: int = 1) -> nn.Module:
    torch.manual_seed(0)
    trunk = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    heads = {"projection": mlp(8, out=3), "aux": mlp(8, out=2, bn=True)}
    network = Network(nn.Sequential(*trunk), 8, nn.Linear(8, 5), heads, on_request=["aux"])
    return convert_batchnorm(network, BatchNormConfig(groups=groups), world).double().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def make_views(sizes: tuple[int, ...] = SIZES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64) for size in sizes]
    return [view.to(memory_format=torch.channels_last) for view in views]


def answers(rank: int = 0, world: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Everything that rank ``rank`` of ``world`` gets from the teacher on its slices of the views, and the running statistics."""
    teacher = Teacher(make_network(GROUPS, world), TeacherConfig(mode="train", shuffle=True, buffers="leave"), 1)
    outs = teacher(*(view.chunk(world)[rank] for view in make_views()))
    aux = teacher.head("aux", *(out.feat_ND for out in outs))
    sync_running_stats(teacher.network)
    rows = {f"{v}.{name}": t for v, out in enumerate(outs) for name, t in (("logits", out.logits_NC), ("feat", out.feat_ND), *out.heads.items())}
    rows |= {f"{v}.aux": t for v, t in enumerate(aux)}
    return rows, {name: b.clone() for name, b in teacher.network.named_buffers()}


def worker(rank: int, worlds: tuple[int, ...], folder: str) -> None:
    """One of max(worlds) processes; the first ones also make up each smaller world."""
    torch.set_num_threads(1)
    for world in worlds:
        if rank < world:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
            torch.save(answers(rank, world), f"{folder}/{world}-{rank}.pt")
            dist.destroy_process_group()
