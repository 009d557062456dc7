"""Noisy Student in one command: round 0 (ERM on the labels), then rounds in which a fresh student learns from the student before.

    python recipes/tllib/noisy_student.py cifar100_supervised [--rounds 3] [--runs runs] [KEY=VALUE ...]

Every round is a run folder, <runs>/noisy_student_VARIANT/round0 and so on. A finished round is skipped and an interrupted one goes on from its last
checkpoint, so the same command can be given again at any time. KEY=VALUE goes to every round. Each round starts from the recipe's weights, never from its
teacher, and reads the last (not the best) student of the round before.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    """Train what is missing; the exit status of the first round that fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", help="cifar100_supervised or cifar100_moco_v2")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=3, help="rounds after round 0 (default: 3)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are made (default: runs)")
    args = parser.parse_intermixed_args(argv)  # KEY=VALUE may stand anywhere
    folder = args.runs / f"noisy_student_{args.variant}"
    for number in range(args.rounds + 1):
        run = folder / f"round{number}"
        if finished(run):
            print(f"[noisy student] round {number} is there already: {run}", flush=True)
            continue
        status = call(["train", *recipe_of(args.variant, folder, number), *args.overrides, *where(run)])
        if status:
            print(f"[noisy student] round {number} stopped with exit status {status}; the same command goes on from here", file=sys.stderr)
            return status
    return 0


def recipe_of(variant: str, folder: Path, number: int) -> list[str]:
    """Recipe and overrides of a round."""
    if number == 0:
        return [f"{HERE / 'erm.yaml'}@{variant}"]
    # the file, not the folder: a folder's teacher would be the one that this round's teacher learned from
    before = folder / f"round{number - 1}" / "checkpoints" / "last" / "student.safetensors"
    return [f"{HERE / 'noisy_student.yaml'}@{variant}", f"teacher.start={before}"]


def where(run: Path) -> list[str]:
    """Options that make the round's run folder, or go on in it. A folder without a checkpoint is put aside."""
    if (run / "checkpoints" / "last").exists():
        return ["--resume", str(run)]
    if run.exists():
        run.rename(next(aside for n in range(1, 1000) if not (aside := run.with_name(f"{run.name}-unfinished-{n}")).exists()))
    run.parent.mkdir(parents=True, exist_ok=True)
    return ["--run-dir", str(run)]


def finished(run: Path) -> bool:
    try:
        return json.loads((run / "summary.json").read_text())["status"] == "finished"
    except (OSError, ValueError, KeyError):
        return False


def call(words: list[str]) -> int:
    print(f"[noisy student] $ {shlex.join(['fastssl', *words])}", flush=True)
    return subprocess.call([sys.executable, "-m", "fastssl", *words])


if __name__ == "__main__":
    raise SystemExit(main())
