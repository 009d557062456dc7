"""Which tensors and figures make up the state of a run, and how they are put back in place. What cannot be put back is a CheckpointError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastssl.engine.checkpoint import Snapshot
from fastssl.engine.meters import Meters
from fastssl.engine.optim import load_optimizer_tensors, optimizer_tensors
from fastssl.engine.step import Updater
from fastssl.errors import CheckpointError
from fastssl.parallel import rank, world_size

SCALER_KEY = "loss_scaler"


def collect(updater: Updater) -> dict[str, dict[str, Tensor]]:
    """All tensors of a run by group. Collective: the random state and partial sums of every rank are brought together."""
    groups = _shared(updater)
    for number, tensors in enumerate(_of_all_ranks(_rank_tensors(updater.meters))):
        groups[f"rank-{number:05d}"] = tensors
    return groups


def restore(updater: Updater, snapshot: Snapshot) -> bool:
    """Put a snapshot back in place. Returns False if the number of ranks changed, so that the ranks' own random state had to be left as seeded."""
    inner, tensors = updater.train_module, snapshot.tensors
    load_module(inner.network, _group(tensors, "student"), "student")
    load_module(inner.method, _group(tensors, "method"), "method")
    if updater.teacher is not None:
        load_module(updater.teacher, _group(tensors, "teacher"), "teacher")
    load_optimizer_tensors(updater.optimizer, _group(tensors, "optimizer"))
    updater.clock.load(snapshot.state["step"])
    scaler = updater.accelerator.scaler
    if scaler is not None and snapshot.state.get(SCALER_KEY):
        scaler.load_state_dict(snapshot.state[SCALER_KEY])
    return _restore_ranks(updater.meters, [tensors[name] for name in sorted(tensors) if name.startswith("rank-")])


def scaler_state(updater: Updater) -> dict[str, Any] | None:
    """The fp16 loss scaler's figures, or None."""
    scaler = updater.accelerator.scaler
    return None if scaler is None else dict(scaler.state_dict())


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy ``tensors`` into the module's state in place (addresses stay). Names and shapes must agree exactly."""
    own = module.state_dict()
    missing, foreign = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or foreign:
        raise CheckpointError(f"the checkpoint's {what} does not fit this recipe: missing {missing[:5]}, unknown {foreign[:5]}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                shapes = f"{list(tensors[name].shape)} there, {list(tensor.shape)} here"
                raise CheckpointError(f"the checkpoint's {what} does not fit this recipe: {name} is {shapes}")
            tensor.copy_(tensors[name])


def first_non_finite(updater: Updater) -> str | None:
    """The first floating-point tensor of what is saved that is not finite, as "group: name", or None. Collective; waits for the device."""
    floating = [(f"{group}: {name}", t) for group, ts in _shared(updater).items() for name, t in ts.items() if t.is_floating_point()]
    device = updater.meters.device
    bad = torch.stack([~torch.isfinite(t.detach()).all().to(device) for _, t in floating])
    place = torch.where(bad, torch.arange(len(floating), device=device), len(floating)).min()
    if world_size() > 1:
        dist.all_reduce(place, op=dist.ReduceOp.MIN)
    found = int(place.item())
    return floating[found][0] if found < len(floating) else None


def _shared(updater: Updater) -> dict[str, dict[str, Tensor]]:
    """The tensors that all ranks hold alike, by group (the live ones, not copies)."""
    inner = updater.train_module
    groups = {
        "student": dict(inner.network.state_dict()),
        "method": dict(inner.method.state_dict()),
        "optimizer": optimizer_tensors(updater.optimizer),
    }
    if updater.teacher is not None:
        groups["teacher"] = dict(updater.teacher.state_dict())
    return groups


def _group(tensors: Mapping[str, dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    if name not in tensors:
        raise CheckpointError(f"the checkpoint has no {name}.safetensors, which this recipe needs")
    return tensors[name]


def _rank_tensors(meters: Meters) -> dict[str, Tensor]:
    """What differs between ranks: random generators (dropout) and partial meter sums."""
    tensors = {"rng/cpu": torch.get_rng_state()}
    if meters.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(meters.device)
    return tensors | {f"meters/{name}": value for name, value in meters.tensors().items()}


def _of_all_ranks(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    if world_size() == 1:
        return [tensors]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, tensors)
    return gathered


def _restore_ranks(meters: Meters, ranks: list[dict[str, Tensor]]) -> bool:
    def sums(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name[len("meters/") :]: value for name, value in tensors.items() if name.startswith("meters/")}

    if len(ranks) == world_size():
        mine = ranks[rank()]
        meters.load_tensors(sums(mine))
        torch.set_rng_state(mine["rng/cpu"])
        if meters.device.type == "cuda" and "rng/cuda" in mine:
            torch.cuda.set_rng_state(mine["rng/cuda"], meters.device)
        return True
    # Another number of ranks: all sums go to rank 0 and the others start at zero. Means stay right only if every rank counts alike.
    total: dict[str, Tensor] = {}
    scale = world_size() / len(ranks)
    for tensors in ranks:
        for name, value in sums(tensors).items():
            part = value * scale if name == "updates" or name.startswith("mean/") else value
            total[name] = total.get(name, torch.zeros_like(value)) + part
    meters.load_tensors(total if rank() == 0 else {name: torch.zeros_like(value) for name, value in total.items()})
    return False
