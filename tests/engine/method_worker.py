"""Walks every registered method through a few updates over an epoch's end and writes down what must not depend on the number of processes.

Everything is computed in float64, where rounding cannot hide a wrong formula. Run by test_methods_on_ranks: once in its process, then once for each
world size under torchrun. Usage: python -m tests.engine.method_worker DATA OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastssl import methods
from fastssl.engine.launch import launch
from fastssl.engine.prepare import prepare_method
from fastssl.engine.train import Trainer
from fastssl.parallel import rank, world_size
from tests.engine.distributed_worker import digest, gather
from tests.helpers import tiny_recipe

STEPS = 5
EVERY = ["batchnorm.groups=4", "data.labeled_batch=4", "data.unlabeled_batch=12", "train.steps_per_epoch=2", "train.steps=8", "optim.lr=0.01"]
# What a method needs beside its defaults so that its terms are alive within five updates of a tiny network (and dropout, which draws per rank, is off).
OVERRIDES: dict[str, dict[str, Any]] = {
    "acr": {"threshold": 0.3, "estimate_after_epoch": 0},
    "acr_d": {"threshold": 0.3, "estimate_after_epoch": 0},
    "comatch": {"threshold": 0.27, "graph_threshold": 0.25, "embed_dim": 8, "memory_batches": 2, "alignment_length": 3},
    "dash": {"warmup_steps": 1, "decay_steps": 1},
    "debiasmatch": {"threshold": 0.3},
    "dst": {"threshold": 0.3, "dropout": 0.0, "hidden": 16, "reversal_steps": 2},
    "fixmatch": {"threshold": 0.3},
    "flexmatch": {"threshold": 0.3},
    "freematch": {"momentum": 0.5, "fairness_weight": 0.5},
    "mean_teacher": {"ramp_epochs": 2},
    "mixmatch": {"ramp_steps": 2},
    "pi_model": {"ramp_epochs": 2},
    "remixmatch": {"strong_views": 2, "alignment_length": 3},
    "self_tuning": {"queue_size": 3, "projection_dim": 16},
    "shrinkmatch": {"threshold": 0.255, "embed_dim": 8, "aux_hidden": 8, "alignment_length": 3},
    "simmatch": {"threshold": 0.255, "embed_dim": 8, "alignment_length": 3},
    "simmatchv2": {"threshold": 0.3, "embed_dim": 8, "neighbours": 3, "bank_batches": 3},
    "simpro": {"threshold": 0.3},
    "softmatch": {"momentum": 0.5},
    "uda": {"threshold": 0.3},
}
# Forms of a method that compute other things: more cases of their own. {case: (method, method options, other overrides)}
FORMS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "fixmatch-eman": ("fixmatch", {"threshold": 0.3, "pseudo_labels": "teacher"}, ["teacher.buffers=average"]),
    "uda-selected": ("uda", {"threshold": 0.3, "mean_over": "selected"}, []),
    "mean_teacher-sum": ("mean_teacher", {"ramp_epochs": 2, "sum_classes": True, "sum_rows": True}, ["teacher.mode=train"]),
    "shrinkmatch-cifar": (
        "shrinkmatch",
        {"threshold": 0.3, "bank": False, "pseudo_labels": "student", "unlabeled_weight": 1.0, "aux_hidden": 8, "alignment_length": 3, "ratio_reset": True},
        [],
    ),
    "shrinkmatch-stl10": (
        "shrinkmatch",
        {"threshold": 0.3, "bank": False, "pseudo_labels": "student", "alignment": "moving", "hard_targets": True, "shrink_scores": "raw", "aux_views": "all",
         "aux_hidden": 8},
        [],
    ),
    "simmatch-shuffled": (
        "simmatch",
        {"threshold": 0.3, "embed_dim": 8, "alignment_length": 3},
        ["teacher.mode=train", "teacher.shuffle=true", "teacher.buffers=leave"],
    ),
    "self_tuning-moving": ("self_tuning", {"queue_size": 3, "projection_dim": 16}, ["teacher.when=by_method", "teacher.mode=train"]),
    "mixmatch-interleaved": ("mixmatch", {"ramp_steps": 2, "interleave": True, "one_weight": True}, ["data.labeled_batch=12"]),
    "adamatch-moving": ("adamatch", {"alignment_momentum": 0.5, "hard_labels": True, "interpolate": False}, []),
    "vat-entropy": ("vat", {"iterations": 2, "entropy_weight": 0.1}, ["batchnorm.groups=1"]),
}  # fmt: skip


def cases() -> dict[str, tuple[str, list[str]]]:
    """Case name -> (method, overrides): every registered method once, then its other forms."""
    every = {name: (name, OVERRIDES.get(name, {}), []) for name in methods.names()}
    return {
        case: (name, [f"method.{key}={json.dumps(value)}" for key, value in options.items()] + more)
        for case, (name, options, more) in {**every, **FORMS}.items()
    }


def run_case(data: Path, out: Path, method: str, overrides: list[str]) -> dict[str, Any]:
    recipe = tiny_recipe(data, out / "runs", *EVERY, *overrides, method=method)
    trainer = Trainer(recipe, launch(recipe), "digest")
    updater, epoch_length = trainer.updater, recipe.train.steps_per_epoch
    prepare_method(updater, trainer.streams, trainer.views)
    losses, parts, state_sizes = [], [], 0
    gradients: dict[str, torch.Tensor] = {}
    with trainer._feed() as feed:
        for step in range(STEPS):
            if step % epoch_length == 0:
                with torch.no_grad():
                    updater.train_module.method.on_epoch_start(step // epoch_length)
            loss = updater(feed.next(), step)
            if (step + 1) % epoch_length == 0:
                with torch.no_grad():
                    updater.train_module.method.on_epoch_end(step // epoch_length)
            totals = gather(float(loss.total.detach()))
            losses.append(sum(totals) / len(totals))
            parts.append({name: float(part) for name, part in loss.parts.items()})
            if step == 0:
                named = updater.train_module.network.named_parameters()
                gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    state_sizes = sum(1 for _ in updater.train_module.method.state_dict())
    state = {name: tensor.clone() for name, tensor in updater.train_module.state_dict().items()}
    if updater.teacher is not None:
        state |= {f"teacher.{name}": tensor.clone() for name, tensor in updater.teacher.state_dict().items()}
    return {
        "losses": losses, "parts": parts, "gradients": gradients, "state": state, "hashes": gather(digest(state)), "buffers": state_sizes,
    }  # fmt: skip


def main(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    try:
        results = {name: run_case(data, out, *case) for name, case in cases().items()}
    finally:
        torch.set_default_dtype(torch.float32)
    if rank() == 0:
        torch.save({"world": world_size(), "results": results}, out / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    if dist.is_initialized():
        dist.destroy_process_group()
