"""What the parts of the GPU suite share: settings, clocks, and synthetic data that needs no network."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastssl.augment import reference
from fastssl.engine import step as step_module
from fastssl.engine.capture import Backend
from fastssl.engine.graphs import CudaGraphs
from fastssl.engine.launch import launch
from fastssl.engine.tape import Tape
from fastssl.engine.train import Trainer
from fastssl.recipe import recipe_from_dict
from fastssl.sources.manifest import split_digest
from fastssl.types import RawBatch

Item = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """``dry``: tiny sizes, a walk through the code whose figures mean nothing. ``scratch``: a folder for synthetic data and runs."""

    dry: bool
    device: torch.device
    scratch: Path
    cifar: Path
    results: Path

    def pick(self, real: Any, tiny: Any) -> Any:
        return tiny if self.dry else real


def seconds(call: Callable[[], object], device: torch.device, *, dry: bool = False, rounds: int = 5, span_s: float = 0.4) -> float:
    """Seconds of one call: the median over ``rounds`` of the mean over as many calls as fill ``span_s``, after a warm-up. Dry: one call.

    On CUDA between events on the current stream, so that launch gaps count as far as the device had to wait for them.
    """
    if dry:
        return _span(call, device, 1)
    for _ in range(3):
        call()
    count = max(1, min(1000, round(span_s / max(1e-7, _span(call, device, 2)))))
    return statistics.median(_span(call, device, count) for _ in range(rounds))


def _span(call: Callable[[], object], device: torch.device, count: int) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) / count
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / count


def ceiling(settings: Settings, name: str) -> float | None:
    """A ceiling that part 1 measured (``copy`` bytes/s, ``matmul`` FLOP/s), or None if it has not run."""
    path = settings.results / "machine.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    return rows.get(name, {}).get("per_s")


def share(amount: float, took: float, limit: float | None) -> float | None:
    """Part of a ceiling that was reached, 0..1."""
    return None if not limit else round(amount / took / limit, 4)


def graphs(device: torch.device) -> Backend:
    """CUDA graphs, or on a CPU the tape that stands for them."""
    return CudaGraphs(device) if device.type == "cuda" else Tape()


@contextmanager
def recordable_pixels(device: torch.device) -> Iterator[None]:
    """On a CPU: rendering that treats all rows alike, as it does on an accelerator; the tape cannot record the other."""
    usual = step_module.render
    if device.type != "cuda":
        step_module.render = lambda policy, plan, pixels, extent, out, backend="auto": reference.render(policy, plan, pixels, extent, out, mode="dense")  # type: ignore[assignment]
    try:
        yield
    finally:
        step_module.render = usual  # type: ignore[assignment]


def synthetic(root: Path, *, classes: int, rows: int, size: int, labeled: int) -> Path:
    """A dataset folder of format arrays: one colour for each class, with noise. Made once."""
    if (root / "dataset.json").exists():
        return root
    root.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    colours, content, splits = random.integers(40, 215, size=(classes, 3)), hashlib.sha256(), {}
    for name, count in (("train", rows), ("test", max(classes, rows // 8))):
        labels = (np.arange(count) % classes).astype(np.int64)
        pixels = np.lib.format.open_memmap(root / f"{name}.pixels.npy", mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
        for start in range(0, count, 256):
            noise = random.normal(0, 40, size=(min(256, count - start), size, size, 3)).astype(np.float32)
            pixels[start : start + 256] = np.clip(colours[labels[start : start + 256]][:, None, None] + noise, 0, 255)
        pixels.flush()
        np.save(root / f"{name}.labels.npy", labels)
        content.update(f"{classes} {rows} {size}".encode() + labels.tobytes())
        splits[name] = {
            "count": count, "class_counts": np.bincount(labels, minlength=classes).tolist(), "max_height": size, "max_width": size,
            "files": {"pixels": f"{name}.pixels.npy", "labels": f"{name}.labels.npy"}, "labels": f"{name}.labels.npy",
        }  # fmt: skip
    digest = content.hexdigest()
    (root / "splits").mkdir(exist_ok=True)
    parts = [list(range(labeled)), list(range(labeled, rows)), []]
    split = {
        "format_version": 1, "name": "split", "law": "synthetic", "seed": 0, "dataset": "synthetic", "dataset_digest": digest, "of": "train",
        **dict(zip(("labeled", "unlabeled", "validation"), parts, strict=True)), "digest": split_digest("train", "", *parts),
    }  # fmt: skip
    (root / "splits" / "split.json").write_text(json.dumps(split))
    manifest = {
        "format_version": 1, "format": "arrays", "name": "synthetic", "classes": [f"class{k}" for k in range(classes)], "channels": 3,
        "mean": [0.5] * 3, "std": [0.25] * 3, "splits": splits, "source": {"kind": "synthetic", "digest": ""}, "options": {}, "digest": digest,
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(manifest))
    return root


class Resident:
    """A recipe's parts with one batch that stays on the device; its draws move on, so that every update renders other views."""

    def __init__(self, values: dict[str, Any], overrides: tuple[str, ...] = ()):
        recipe = recipe_from_dict(values, ["train.capture=off", *overrides])
        self.trainer = Trainer(recipe, launch(recipe), "gpu suite")
        self.updater, self.step = self.trainer.updater, 0
        self.update: Callable[[dict[str, RawBatch], int], Any] = self.updater
        with self.trainer._feed() as feed:
            arrived = feed.next()
            self.raw = {n: RawBatch.allocate(*b.pixels_BHWC.shape, device=b.pixels_BHWC.device).copy_(b) for n, b in arrived.items()}
            if self.updater.meters.device.type == "cuda":
                torch.cuda.synchronize()

    def next(self) -> Any:
        """One update; epochs' hooks included. Its loss."""
        method, length = self.updater.train_module.method, self.trainer.recipe.train.steps_per_epoch
        if self.step % length == 0:
            with torch.no_grad():
                method.on_epoch_start(self.step // length)
        loss = self.update(self.raw, self.step)
        self.step += 1
        if self.step % length == 0:
            with torch.no_grad():
                method.on_epoch_end(self.step // length - 1)
        for batch in self.raw.values():
            batch.draw_B.add_(len(batch))
        return loss

    def close(self) -> None:
        self.trainer.data.close()
        self.trainer.evaluator.source.close()
