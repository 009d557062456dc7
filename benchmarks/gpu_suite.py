"""Everything that needs a GPU, in one command that can be stopped and started again.

    python benchmarks/gpu_suite.py                       # all parts, at most 9 minutes each; run it again until it says that all is done
    python benchmarks/gpu_suite.py --parts kernels step  # some of them
    python benchmarks/gpu_suite.py --dry-run             # walks all of it on a CPU with tiny sizes: for checks, its figures mean nothing

Parts: machine (two ceilings), kernels, render, step, capture (equality and host waits of every method), train (CIFAR-10 from start to end).
Each part is a list of items; after each item the part's JSON is written, so nothing measured is lost.  A part whose time is up starts no new item; the next
start goes on there.  Items are done again after ``--again``, and failed ones always.  Nothing is fetched: data is synthetic, but for CIFAR-10 (``--cifar``).
Results lie in benchmarks/results/gpu, those of a dry run in a folder that is printed.  Exit status 1 if an item failed or is not equal, 3 if some are left.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PARTS = ("machine", "kernels", "render", "step", "capture", "train")


def run_part(part: str, settings, *, minutes: float, again: bool, only: str = "") -> tuple[dict[str, dict], list[str]]:
    """Do what is left of ``part``; (its rows by name, names of what is still to do)."""
    from benchmarks.gpu_common import Settings
    from benchmarks.gpu_table import rows_of
    from benchmarks.host import commit, machine
    from data_tools.atomic import write_file

    assert isinstance(settings, Settings)
    began, path = time.monotonic(), settings.results / f"{part}.json"
    items = importlib.import_module(f"benchmarks.gpu_{part}").items(settings)
    rows = {} if again else rows_of(settings.results, part)
    head = {"part": part, "dry_run": settings.dry, "command": " ".join(["python", *sys.argv]), "machine": machine(), "commit": commit()}
    left = [name for name in items if only in name and ("error" in rows.get(name, {"error": ""}))]
    while left and time.monotonic() - began < 60 * minutes:
        name = left.pop(0)
        print(f"[{part}] {name}", flush=True)
        start = time.monotonic()
        try:
            row = items[name]()
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        rows[name] = {**row, "took_s": round(time.monotonic() - start, 2)}
        ordered = {known: rows[known] for known in items if known in rows}
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
        write_file(path, (json.dumps({**head, "date": date, "finished": not left, "rows": ordered}, indent=1) + "\n").encode())
    return {known: rows[known] for known in items if known in rows}, left


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", default="", help="items whose name contains this")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--again", action="store_true", help="also items that are done")
    parser.add_argument("--minutes", type=float, default=9.0, help="per part; the item in progress then is finished (default 9)")
    parser.add_argument("--cifar", type=Path, default=ROOT / "data" / "cifar10", help="converted CIFAR-10 with the split fixmatch_250_seed0")
    parser.add_argument("--out", type=Path, help="folder of the results")
    given = parser.parse_args(arguments)
    if given.dry_run:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the walk is the same everywhere
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and not given.dry_run:
        print("error: this needs a CUDA device; --dry-run walks through it without one", file=sys.stderr)
        return 2
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    scratch = Path(tempfile.mkdtemp(prefix="gpu_suite_")) if given.dry_run else ROOT / "runs" / "gpu_suite"
    results = given.out or (scratch / "results" if given.dry_run else ROOT / "benchmarks" / "results" / "gpu")
    for folder in (scratch, results):
        folder.mkdir(parents=True, exist_ok=True)
    from benchmarks.gpu_common import Settings
    from benchmarks.gpu_table import plot, rows_of, table, verdict

    settings = Settings(given.dry_run, torch.device("cuda", 0) if cuda else torch.device("cpu"), scratch, given.cifar, results)
    still: list[str] = []
    for part in given.parts:
        _, left = run_part(part, settings, minutes=given.minutes, again=given.again, only=given.only)
        still += [f"{part}: {name}" for name in left]
    parts = {part: rows for part in PARTS if (rows := rows_of(results, part))}
    said = table(parts, dry=given.dry_run)
    (results / "table.txt").write_text(said)
    print(said)
    print(f"results in {results}, plot in {plot(parts, results / 'gpu_suite.png', dry=given.dry_run)}")
    bad = [f"{part}: {name}" for part, rows in parts.items() for name, row in rows.items() if verdict(row).split(":")[0].isupper()]
    if bad:
        print(f"{len(bad)} item(s) failed or differ: {'; '.join(bad[:5])}", file=sys.stderr)
    if still:
        print(f"{len(still)} item(s) are left for the next start: {'; '.join(still[:5])}", file=sys.stderr)
    return 1 if bad else 3 if still else 0


if __name__ == "__main__":
    sys.exit(main())
