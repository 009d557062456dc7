"""The demo behind ``make demo``: real data in, two trained methods, one table and one report out.

Stages: fetch -> convert (arrays, FFCV) -> verify -> split -> views -> train ERM and FixMatch on the same labels -> compare -> report.
Every stage calls the public command lines (``fastssl-data``, ``accelerate launch -m fastssl``), prints the command and stops the demo with its
exit status if it fails.  Finished stages are not repeated: fetched and converted data are recognised by their manifests.

Ends with ``<runs>/demo/summary.json`` and ``<runs>/demo/report.html``; exits with 1 when FixMatch's mean accuracy is not above ERM's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Plan:
    """What is compared: a dataset, its label split, one recipe per method and the seeds."""

    dataset: str
    split: str
    per_class: int
    recipes: dict[str, Path]
    seeds: tuple[int, ...]
    note: str


def recipes(dataset: str) -> dict[str, Path]:
    return {method: HERE / f"{dataset}_{method}.yaml" for method in ("erm", "fixmatch")}


CPU = Plan("mnist", "demo_40", 4, recipes("mnist"), (1, 2, 3), "no GPU found: MNIST, 40 labels, a small ResNet")
GPU = Plan("cifar10", "demo_250", 25, recipes("cifar10"), (1,), "GPU found: CIFAR-10, 250 labels, WRN-28-2")
VALIDATION_ROWS = 5000
DATASETS = ("cifar10", "mnist")


def say(text: str) -> None:
    print(f"\n[demo] {text}", flush=True)


def call(*words: object) -> None:
    """Run one command, shown as the user would type it; a failing stage ends the demo with its status."""
    command = [str(w) for w in words]
    shown = [Path(command[0]).name, *command[1:]]
    print("  $ " + shlex.join(shown), flush=True)
    status = subprocess.call(command)
    if status:
        print(f"[demo] stage failed with exit status {status}: {shlex.join(shown)}", file=sys.stderr)
        raise SystemExit(status if 0 < status < 126 else 1)


def fastssl_data(*words: object) -> None:
    call(sys.executable, "-m", "data_tools", *words)


def fastssl(*words: object) -> None:
    call(sys.executable, "-m", "fastssl", *words)


def prepare_data(data: Path) -> None:
    say("fetch and convert (each image is decoded and stored once; later runs reuse it)")
    for name in DATASETS:
        fastssl_data("fetch", name, data / "raw" / name)
        for suffix, format in (("", "arrays"), ("-ffcv", "ffcv")):
            folder = data / f"{name}{suffix}"
            if (folder / "dataset.json").exists():
                print(f"  {folder} is there already")
            else:
                fastssl_data("convert", data / "raw" / name, folder, "--format", format, "--name", name)
            fastssl_data("verify", folder)
    say(f"label splits; the demo's hold out {VALIDATION_ROWS} training images for choosing settings")
    for each in (CPU, GPU):
        split(data / each.dataset, each.split, each.per_class, "--validation", VALIDATION_ROWS)
    for labels in (40, 250, 4000):  # those of recipes/cifar10, so that they can be trained right away
        split(data / "cifar10", f"fixmatch_{labels}_seed0", labels // 10, "--law", "simmatch_cifar")


def split(folder: Path, name: str, per_class: int, *options: object) -> None:
    if not any((folder / "splits" / f"{name}{suffix}").exists() for suffix in (".txt", ".json")):
        fastssl_data("split", folder, "--name", name, "--per-class", per_class, "--seed", 0, *options)


def train_all(data: Path, runs: Path, plan: Plan, overrides: list[str], processes: int) -> dict[str, list[Path]]:
    launcher = Path(sys.executable).with_name("accelerate")
    launch = [launcher, "launch", "--num_processes", processes, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    folders: dict[str, list[Path]] = {}
    for method, recipe in plan.recipes.items():
        for seed in plan.seeds:
            say(f"train {method}, seed {seed}")
            before = set((runs / "demo").glob(f"{method}/*"))
            where = [f"data.path={data / plan.dataset}", f"data.split={plan.split}", f"runs_dir={runs / 'demo'}", f"name={method}", f"seed={seed}"]
            call(*launch, "-m", "fastssl", "train", recipe, *where, *overrides)
            new = [p for p in (runs / "demo").glob(f"{method}/*") if p not in before and (p / "summary.json").exists()]
            if len(new) != 1:
                raise SystemExit(f"[demo] expected one new run folder under {runs / 'demo' / method}, found {len(new)}")
            folders.setdefault(method, []).append(new[0])
    return folders


def compare(folders: dict[str, list[Path]]) -> dict[str, dict[str, object]]:
    """Per method: the headline accuracy (EMA weights, last evaluation) of each seed with mean and std, and speed."""
    table: dict[str, dict[str, object]] = {}
    for method, paths in folders.items():
        runs = [json.loads((p / "summary.json").read_text()) for p in paths]
        unfinished = [str(p) for p, r in zip(paths, runs, strict=True) if r["status"] != "finished"]
        if unfinished:
            raise SystemExit(f"[demo] not finished: {', '.join(unfinished)}")
        cells = {f"{which}_{when}": [r["eval"][which][when]["top1"] for r in runs] for which in ("ema", "raw") for when in ("last", "best")}
        headline = cells["ema_last"]
        table[method] = {
            "accuracy_mean": statistics.mean(headline),
            "accuracy_std": statistics.stdev(headline) if len(headline) > 1 else None,
            "accuracy_per_seed": headline,
            **{f"{name}_mean": statistics.mean(values) for name, values in cells.items()},
            "seeds": [r["seed"] for r in runs],
            "steps": runs[0]["steps"],
            "images_per_s": statistics.median(r["images_per_s"] for r in runs),
            "data_wait_share": statistics.median(r["data_wait_share"] for r in runs),
            "train_wall_s": statistics.mean(r["train_wall_s"] for r in runs),
            "runs": [str(p) for p in paths],
        }
    return table


def seeds_of(table: dict[str, dict[str, object]]) -> list[int]:
    return list(next(iter(table.values()))["seeds"])  # type: ignore[call-overload]


def print_table(table: dict[str, dict[str, object]], seconds: float) -> None:
    heads = f"{'EMA last':>16}{'EMA best':>10}{'raw last':>10}{'raw best':>10}{'images/s':>10}{'waiting for data':>18}{'train s/seed':>14}"
    print(f"\n{'top-1 %':<10}{heads}")
    for method, row in table.items():
        spread = "" if row["accuracy_std"] is None else f" ± {row['accuracy_std']:.2f}"
        last = f"{row['accuracy_mean']:.2f}{spread}"
        cells = "".join(f"{row[k]:>10.2f}" for k in ("ema_best_mean", "raw_last_mean", "raw_best_mean"))
        wait = f"{100 * float(str(row['data_wait_share'])):.1f}%"
        print(f"{method:<10}{last:>16}{cells}{row['images_per_s']:>10.0f}{wait:>18}{row['train_wall_s']:>14.1f}")
    count = len(seeds_of(table))
    print(f"{count} seed(s) per method; last is what a user gets, best is the best evaluation on the same test images; all training took {seconds:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for fetched and converted datasets")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for run folders; the demo writes <runs>/demo")
    parser.add_argument("--cpu", action="store_true", help="the CPU setting even where there is a GPU")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the fixed ones")
    parser.add_argument("--processes", type=int, default=1, help="processes (GPUs) to train on")
    parser.add_argument("--quick", action="store_true", help="a few updates of one seed: shows that everything runs, compares nothing")
    args = parser.parse_args()

    import torch

    plan = CPU if args.cpu or not torch.cuda.is_available() else GPU
    overrides = ["train.steps=8", "train.steps_per_epoch=4", "log.every=2"] if args.quick else []
    seeds = tuple(args.seeds or (plan.seeds[:1] if args.quick else plan.seeds))
    plan = replace(plan, seeds=seeds)
    out = args.runs / "demo"
    say(plan.note)
    fastssl("doctor")
    prepare_data(args.data)

    say("pictures of the weak and strong views")
    out.mkdir(parents=True, exist_ok=True)
    sheets = []
    for each in (CPU, GPU):
        sheets.append(out / f"views-{each.dataset}.png")
        fastssl("views", each.recipes["fixmatch"], f"data.path={args.data / each.dataset}", f"data.split={each.split}", "--out", sheets[-1])

    start = time.monotonic()
    folders = train_all(args.data, args.runs, plan, overrides, args.processes)
    seconds = time.monotonic() - start
    table = compare(folders)
    summary = out / "summary.json"
    temporary = summary.with_suffix(".tmp")
    facts = {"dataset": plan.dataset, "split": plan.split, "quick": args.quick, "training_seconds": seconds, "methods": table}
    temporary.write_text(json.dumps(facts, indent=2) + "\n")
    temporary.replace(summary)

    say("report")
    runs = [path for paths in folders.values() for path in paths]
    fastssl("report", *runs, "--out", out / "report.html", "--title", f"fastssl demo: {plan.dataset}, {plan.split}", "--views", *sheets)
    print_table(table, seconds)
    print(f"\nruns     {out}\nsummary  {summary}\nreport   {out / 'report.html'}")
    erm, fixmatch = (float(str(table[m]["accuracy_mean"])) for m in ("erm", "fixmatch"))
    if not args.quick and fixmatch <= erm:
        print(f"[demo] FixMatch ({fixmatch:.2f}) is not above ERM ({erm:.2f}) on the same labels", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
