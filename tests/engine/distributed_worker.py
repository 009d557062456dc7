"""Trains tiny recipes by hand, update by update, and writes down all that must not depend on the number of processes.

Run by test_distributed: once in this process, once under torchrun. Usage: python -m tests.engine.distributed_worker DATA OUT
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastssl.engine.launch import launch
from fastssl.engine.scoring import as_line
from fastssl.engine.train import Trainer
from fastssl.errors import RecipeError
from fastssl.parallel import world_size
from tests.helpers import tiny_recipe

STEPS = 6
CASES = {
    "fixmatch-groups": ("fixmatch", ["batchnorm.groups=2"]),
    "fixmatch-global": ("fixmatch", ["batchnorm.groups=global"]),
    "fixmatch-separate": ("fixmatch", ["batchnorm.groups=2", "method.separate_forwards=true", "teacher.buffers=average", "optim.clip_norm=0.5"]),
    "erm-groups": ("erm", ["batchnorm.groups=2"]),
    "erm-global": ("erm", ["batchnorm.groups=global"]),
}


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


def run_case(data: Path, out: Path, method: str, overrides: list[str]) -> dict[str, Any]:
    recipe = tiny_recipe(data, out / "runs", *overrides, method=method)
    trainer = Trainer(recipe, launch(recipe), "digest")
    updater, steps = trainer.updater, []
    with trainer._feed() as feed:
        for step in range(STEPS):
            raw = feed.next()
            views = {name: view.clone() for name, view in updater.renderer(raw).items()}
            loss = updater(raw, step)
            gradients = {name: p.grad.clone() for name, p in updater.train_module.network.named_parameters()}
            line = updater.meters.read()
            totals = gather(float(loss.total.detach()))
            steps.append({"seen": seen(trainer, raw, views), "loss": sum(totals) / len(totals), "gradients": gradients, "line": line})
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
    results: dict[str, Any] = {name: run_case(data, out, *case) for name, case in CASES.items()}
    results["refused"] = refusal(data, out)
    if world_size() == 1 or dist.get_rank() == 0:
        torch.save({"world": world_size(), "results": results}, out / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    if dist.is_initialized():
        dist.destroy_process_group()
