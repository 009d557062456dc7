"""Images per second from JPEG files to weak and strong views: fastssl beside its peers and the decoder's own limit, in turns, in one run.

    python benchmarks/bench_loader.py [--quick] [--profile] [--photos FOLDER] [--cifar data/cifar10]

(a) libjpeg-turbo alone; (b) canvases from every source; (c) canvases with a weak and a strong view of each; (d) peers (benchmarks/loader_peers.py), on an
ImageNet-shaped set of JPEGs cut from photographs (benchmarks/loader_data.py), and FixMatch's views of CIFAR-10.  Every candidate has a process of its
own, pinned to one processor, and again to all of them (without --quick: to 2, 4, ... too); turns alternate.  Images per second are by the clock; "per core"
and all ratios are by processor time, which other work on the machine disturbs less, as medians over rounds of the ratio within a round.

Prints `GOAL name value target met|missed` and ends with 1 when one is missed; --profile shows where the time of canvases and views goes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import loader_cases, loader_peers  # noqa: E402
from benchmarks.host import commit, machine, versions  # noqa: E402
from benchmarks.loader_cases import Case  # noqa: E402
from benchmarks.loader_data import Sets, build  # noqa: E402
from benchmarks.loader_table import goals, plot, rows_of, show  # noqa: E402
from benchmarks.photos import photographs  # noqa: E402
from benchmarks.turns import Candidate, context  # noqa: E402

PRELOAD = ("torch", "torchvision.transforms.v2", "fastssl.engine.step", "benchmarks.loader_peers")


def core_counts(quick: bool) -> list[int]:
    """1, then powers of two, and all processors that this process may use."""
    most = len(os.sched_getaffinity(0))
    between = [] if quick else [2**k for k in range(1, most.bit_length()) if 2**k < most]
    return sorted({1, *between, most})


def run_all(chosen: list[Case], sets: Sets, counts: list[int], rounds: int, seconds: float, limit_s: float) -> list[tuple[Case, int, Candidate]]:
    """Every case on every number of cores, in turns. After half of ``limit_s`` no more are opened for several cores; rounds end when it is used up."""
    processors = sorted(os.sched_getaffinity(0))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # for the process that preloads
    made, started = context(PRELOAD), time.perf_counter()
    entries: list[tuple[Case, int, Candidate]] = []
    try:
        for cores in counts:
            for case in chosen:
                if cores > 1 and case.many_cores and time.perf_counter() - started > limit_s / 2:
                    print(f"  {case.name} on {cores} cores: left out, the time of --quick is short")
                elif cores == 1 or case.many_cores:
                    candidate = Candidate(made, case.open, (sets, cores), processors[:cores], seconds)
                    entries.append((case, cores, candidate))
                    opening = time.perf_counter()
                    candidate.wait()  # one after the other: opening is work, too
                    took = time.perf_counter() - opening
                    print(f"  {case.name} ({case.pair or case.makes}, {cores} core(s)): {candidate.state} after {took:.1f} s", flush=True)
                    if candidate.state == "failed":
                        print(f"{case.name} failed:\n{candidate.said}", file=sys.stderr)
        print(f"{len(entries)} candidates opened in {time.perf_counter() - started:.0f} s", flush=True)
        for number in range(rounds):
            for _, _, candidate in entries:
                candidate.take_turn()
            took = time.perf_counter() - started
            print(f"round {number + 1} of {rounds} done after {took:.0f} s", flush=True)
            if took > limit_s:
                break
    finally:
        for _, _, candidate in entries:
            candidate.close()
    return entries


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="128 photographs, 3 rounds, one core and all cores; within 10 minutes on 2 cores")
    parser.add_argument("--profile", action="store_true", help="show where the time goes, decoder and laws apart")
    parser.add_argument("--photos", type=Path, help="folder of photographs; default: those inside scikit-image and scikit-learn")
    parser.add_argument("--cifar", type=Path, default=ROOT / "data" / "cifar10", help="CIFAR-10 in the arrays format; else reductions of the photographs")
    parser.add_argument("--only", default="", help="candidates whose name, pair or kind contains one of these words (commas between)")
    parser.add_argument("--images", type=int, help="photographs in the set (default 1024, with --quick 128)")
    parser.add_argument("--rounds", type=int, help="turns of each candidate (default 9, with --quick 3)")
    parser.add_argument("--seconds", type=float, help="least length of a turn (default 3, with --quick 1)")
    parser.add_argument("--cores", help="numbers of processors, by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bench_loader.json", help="result; the plot goes beside it")
    args = parser.parse_args(arguments)
    of_size: tuple[int, int, float] = (128, 3, 1.0) if args.quick else (1024, 9, 3.0)
    images, rounds, seconds = args.images or of_size[0], args.rounds or of_size[1], args.seconds or of_size[2]
    host, began = machine(), time.perf_counter()
    counts = [int(n) for n in args.cores.split(",")] if args.cores else core_counts(args.quick)
    words = [word for word in args.only.split(",") if word]
    chosen = [c for c in loader_cases.cases() + loader_peers.cases() if not words or any(w in f"{c.name} {c.pair} {c.makes}" for w in words)]
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        sets, facts = build(Path(folder), photographs(args.photos), images, args.cifar)
        print(f"{facts['images']} JPEGs from {facts['photographs']} photographs, {facts['mean_kb']} KB on average; 32x32: {facts['small_images']}", flush=True)
        entries = run_all(chosen, sets, counts, rounds, seconds, 400.0 if args.quick else float("inf"))
        profile: dict[str, Any] = {}
        if args.profile:
            from benchmarks.loader_profile import profile_all

            profile = profile_all(sets)
    rows = rows_of(entries)
    show(rows)
    reached = goals(rows)
    for goal in reached:
        print(f"GOAL {goal['name']} {goal['value']} {goal['target']} {'met' if goal['met'] else 'missed'}")
    if not args.profile and not all(goal["met"] for goal in reached):
        print("a goal is missed: --profile shows where the time goes")
    result = {
        "benchmark": "images per second from JPEG files to canvases and to weak and strong views",
        "command": " ".join(["python benchmarks/bench_loader.py", *(["--quick"] if args.quick else []), *(["--profile"] if args.profile else [])]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": {**host, "load_1min_at_end": round(os.getloadavg()[0], 2)},
        "versions": versions("torch", "torchvision", "numpy", "pillow", "simplejpeg", "timm", "ffcv", "numba", "nvidia-dali-cuda130"),
        "set": facts,
        "rounds": max((len(candidate.turns) for _, _, candidate in entries), default=0),
        "seconds": round(time.perf_counter() - began),
        "rows": rows,
        "goals": reached,
        "profile": profile,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, args.out.with_suffix(".png"))
    print(f"wrote {args.out} and {args.out.with_suffix('.png')} after {result['seconds']} s")
    return 0 if all(goal["met"] for goal in reached) else 1


if __name__ == "__main__":
    sys.exit(main())
