"""Selection at scale: the best K rows of each class out of a scoring log of synthetic rows, by our two ways, DuckDB, Polars, pandas and a heap per class.

    python benchmarks/bench_select.py --rows 100_000_000 --out benchmarks/results/bench_select.json
    python benchmarks/bench_select.py --quick

A row is one (image, class) candidate: P = 10 of each image.  Scores are drawn per class with different means and counts (the commonest class has hundreds of
times the rows of the rarest) and rounded to 1/64, so that lists end in ties.  The log is a real one: Parquet files of 100 000 images.  Every phase runs in a
process of its own, whose peak memory is measured; all must select the same scores.  Slow peers get the first ``--peer-rows`` rows, and a line says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastssl.selftrain.histogram import Histogram  # noqa: E402
from fastssl.selftrain.log import Log, Part  # noqa: E402
from fastssl.selftrain.rules import Rule, automatic_k  # noqa: E402
from fastssl.selftrain.select import rank  # noqa: E402
from fastssl.selftrain.topk import ROW_BYTES, TopK  # noqa: E402

P, UNIT = 10, 100_000  # classes per image, images per file
OURS = ("table", "histogram", "filter", "merge", "scan")
PEERS = ("duckdb", "duckdb_filtered", "polars", "pandas", "heap")
TEACHER = 20_000  # images/s that the selection is measured against


def make_log(folder: Path, images: int, classes: int) -> Log:
    """A complete log of synthetic scores, the same for the same arguments."""
    identity = {
        "teacher": {"weights_sha256": "synthetic"},
        "classes": [str(c) for c in range(classes)],
        "pool": {"dataset_digest": "synthetic"},
        "rows": {"kind": "all", "count": images, "digest": None},
        "unit_rows": UNIT,
        "p": P,
    }
    log = Log.create(folder, identity, {"pool": {}}, None)
    frequency = np.cumsum(1.0 / np.arange(1, classes + 1) ** 0.9)
    for unit in log.missing():
        rng = np.random.default_rng(unit.first)
        first = np.searchsorted(frequency, rng.random(unit.count) * frequency[-1])
        step = 1 + rng.integers(0, max(1, (classes - 1) // P), unit.count)
        cls = (first[:, None] + step[:, None] * np.arange(P)) % classes
        score = rng.normal(0, 2, (unit.count, P)) - 2.5 * np.arange(P) + 4 * np.sin(cls)
        score = (np.round(-np.sort(-score, axis=1) * 64) / 64).astype(np.float32)
        log.commit(unit, Part(log.rows(unit).astype(np.uint64), cls.astype(np.uint16), score), [])
    return log


def result_of(cls: np.ndarray, score: np.ndarray) -> str:
    """Digest of the selected scores of each class: what every engine must agree on, however it breaks ties."""
    score = score + np.float32(0)  # -0 is 0
    order = np.lexsort((score, cls))
    return hashlib.sha256(cls[order].astype("<i4").tobytes() + score[order].astype("<f4").tobytes()).hexdigest()[:16]


def files_of(log: Log, images: int) -> list[str]:
    return [str(log.folder / "parts" / log.record(unit)["file"]) for unit in log.units if unit.first < images]


def phase(name: str, log: Log, k: int, images: int) -> dict[str, Any]:
    """One measured phase over the first ``images`` images of the log."""
    classes = len(log.classes)
    units = [unit for unit in log.units if unit.first < images]

    def parts() -> Any:
        return (log.read(unit, check=False) for unit in units)

    if name in ("table", "histogram"):
        begun = time.perf_counter()
        lists = rank(parts, log.classes, images, Rule(k=k), method=name)
        seconds = time.perf_counter() - begun
        slack = 2.0 if name == "table" else 1.25
        formula = int(classes * k * slack * ROW_BYTES) + (Histogram(classes).nbytes if name == "histogram" else 0)
        return {"seconds": seconds, "selected": len(lists.ranked), "result": result_of(lists.ranked.cls_N, lists.ranked.score_N), "buffer_bytes": formula}
    if name in ("filter", "merge"):
        some = list(parts())
        tables = [TopK(classes, k), TopK(classes, k)]
        for number, part in enumerate(some):
            tables[number % 2].add(part.cls_NP, part.score_NP, part.id_N)
        begun = time.perf_counter()
        if name == "merge":
            rows = sum(table._fill for table in tables)
            tables[0].merge(tables[1]).ranked()
            return {"seconds": time.perf_counter() - begun, "rows": rows}
        tables[0].merge(tables[1]).ranked()
        begun = time.perf_counter()
        passed = sum(tables[0].add(part.cls_NP, part.score_NP, part.id_N) for part in some)
        return {"seconds": time.perf_counter() - begun, "passed": passed}
    if name == "scan":
        counted, seconds = Histogram(classes), 0.0
        for part in parts():
            begun = time.perf_counter()
            counted.add(part.cls_NP, part.score_NP)
            seconds += time.perf_counter() - begun
        return {"seconds": seconds}
    begun = time.perf_counter()
    cls, score = PEER[name](log, k, images)
    return {"seconds": time.perf_counter() - begun, "selected": len(cls), "result": result_of(cls, score)}


def with_duckdb(log: Log, k: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """A window over all rows, spilling to disk if need be."""
    import duckdb

    listed = ", ".join(f"'{f}'" for f in files_of(log, images))
    with tempfile.TemporaryDirectory(dir=log.folder) as spill:
        connection = duckdb.connect()
        connection.execute(f"set temp_directory='{spill}'; set preserve_insertion_order=false")
        found = connection.sql(
            f"select cls, score from (select image_id, unnest(cls::usmallint[]) as cls, unnest(score::float[]) as score from read_parquet([{listed}])) "
            f"qualify row_number() over (partition by cls order by score desc, image_id) <= {k}"
        ).fetchnumpy()
        return found["cls"], found["score"]


def with_duckdb_filtered(log: Log, k: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Our histogram pass leaves few rows, DuckDB ranks those."""
    import duckdb
    import pyarrow as pa

    units = [unit for unit in log.units if unit.first < images]
    counted = Histogram(len(log.classes))
    for unit in units:
        part = log.read(unit, check=False)
        counted.add(part.cls_NP, part.score_NP)
    bar = counted.bar(np.full(len(log.classes), k))
    kept = []
    for unit in units:
        part = log.read(unit, check=False)
        image, place = np.nonzero(part.score_NP >= bar[part.cls_NP])
        kept.append((part.cls_NP[image, place], part.score_NP[image, place], part.id_N[image]))
    candidates = pa.table(dict(zip(("cls", "score", "image_id"), (np.concatenate(c) for c in zip(*kept, strict=True)), strict=True)))
    connection = duckdb.connect()
    connection.register("candidates", candidates)
    found = connection.sql(f"select cls, score from candidates qualify row_number() over (partition by cls order by score desc, image_id) <= {k}").fetchnumpy()
    return found["cls"], found["score"]


