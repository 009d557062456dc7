"""Part 5 of the GPU suite: for every method, whether captured updates equal eager ones, and whether an update makes the host wait.

Both runs start from one seed on one synthetic set with deterministic algorithms. ``different`` names the tensors of the state that are not equal to the bit
at the end, ``largest`` how far they are off relative to their largest value; ``equal`` allows ``TOLERANCE``.  On a CPU a tape stands for the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_common import Item, Resident, Settings, graphs, recordable_pixels, synthetic
from fastssl import methods
from fastssl.engine.capture import WARM, CapturedUpdate
from fastssl.engine.prepare import prepare_method
from fastssl.engine.state import collect

TOLERANCE = 1e-3  # where kernels add up in any order (SimMatch's neighbours); everything else is expected at 0
# Heads and queues as wide as their papers' networks want them are cut to this small network's.
SMALL = {"self_tuning": {"queue_size": 8, "projection_dim": 64}}


def items(settings: Settings) -> dict[str, Item]:
    found: dict[str, Item] = {}
    for name in methods.names():
        found[name] = lambda n=name: equality(settings, n)  # type: ignore[misc]
    return found


def recipe(settings: Settings, method: str) -> dict[str, Any]:
    size = settings.pick(32, 8)
    data = synthetic(settings.scratch / "data_capture", classes=settings.pick(10, 4), rows=settings.pick(2048, 64), size=size, labeled=settings.pick(400, 20))
    batches = settings.pick((32, 96), (4, 12))
    return {
        "name": "gpu_suite", "runs_dir": str(settings.scratch / "runs"), "method": {"name": method, **SMALL.get(method, {})},
        "model": settings.pick({"name": "wrn_28_2"}, {"name": "small_cnn", "options": {"width": 4, "layers": 2}}),
        "data": {"path": str(data), "split": "split", "labeled_batch": batches[0], "unlabeled_batch": batches[1], "workers": 1},
        "augment": {"size": size, "weak": "flip", "strong": [{"flip": {}}, {"randaugment": {"space": "mc", "n": 2}}, {"cutout": {"side": 4}}]},
        "train": {"steps": 1000, "steps_per_epoch": settings.pick(20, 3), "precision": settings.pick("bf16", "no")}, "log": {"trackers": []},
    }  # fmt: skip


def equality(settings: Settings, method: str) -> dict[str, Any]:
    against = methods.get(method).uncapturable
    updates, states, losses = settings.pick(50, WARM + 2), [], []
    with recordable_pixels(settings.device):
        for captured in (False, True):
            if captured and against:
                break
            run = Resident(recipe(settings, method))
            try:
                prepare_method(run.updater, run.trainer.streams, run.trainer.views)
                if captured:
                    run.update = CapturedUpdate(run.updater, graphs(settings.device))
                losses.append([float(run.next().total.detach()) for _ in range(updates)])
                states.append({f"{group}/{name}": t.detach().cpu().clone() for group, tensors in collect(run.updater).items() for name, t in tensors.items()})
                if not captured:
                    waits = host_waits(settings, run)
            finally:
                run.close()
    row: dict[str, Any] = {"updates": updates, "host_waits": waits}
    if against:
        return row | {"uncapturable": against}
    different = {name: off for name in states[0] if (off := apart(states[0][name], states[1][name])) > 0}
    worst = max(different.values(), default=0.0)
    return row | {
        "equal": worst <= TOLERANCE and not (waits or ""), "different": sorted(different, key=different.__getitem__, reverse=True)[:8],
        "num_different": len(different), "tensors": len(states[0]),
        "largest": worst, "loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)), "last_loss": losses[0][-1],
    }  # fmt: skip


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; 0 only if equal to the bit."""
    if torch.equal(a, b):
        return 0.0
    x, y = a.double(), b.double()
    off = float((x - y).abs().max() / y.abs().max().clamp_min(1e-12))
    return off if off == off and off > 0 else float("inf")


def host_waits(settings: Settings, run: Resident) -> str | None:
    """What made the host wait for the device in one more eager update; empty for nothing, None where CUDA cannot be asked."""
    if settings.device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.updater.update(run.raw)
    except RuntimeError as found:
        return str(found).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""
