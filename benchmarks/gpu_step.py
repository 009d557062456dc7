"""Part 4 of the GPU suite: whole updates, eager, compiled and captured, against the bare network and against a step as published code writes it.

``bare``: forward and backward of the same network on as many rows as the method renders, resident, cross entropy, the faster of eager and captured; no
augmentation, no optimiser, no teacher.  ``overhead`` is an update's time over that.  MFU counts the bare pass's operations: an update whose unlabelled weak
rows need no gradient, or go through a teacher, is held against more work than it does or less.  Our updates render their views from uint8; the peers are
handed finished views, which they copy from pinned memory as their loaders leave them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_common import Item, Resident, Settings, ceiling, graphs, recordable_pixels, seconds, share, synthetic
from benchmarks.gpu_peers import PEERS
from fastssl.engine.capture import WARM, CapturedUpdate

WAYS = ("eager", "compiled", "captured", "compiled and captured")


def items(settings: Settings) -> dict[str, Item]:
    found: dict[str, Item] = {}
    for network in ("wrn_28_2", "resnet50"):
        for method in ("fixmatch", "simmatch"):
            found[f"{network} {method} bare"] = lambda n=network, m=method: bare(settings, n, m)  # type: ignore[misc]
            for way in WAYS:
                found[f"{network} {method} {way}"] = lambda n=network, m=method, w=way: ours(settings, n, m, w)  # type: ignore[misc]
            found[f"{network} {method} as published"] = lambda n=network, m=method: peer(settings, n, m)  # type: ignore[misc]
    return found


def recipe(settings: Settings, network: str, method: str) -> dict[str, Any]:
    """CIFAR-10's or ImageNet's shapes, bf16, channels-last; the data is synthetic."""
    small = network == "wrn_28_2"
    classes, size = (10, 32) if small else (settings.pick(1000, 10), settings.pick(224, 32))
    canvas, rows = (32, settings.pick(4096, 64)) if small else (settings.pick(256, 32), settings.pick(2000, 64))
    data = synthetic(settings.scratch / f"data_{network}", classes=classes, rows=rows, size=canvas, labeled=settings.pick(1000, 20))
    views = {"weak": "fixmatch_weak", "strong": "fixmatch_strong"} if small else {"weak": "imagenet_weak", "strong": "imagenet_strong"}
    batches = settings.pick((64, 448) if small else (64, 320), (2, 4))
    name = settings.pick(network if small else "torchvision/resnet50", "small_cnn")
    return {
        "name": "gpu_suite", "runs_dir": str(settings.scratch / "runs"), "method": {"name": method}, "model": {"name": name},
        "data": {"path": str(data), "split": "split", "labeled_batch": batches[0], "unlabeled_batch": batches[1], "workers": 2},
        "augment": {"size": size, **views}, "train": {"steps": 1 << 20, "steps_per_epoch": 1 << 19, "precision": "bf16", "deterministic": False},
        "log": {"trackers": []},
    }  # fmt: skip


def _resident(settings: Settings, network: str, method: str, way: str = "eager") -> Resident:
    found = Resident(recipe(settings, network, method), ("train.compile=student",) if "compiled" in way and not settings.dry else ())
    if "captured" in way:
        found.update = CapturedUpdate(found.updater, graphs(settings.device))
    return found


def ours(settings: Settings, network: str, method: str, way: str) -> dict[str, Any]:
    with recordable_pixels(settings.device):
        run = _resident(settings, network, method, way)
        try:
            for _ in range(settings.pick(WARM + 2, WARM + 1 if "captured" in way else 1)):
                run.next()
            took = seconds(run.next, settings.device, dry=settings.dry)
            busy = busy_share(run.next, settings)
        finally:
            run.close()
    return _against_bare(settings, network, method, took, run) | {"busy_share": busy}


def _against_bare(settings: Settings, network: str, method: str, took: float, run: Resident) -> dict[str, Any]:
    from benchmarks.gpu_table import rows_of

    row: dict[str, Any] = {"seconds": took, "images_per_s": sum(len(batch) for batch in run.raw.values()) / took}
    floor = rows_of(settings.results, "step").get(f"{network} {method} bare", {})
    if floor.get("seconds"):
        row["overhead"] = round(took / floor["seconds"] - 1, 4)
        row["mfu"] = share(floor["flop"], took, ceiling(settings, "matmul"))
    return row


def bare(settings: Settings, network: str, method: str) -> dict[str, Any]:
    run = _resident(settings, network, method)
    net, accelerator = run.updater.train_module.network, run.updater.accelerator
    shapes = [view.shape for view in run.updater.renderer.buffers.values()]
    rows, shape = sum(s[0] for s in shapes), shapes[0][1:]
    x = torch.randn(rows, *shape, device=settings.device).to(memory_format=torch.channels_last)
    y = torch.arange(rows, device=settings.device) % run.trainer.task.num_classes

    def once() -> None:
        for parameter in net.parameters():
            parameter.grad = None
        with accelerator.autocast():
            loss = F.cross_entropy(net(x).logits_NC.float(), y)
        loss.backward()

    try:
        with FlopCounterMode(display=False) as counter:
            once()
        backend = graphs(settings.device)
        with backend.aside():
            once()
        eager = seconds(once, settings.device, dry=settings.dry)
        recorded = backend.record(once)
        captured = seconds(recorded.replay, settings.device, dry=settings.dry)
    finally:
        run.close()
    flop, took = float(counter.get_total_flops()), min(eager, captured)
    return {
        "rows": rows, "flop": flop, "seconds": took, "eager_s": eager, "captured_s": captured, "rows_per_s": rows / took,
        "mfu": share(flop, took, ceiling(settings, "matmul")),
    }  # fmt: skip


def peer(settings: Settings, network: str, method: str) -> dict[str, Any]:
    run = _resident(settings, network, method)
    try:
        step = PEERS[method](run, settings.device)
        for _ in range(settings.pick(3, 1)):
            step()
        took = seconds(step, settings.device, dry=settings.dry)
        return _against_bare(settings, network, method, took, run) | {"busy_share": busy_share(step, settings)}
    finally:
        run.close()


def busy_share(call: Callable[[], object], settings: Settings, calls: int = 5) -> float | None:
    """Part of the time in which at least one kernel or copy ran on the device; the rest are gaps. None on a CPU."""
    if settings.device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.end > event.time_range.start
    ]
    return covered(spans)


def covered(spans: list[tuple[float, float]]) -> float | None:
    """Part of the time from the first start to the last end that at least one span covers."""
    if not spans:
        return None
    spans, busy, until = sorted(spans), 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return round(busy / (until - spans[0][0]), 4)