def with_polars(log: Log, k: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    import polars as pl

    lazy = pl.scan_parquet(files_of(log, images)).select("image_id", pl.col("cls").arr.to_list(), pl.col("score").arr.to_list()).explode("cls", "score")
    found = lazy.filter(pl.struct(-pl.col("score"), "image_id").rank("ordinal").over("cls") <= k).select("cls", "score").collect()
    return found["cls"].to_numpy(), found["score"].to_numpy()


def with_pandas(log: Log, k: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    import pandas as pd
    import pyarrow.parquet as pq

    frames = []
    for file in files_of(log, images):
        table = pq.read_table(file)
        cls, score = (table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in ("cls", "score"))
        frames.append(pd.DataFrame({"image_id": np.repeat(table.column("image_id").to_numpy(), P), "cls": cls, "score": score}))
    every = pd.concat(frames, ignore_index=True).sort_values(["cls", "score", "image_id"], ascending=[True, False, True])
    best = every.groupby("cls", sort=False).head(k)
    return best["cls"].to_numpy(), best["score"].to_numpy()


def with_heaps(log: Log, k: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """What one writes first: a heap per class, row by row."""
    import heapq

    import pyarrow.parquet as pq

    heaps: list[list[tuple[float, int]]] = [[] for _ in log.classes]
    for file in files_of(log, images):
        table = pq.read_table(file).to_pydict()
        for image, classes, scores in zip(table["image_id"], table["cls"], table["score"], strict=True):
            for c, s in zip(classes, scores, strict=True):
                heap = heaps[c]
                if len(heap) < k:
                    heapq.heappush(heap, (s, -image))
                elif (s, -image) > heap[0]:
                    heapq.heapreplace(heap, (s, -image))
    cls = np.concatenate([np.full(len(heap), c) for c, heap in enumerate(heaps)])
    return cls, np.array([s for heap in heaps for s, _ in heap], np.float32)


PEER = {"duckdb": with_duckdb, "duckdb_filtered": with_duckdb_filtered, "polars": with_polars, "pandas": with_pandas, "heap": with_heaps}


def measure(name: str, log: Log, k: int, images: int) -> dict[str, Any]:
    """Run a phase in a process of its own; its peak memory beside that of a process that only imports."""
    words = [sys.executable, __file__, "--phase", name, "--folder", str(log.folder), "--k", str(k), "--images", str(images)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        return {"phase": name, "failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"}
    found = json.loads(done.stdout.splitlines()[-1])
    found["rows"] = found.get("rows", images * P)
    return {"phase": name, "rows_per_s": found["rows"] / found["seconds"], **found}


def on_paper(found: dict[str, dict[str, Any]], classes: int) -> list[str]:
    """One billion images at the measured rates: bytes, seconds, share of the teacher's pass, memory."""
    images, k = 10**9, 16_000
    teacher_s = images / TEACHER
    size = f"log {images * (P * 6 + 8) / 1e9:.0f} GB before compression"
    lines = [f"1e9 images, C = {classes}, P = {P}, K = {k}: {size}, teacher pass {teacher_s / 3600:.1f} h at {TEACHER} images/s"]
    for name in ("table", "histogram"):
        if "rows_per_s" in found.get(name, {}):
            seconds = images * P / found[name]["rows_per_s"]
            memory = classes * k * ROW_BYTES * (2.0 if name == "table" else 1.25)
            peak = memory + classes * k * 16 * (2.0 if name == "table" else 1.25)
            share = 100 * seconds / teacher_s
            needs = f"buffers {memory / 1e9:.2f} GB, with sorting at most {peak / 1e9:.2f} GB"
            lines.append(f"  {name:<10} {seconds / 3600:5.2f} h on one core ({share:.1f} % of the pass), {needs}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000, help="candidate rows: images times 10 (default: 100 million)")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--k", type=int, default=0, help="rows per class (default: 16 %% of the images over all classes)")
    parser.add_argument("--quick", action="store_true", help="1 million rows, 100 classes")
    parser.add_argument("--peer-rows", type=int, default=20_000_000, help="rows that pandas and heap get at most")
    parser.add_argument("--only", nargs="+", choices=(*OURS, *PEERS), default=[*OURS, *PEERS])
    parser.add_argument("--scratch", type=Path, help="where the log is written and left (default: a temporary folder, removed)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = phase(args.phase, Log(args.folder), args.k, args.images)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({**found, "peak_mb": peak / 1024, "imports_mb": before / 1024}))
        return 0
    rows, classes = (1_000_000, 100) if args.quick else (args.rows, args.classes)
    images = max(1, rows // P)
    k = args.k or automatic_k(classes, images)
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="bench-select-"))
    try:
        log = make_log(scratch / "log", images, classes)
        size = sum(f.stat().st_size for f in (log.folder / "parts").iterdir())
        print(f"{images * P} rows of {images} images, {classes} classes, K = {k}; log {size / 1e6:.0f} MB")
        found: dict[str, dict[str, Any]] = {}
        for name in args.only:
            some = min(images, max(UNIT, args.peer_rows // P // UNIT * UNIT)) if name in ("pandas", "heap") else images
            found[name] = measure(name, log, k, some)
            print(line_of(found[name], some < images), flush=True)
        whole = {name: f["result"] for name, f in found.items() if "result" in f and f["rows"] == images * P}
        agree = len(set(whole.values())) <= 1
        print("all select the same scores" if agree else f"DISAGREEMENT: {whole}")
        paper = on_paper(found, classes)
        print("\n".join(paper))
    finally:
        if args.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)
    if args.out:
        from benchmarks.host import commit, machine, versions  # imports torch, whose memory no phase should carry

        packages = ("numpy", "pyarrow", "duckdb", "polars", "pandas")
        info = {"machine": machine(), "commit": commit(), "versions": versions(*packages), "command": sys.argv}
        settings = {"rows": images * P, "images": images, "classes": classes, "k": k, "p": P, "log_bytes": size}
        args.out.write_text(json.dumps({**info, "settings": settings, "phases": found, "agree": agree, "on_paper": paper}, indent=1) + "\n")
    return 0 if agree else 1


def line_of(found: dict[str, Any], fewer: bool) -> str:
    if "failed" in found:
        return f"{found['phase']:<16} failed: {found['failed']}"
    note = f"  (first {found['rows']} rows only)" if fewer else ""
    memory = f"peak {found['peak_mb']:6.0f} MB (imports {found['imports_mb']:.0f})"
    return f"{found['phase']:<16} {found['rows_per_s'] / 1e6:8.2f} M rows/s  {found['seconds']:8.2f} s  {memory}{note}"


if __name__ == "__main__":
    raise SystemExit(main())
