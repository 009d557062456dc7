"""Trains tiny recipes by hand, update by update, and writes down all that must not depend on the number of processes.

Run by test_distributed: once in this process, once under torchrun. Usage: python -m tests.engine.distributed_worker DATA OUT
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fastssl.engine.launch import launch
from fastssl.engine.scoring import as_line
from fastssl.engine.train import Trainer
from fastssl.errors import RecipeError
from fastssl.parallel import rank, world_size
from tests.helpers import make_dataset, tiny_recipe

STEPS = 8
PLAIN = "-plain"  # cases with this ending train on images with plain backgrounds, whose sums are hard for float32
DOUBLE = "-double"  # cases with this ending compute in float64, where rounding cannot hide a wrong formula
CASES = {
    "fixmatch-groups": ("fixmatch", ["batchnorm.groups=2"]),
    "fixmatch-global": ("fixmatch", ["batchnorm.groups=global"]),
    "fixmatch-one": ("fixmatch", ["batchnorm.groups=1"]),
    "fixmatch-groups-double": ("fixmatch", ["batchnorm.groups=2"]),
    "fixmatch-one-double": ("fixmatch", ["batchnorm.groups=1"]),
    "fixmatch-separate": ("fixmatch", ["batchnorm.groups=2", "method.separate_forwards=true", "teacher.buffers=average", "optim.clip_norm=0.5"]),
    "erm-groups": ("erm", ["batchnorm.groups=2"]),
    "erm-global": ("erm", ["batchnorm.groups=global"]),
    "erm-one": ("erm", ["batchnorm.groups=1"]),
    "fixmatch-plain": ("fixmatch", ["batchnorm.groups=1", "augment.size=28", "model.options.width=8"]),
    "erm-plain": ("erm", ["batchnorm.groups=1", "augment.size=28", "model.options.width=8"]),
    "erm-one-double": ("erm", ["batchnorm.groups=1"]),
}


def make_plain_dataset(root: Path) -> Path:
    """28 x 28 images of which two thirds are one grey, as in scans of digits."""
    make_dataset(root, size=28)
    for name in ("train", "test"):
        pixels = np.load(root / f"{name}.pixels.npy")
        pixels[:, :10] = pixels[:, -10:] = 93
        np.save(root / f"{name}.pixels.npy", pixels)
    return root


def gather(value: Any) -> list[Any]:
    """Objects of all ranks, in rank order."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def digest(tensors: dict[str, torch.Tensor]) -> str:
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def seen(trainer: Trainer, raw: dict, views: dict) -> dict[str, dict[int, tuple[int, str]]]:
    """View -> draw position -> (dataset row, hash of the rendered pixels), over all ranks."""
    mine: dict[str, dict[int, tuple[int, str]]] = {}
    for name, view in trainer.updater.renderer.views.items():
        batch = raw[view.stream]
        rows = zip(batch.draw_B.tolist(), batch.row_B.tolist(), views[name], strict=True)
        mine[name] = {draw: (row, hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()) for draw, row, pixels in rows}
    merged: dict[str, dict[int, tuple[int, str]]] = {name: {} for name in mine}
    for part in gather(mine):
        for name, rows_of in part.items():
            assert not merged[name].keys() & rows_of.keys(), "two ranks drew the same position"
            merged[name].update(rows_of)
    return merged


def watch_weak_logits(trainer: Trainer) -> list[torch.Tensor]:
    """The list that holds, after each update, the student's logits of the method's second view (FixMatch: the weak view that pseudo-labels come from)."""
    inner, outs = trainer.updater.train_module, []
    student = inner.student

    def watched(*views: torch.Tensor) -> Any:
        result = student(*views)
        outs.extend(out.logits_NC.detach() for out in (result if len(views) > 1 else [result]))
        return result

    watched.head = student.head  # type: ignore[attr-defined]
    inner.student = watched  # type: ignore[assignment]
    return outs


def margins(logits_UK: torch.Tensor, threshold: float) -> dict[str, float]:
    """How far the decisions are from flipping: distance of the nearest confidence to the threshold, and of the two largest probabilities of a row."""
    top_U2 = logits_UK.double().softmax(1).topk(2, dim=1).values
    return {"threshold": float((top_U2[:, 0] - threshold).abs().min()), "tie": float((top_U2[:, 0] - top_U2[:, 1]).min())}


def run_case(data: Path, out: Path, method: str, overrides: list[str]) -> dict[str, Any]:
    recipe = tiny_recipe(data, out / "runs", *overrides, method=method)
    trainer = Trainer(recipe, launch(recipe), "digest")
    updater, steps = trainer.updater, []
    outs = watch_weak_logits(trainer)
    threshold = getattr(recipe.method.config, "threshold", None)
    with trainer._feed() as feed:
        for step in range(STEPS):
            raw = feed.next()
            views = {name: view.clone() for name, view in updater.renderer(raw).items()}
            outs.clear()
            loss = updater(raw, step)
            nearest = gather(margins(outs[1], threshold)) if threshold is not None else []
            gradients = {name: p.grad.clone() for name, p in updater.train_module.network.named_parameters()}
            line = updater.meters.read()
            totals = gather(float(loss.total.detach()))
            steps.append({"seen": seen(trainer, raw, views), "loss": sum(totals) / len(totals), "gradients": gradients, "line": line, "margins": nearest})
    state = {**updater.train_module.state_dict(), **{f"teacher.{k}": v for k, v in updater.teacher.state_dict().items()}}
    hashes = gather(digest(state))
    networks = {"raw": updater.train_module.network, "ema": updater.teacher.network}
    line = as_line(trainer.evaluator(networks, trainer.accelerator), "ema")
    return {"steps": steps, "state": {k: v.clone() for k, v in state.items()}, "hashes": hashes, "eval": line}


def refusal(data: Path, out: Path) -> str | None:
    """What the trainer says to a global batch of 9."""
    recipe = tiny_recipe(data, out / "runs", "data.unlabeled_batch=9")
    try:
        Trainer(recipe, launch(recipe), "digest")
    except RecipeError as error:
        return str(error)
    return None


def main(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    plain = make_plain_dataset(out / f"plain-{rank()}")  # one for each rank: no rank may read what another still writes
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        torch.set_default_dtype(torch.float64 if name.endswith(DOUBLE) else torch.float32)
        try:
            results[name] = run_case(plain if name.endswith(PLAIN) else data, out, *case)
        finally:
            torch.set_default_dtype(torch.float32)
    results["refused"] = refusal(data, out)
    if world_size() == 1 or dist.get_rank() == 0:
        torch.save({"world": world_size(), "results": results}, out / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    if dist.is_initialized():
        dist.destroy_process_group()
