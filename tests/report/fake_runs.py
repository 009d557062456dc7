"""Run folders as training writes them, with made-up but plausible numbers (nothing here was measured)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HEIGHT = {"fixmatch": 93.0, "flexmatch": 94.5, "simmatch": 92.0, "erm": 48.0}


def write_run(
    folder: Path,
    method: str = "fixmatch",
    seed: int = 1,
    *,
    steps: int = 8192,
    done: int | None = None,
    every: int = 1024,
    classes: list[str] | int = CLASSES,
    status: str = "finished",
    error: str | None = None,
    confusion: bool = True,
    views: bool = False,
    options: dict | None = None,
) -> Path:
    """One run; returns its folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(sum(map(ord, method)) * 1000 + seed)
    names = [str(k) for k in range(classes)] if isinstance(classes, int) else classes
    k = len(names)
    height, wait = HEIGHT.get(method, 80.0) + rng.normal(0, 0.6), float(rng.uniform(0.01, 0.05))
    step_s = float({"erm": 0.004}.get(method, 0.0105) * rng.uniform(0.97, 1.03))
    unlabeled = method != "erm"
    lines, evals = [], []
    hard = np.linspace(-6, 5, k)[rng.permutation(k)] if k > 30 else np.array([1, 3, -5, -8, 1, -4, 3, 2, 3, 3] * 4)[:k]
    for step in range(64, (done or steps) + 1, 64):
        t = step / steps
        grown = 1 - np.exp(-5 * t)
        line = {"step": step, "epoch": (step - 1) // every, "kind": "train", "time/wall_s": step * step_s * 1.04}
        line |= {"train/loss": 2.3 * np.exp(-4 * t) + 0.12 + rng.normal(0, 0.02), "train/sup_loss": 2.2 * np.exp(-6 * t) + 0.01 + abs(rng.normal(0, 0.01))}
        if unlabeled:
            line |= {"train/unsup_loss": 0.25 * grown * np.exp(-t) + rng.normal(0, 0.01), "train/util_ratio": 0.93 * grown + rng.normal(0, 0.01)}
            line |= {"train/pseudo_acc": height * (1 - 0.3 * np.exp(-6 * t)) + rng.normal(0, 0.3), "train/confidence": 0.55 + 0.42 * grown}
            line |= {"train/pseudo_acc_all": height * (1 - 0.5 * np.exp(-5 * t)) + rng.normal(0, 0.3)}
        line |= {"train/lr": 0.03 * np.cos(7 * np.pi * t / 16), "time/data": step_s * wait, "time/step": step_s * (1 + abs(rng.normal(0, 0.02)))}
        line |= {"perf/images_per_s": (64 + 448 * unlabeled) / step_s * (1 + rng.normal(0, 0.01)), "perf/data_wait_share": wait + abs(rng.normal(0, 0.002))}
        lines.append({n: float(v) if isinstance(v, np.floating) else v for n, v in line.items()})
        if step % every == 0:
            record = {"step": step, "epoch": step // every, "kind": "eval", "time/wall_s": step * step_s * 1.04}
            record["eval/loss"] = float(1.8 * np.exp(-4 * t) + 0.25)
            for which, shift in (("raw", -1.5 * (1 - t)), ("ema", 0.0)):
                top1 = float(10 + (height - 10) * (1 - np.exp(-6 * t)) + shift + rng.normal(0, 0.15 if which == "ema" else 0.5))
                top1 -= 3.0 * (step == (done or steps))  # the best evaluation is not the last one
                record |= {f"eval/{which}/top1": top1, f"eval/{which}/top5": min(100.0, top1 + 4.9), f"eval/{which}/balanced_acc": top1 - 0.05}
                record[f"eval/{which}/per_class"] = np.clip(top1 + hard + rng.normal(0, 0.6, k), 0, 100).tolist()
            record["eval/top1"] = record["eval/ema/top1"]
            if confusion and k <= 15:
                noise = rng.dirichlet(np.full(k, 0.6), k) * (100 - np.array(record["eval/ema/per_class"]))[:, None]
                record["eval/ema/confusion"] = (np.diag(record["eval/ema/per_class"]) * 10 + noise * 10).round().astype(int).tolist()
            evals.append(record)
            lines.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {}
    for which in ("raw", "ema"):
        every_one = [{"step": e["step"], **{n: e[f"eval/{which}/{n}"] for n in ("top1", "top5", "balanced_acc")}} for e in evals]
        scores[which] = {"last": every_one[-1], "best": max(every_one, key=lambda e: e["top1"])} if every_one else {}
    rates = [line["perf/images_per_s"] for line in lines if line["kind"] == "train"]
    name, split, reached = f"{method}_cifar10_40", f"cifar10_40_s{seed}", done or steps
    title = f"{method} on CIFAR-10 with 40 labels"
    summary = {
        **{"status": status, "error": error, "recipe": name, "title": title, "method": method, "dataset": "cifar10", "split": split, "seed": seed},
        **{"world": 1, "steps": reached, "total_steps": steps, "num_labeled": 40, "num_unlabeled": 50000, "eval": scores, "classes": names},
        **{"images_per_s": float(np.mean(rates)), "data_wait_share": wait, "train_wall_s": reached * step_s * 1.04, "eval_wall_s": 21.5},
        **{"device": "Test GPU", "precision": "bf16", "config_digest": "0" * 12},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    config = {
        **{"name": name, "title": title, "seed": seed, "runs_dir": "runs"},
        "method": {"name": method, **({"threshold": 0.95} if unlabeled else {}), **(options or {})},
        "data": {"path": "data/cifar10", "split": split, "labeled_batch": 64, "unlabeled_batch": 448},
        "model": {"name": "wrn_28_2", "options": {}},
        "optim": {"name": "sgd", "lr": 0.03, "weight_decay": 5e-4},
        "train": {"steps": steps, "precision": "bf16"},
        "eval": {"every": every, "headline": "ema"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    env = {
        "command": ["python", "-m", "fastssl", "train", f"recipes/{method}.yaml", f"seed={seed}"],
        **{"python": "3.11.9", "torch": "2.14.1", "cuda": "13.0", "cpu": {"cores": 16}, "host": f"node-{seed}"},
        "gpu": {"name": "Test GPU", "driver": "1.0", "memory_gib": 8},
        "git": {"commit": "0123abc", "dirty": False},
    }
    (folder / "env.json").write_text(json.dumps(env))
    if views:
        Image.fromarray(rng.integers(0, 255, (120, 600, 3), dtype=np.uint8)).save(folder / "views.png")
    return folder
