"""Part 6 of the GPU suite: CIFAR-10 FixMatch with 250 labels from start to end, three seeds: wall time to a stated accuracy.

A shortened run of the published recipe (recipes/cifar10/fixmatch_250.yaml): ``UPDATES`` updates instead of 2^20, the schedule stretched over them.  Each seed
is an ordinary run folder that a later start goes on with.  Needs the converted dataset (``--cifar``); a dry run takes a synthetic one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu_common import Item, Settings, synthetic
from fastssl.engine.train import train
from fastssl.recipe import load_recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "cifar10" / "fixmatch_250.yaml"
UPDATES, TARGET = 16_384, 90.0  # a target chosen before any run, to be replaced by what the first runs show


def items(settings: Settings) -> dict[str, Item]:
    return {f"seed {seed}": lambda seed=seed: run(settings, seed) for seed in range(3)}  # type: ignore[misc]


def run(settings: Settings, seed: int) -> dict[str, Any]:
    overrides = [f"seed={seed}", f"runs_dir={settings.scratch / 'runs'}", f"name=gpu_suite_fixmatch_{seed}", "log.trackers=[]", "teacher.momentum_law=warmup"]
    if settings.dry:
        data = synthetic(settings.scratch / "data_train", classes=4, rows=64, size=8, labeled=20)
        overrides += [f"data.path={data}", "data.split=split", "data.labeled_batch=4", "data.unlabeled_batch=8", "augment.size=8", "augment.strong=flip"]
        overrides += ["augment.weak=flip", "model.name=small_cnn", "train.steps=4", "train.steps_per_epoch=2", "data.workers=1"]
    elif not (settings.cifar / "dataset.json").exists():
        return {"skipped": f"{settings.cifar} holds no dataset.json; convert CIFAR-10 first and give --cifar"}
    else:
        overrides += [f"data.path={settings.cifar}", f"train.steps={UPDATES}", "train.precision=bf16", "batchnorm.momentum=0.01", "train.deterministic=false"]
    folder = train(load_recipe(RECIPE, overrides), resume=None if settings.dry else "auto")
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evals = [(line["time/wall_s"], line["eval/top1"]) for line in lines if line["kind"] == "eval"]
    reached = next((wall for wall, top1 in evals if top1 >= TARGET), None)
    speed = [line["perf/images_per_s"] for line in lines if line["kind"] == "train"]
    return {
        "updates": summary["steps"], "top1": evals[-1][1], "best_top1": max(top1 for _, top1 in evals), "target": TARGET, "seconds_to_target": reached,
        "wall_s": evals[-1][0], "images_per_s": speed[-1], "run": folder.name,
    }  # fmt: skip
