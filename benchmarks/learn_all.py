"""Does every method learn?  All of them on one small real problem under one protocol: Fashion-MNIST, 100 labels, a small ResNet, a CPU.

    python benchmarks/learn_all.py --data data/fashion                  # the originals' methods, one seed; then the rest
    python benchmarks/learn_all.py --data data/fashion --seeds 0 1 2    # more seeds; what is done is not repeated
    python benchmarks/learn_all.py --data data/fashion --plot           # only redraw table and plot from the results

Every method gets the same labels, images, network, optimiser, number of updates, batches and augmentations; what is its own are its loss and, where its
paper asks for one, its teacher. Hyper-parameters of a loss are the method's defaults unless ``SETTINGS`` below says otherwise and why.
Each finished run adds one line to ``benchmarks/results/learn_all.csv`` (method, seed, accuracies of the last update, seconds, versions); a method that
does not beat supervised training is named, not hidden. Runs are ordinary run folders under ``runs/learn_all``: killed runs go on where they stopped.
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
from pathlib import Path
from typing import Any

import torch

from fastssl import methods
from fastssl.engine.train import train
from fastssl.recipe import recipe_from_dict

HERE = Path(__file__).resolve().parent
FIELDS = ("method", "seed", "updates", "ema_top1", "raw_top1", "headline", "seconds", "command", "machine", "python", "torch", "commit")

ORIGINALS = (
    "erm", "oracle", "pseudo_label", "pi_model", "mean_teacher", "uda", "fixmatch", "noisy_student", "self_tuning", "flexmatch", "debiasmatch", "dst",
    "simmatch", "simmatchv2", "shrinkmatch", "simpro", "acr", "acr_d",
)  # fmt: skip
COMMON: dict[str, Any] = {
    "augment": {"size": 28, "weak": "fixmatch_weak", "strong": "fixmatch_strong"},
    "model": {"name": "small_resnet", "options": {"width": 16, "stem_stride": 2}},
    "teacher": {"momentum": 0.99, "momentum_law": "warmup", "buffers": "average"},
    "optim": {"lr": 0.1, "weight_decay": 5.0e-4},
    "schedule": {"name": "cosine_7_16"},
    "data": {"labeled_batch": 32, "unlabeled_batch": 96},
    "log": {"every": 50, "trackers": []},
    "checkpoint": {"keep": 1},
}
# What differs from a method's defaults: {dotted key: value}. Each entry says why; none was chosen by looking at this benchmark's test accuracy.
SETTINGS: dict[str, dict[str, Any]] = {
    # ramps and warm-ups are counted in epochs; a run here has six
    "pi_model": {"method.ramp_epochs": 2},
    "mean_teacher": {"method.ramp_epochs": 2},
    "acr": {"method.estimate_after_epoch": 1},
    "acr_d": {"method.estimate_after_epoch": 1},
    # heads as wide as ImageNet networks want them are cut to this network's 64 features
    "self_tuning": {"method.projection_dim": 64, "augment.weak": "fixmatch_weak"},
    "dst": {"method.hidden": 128},
    # the defaults of this family are ImageNet's; these are its settings for CIFAR
    "simmatch": {
        "method.threshold": 0.95, "method.unlabeled_weight": 1.0, "method.instance_weight": 1.0, "method.alignment_length": 32, "method.embed_dim": 64,
    },
    "shrinkmatch": {
        "method.threshold": 0.95, "method.unlabeled_weight": 1.0, "method.bank": False, "method.pseudo_labels": "student",
        "method.alignment_length": 32, "method.ratio_reset": True, "method.aux_hidden": 16, "method.aux_activation": "leaky_relu",
    },
    # no CIFAR settings were published for it: SimMatch's threshold and weights, and no more neighbours than labels of a class
    "simmatchv2": {
        "method.threshold": 0.95, "method.node_weight": 1.0, "method.edge_weight": 1.0, "method.node_edge_weight": 1.0, "method.neighbours": 10,
        "method.bank_batches": 32, "method.embed_dim": 64,
    },
    # a student of the supervised run with the same seed; the frozen teacher is no average of the student, so the student itself is scored
    "noisy_student": {"teacher.start": "{erm}", "eval.headline": "raw"},
}  # fmt: skip


def supervised_run(runs: str, seed: int) -> str:
    """Checkpoint folder of the finished supervised run with this seed."""
    for summary in sorted(Path(runs, "learn_all", "erm").glob("*/summary.json")):
        content = json.loads(summary.read_text())
        if content["status"] == "finished" and content["seed"] == seed:
            return str(summary.parent / "checkpoints" / "last")
    raise SystemExit(f"there is no finished erm run with seed {seed} under {runs}/learn_all; run --methods erm first")


def settings(method: str, data: str, split: str, seed: int, steps: int, runs: str) -> tuple[dict[str, Any], list[str]]:
    """(recipe values, overrides) of one run."""
    values = {
        **COMMON,
        "name": f"learn_all/{method}",
        "title": f"{method} on Fashion-MNIST, 100 labels",
        "method": {"name": method},
        "seed": seed,
        "runs_dir": runs,
        "data": {**COMMON["data"], "path": data, "split": split},
        "train": {"steps": steps, "steps_per_epoch": max(1, steps // 6), "threads": 1},
    }
    own = {key: supervised_run(runs, seed) if value == "{erm}" else value for key, value in SETTINGS.get(method, {}).items()}
    return values, [f"{key}={json.dumps(value)}" for key, value in own.items()]


def order(names: list[str]) -> list[str]:
    """The originals' methods first, in the order of the papers' tables, then the others."""
    return [n for n in ORIGINALS if n in names] + sorted(n for n in names if n not in ORIGINALS)


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
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def run(method: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one method with one seed and return its line of the table."""
    values, overrides = settings(method, args.data, args.split, seed, args.steps, args.runs)
    began = time.perf_counter()
    path = train(recipe_from_dict(values, overrides), resume="auto")
    summary = json.loads((path / "summary.json").read_text())
    scores = {which: summary["eval"][which]["last"]["top1"] for which in ("ema", "raw") if which in summary["eval"]}
    headline = SETTINGS.get(method, {}).get("eval.headline", "ema")
    return {
        "method": method,
        "seed": seed,
        "updates": args.steps,
        "ema_top1": round(scores["ema"], 3) if "ema" in scores else "",
        "raw_top1": round(scores["raw"], 3),
        "headline": headline,
        "seconds": round(time.perf_counter() - began, 1),
        "command": f"python benchmarks/learn_all.py --methods {method} --seeds {seed} --steps {args.steps}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), no GPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def table(rows: list[dict[str, str]]) -> list[tuple[str, float, float, int]]:
    """(method, mean, standard deviation, runs) of the headline weights' accuracy, best first."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(float(row[f"{row['headline']}_top1"]))
    spread = {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in found.items()}
    return sorted(((name, statistics.mean(v), spread[name], len(v)) for name, v in found.items()), key=lambda entry: -entry[1])


def show(rows: list[dict[str, str]]) -> None:
    entries = table(rows)
    erm = next((mean for name, mean, _, _ in entries if name == "erm"), None)
    print(f"{'method':16} {'top-1 %':>8} {'+-':>6} {'runs':>5} {'over ERM':>9}")
    for name, mean, spread, count in entries:
        gain = f"{mean - erm:+9.2f}" if erm is not None else f"{'':9}"
        print(f"{name:16} {mean:8.2f} {spread:6.2f} {count:5d} {gain}")
    if erm is not None:
        behind = [name for name, mean, _, _ in entries if mean <= erm and name != "erm"]
        print(f"not above ERM: {', '.join(behind) or 'none'}")


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Bars of all methods with ERM and the oracle as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = table(rows)
    lines = {name: mean for name, mean, _, _ in entries if name in ("erm", "oracle")}
    shown = [entry for entry in entries if entry[0] not in lines][::-1]
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(shown) + 1.5))
    axes.barh([e[0] for e in shown], [e[1] for e in shown], xerr=[e[2] for e in shown], color="#4878a8", height=0.7)
    for name, colour in (("erm", "#b04030"), ("oracle", "#308040")):
        if name in lines:
            axes.axvline(lines[name], color=colour, linewidth=1.5, label=f"{name} {lines[name]:.1f}")
    axes.set_xlim(min([*lines.values(), *(e[1] for e in shown)]) - 3, 100)
    axes.set_xlabel("top-1 %, averaged weights, 10 000 test images")
    axes.set_title("Fashion-MNIST, 100 labels, same network, batches and updates")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/fashion", help="Fashion-MNIST in the arrays format (fastssl-data fetch fashion_mnist; convert)")
    parser.add_argument("--split", default="learn_100", help="its label split: fastssl-data split DATA --name learn_100 --per-class 10 --seed 0")
    parser.add_argument("--methods", nargs="*", help="default: all")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=600, help="updates of each run (default 600)")
    parser.add_argument("--runs", default="runs", help="where run folders are made")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "learn_all.csv")
    parser.add_argument("--plot", action="store_true", help="train nothing; table and plot from the results")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.methods or []) - set(methods.names()))
    if unknown:
        parser.error(f"no method {', '.join(unknown)}; there are: {', '.join(methods.names())}")
    failed = []
    if not args.plot:
        for seed in args.seeds:
            for method in order(args.methods or methods.names()):
                done = {(row["method"], int(row["seed"]), int(row["updates"])) for row in read(args.results)}
                if (method, seed, args.steps) in done:
                    continue
                print(f"--- {method}, seed {seed}", flush=True)
                try:
                    add(args.results, run(method, args, seed))
                except Exception as error:  # the others still get their turn; the exit status tells
                    failed.append(method)
                    print(f"{method} failed: {type(error).__name__}: {error}", file=sys.stderr)
    rows = read(args.results)
    if rows:
        show(rows)
        plot(rows, args.results.with_suffix(".png"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
