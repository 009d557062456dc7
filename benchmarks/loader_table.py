"""The loader benchmark's numbers for people: rows with their ratios, the goals, a table, a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.turns import Candidate, Measured

LIMIT = "limit: libjpeg-turbo (simplejpeg)"
PIL_PAIRS = ("imagenet", "tllib", "cifar")
NAMES = {
    "limit": "(a) the decoder alone",
    "canvas": "(b) canvases",
    "imagenet": "(c, d) weak + strong at 224: SimMatch's pair",
    "tllib": "(c, d) weak + strong at 224: the transfer-learning library's pair",
    "cifar": "(c, d) weak + strong at 32: FixMatch's pair",
}


def _ratio(mine: Sequence[Measured], other: Sequence[Measured], rate: Callable[[Measured], float]) -> float:
    return round(statistics.median(rate(a) / rate(b) for a, b in zip(mine, other, strict=True)), 3)


def rows_of(entries: Sequence[tuple[Any, int, Candidate]]) -> list[dict[str, Any]]:
    """One row per candidate; ratios compare turns of the same round, on one core by processor time, on several by the clock."""
    ready = {(case.makes, case.pair, case.name, cores): c.turns for case, cores, c in entries if c.state == "ready" and c.turns}
    rows = []
    for case, cores, candidate in entries:
        row: dict[str, Any] = {"name": case.name, "makes": case.makes, "pair": case.pair, "cores": cores, "ours": case.ours}
        if candidate.state != "ready":
            rows.append({**row, "state": candidate.state, "said": candidate.said.strip().splitlines()[-1] if candidate.said else ""})
            continue
        turns = candidate.turns

        def rate(turn: Measured, cores: int = cores) -> float:
            return turn.per_core_s if cores == 1 else turn.per_s / cores

        row |= {"images_per_s": round(statistics.median(t.per_s for t in turns), 1), "per_core_s": round(statistics.median(map(rate, turns)), 1)}
        limit = ready.get(("limit", "", LIMIT, 1))
        if limit and case.makes in ("limit", "canvas", "views") and case.pair != "cifar":
            pairs = zip(turns, limit, strict=True)
            row["of_limit"] = round(statistics.median(rate(a) / b.per_core_s for a, b in pairs), 3)
        others = {c.name: ready.get((c.makes, c.pair, c.name, cores)) for c, n, _ in entries if not c.ours and n == cores and c.pair == case.pair}
        peers = {name: t for name, t in others.items() if t}
        if case.ours and case.makes == "views" and peers:
            best = max(peers, key=lambda name: statistics.median(map(rate, peers[name])))
            row |= {"best_peer": best, "of_best_peer": _ratio(turns, peers[best], rate)}
            pil = next((name for name in peers if name.startswith("PIL")), None)
            if pil:
                row["of_pil"] = _ratio(turns, peers[pil], rate)
        row["all_per_core_s"] = [round(rate(t), 1) for t in turns]
        rows.append({**row, **candidate.facts})
    return rows


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals per core that this run measured; a canvas's ratio is to (a), a view's to the PIL pipelines with the same laws."""
    wanted: list[tuple[str, str, str, str, str, float]] = [
        ("canvas_ffcv", "canvas", "", "canvas: ffcv", "of_limit", 0.9),
        ("canvas_ffcv_engine", "canvas", "", "canvas: ffcv, FFCV's engine", "of_limit", 0.9),
        ("canvas_shards", "canvas", "", "canvas: shards", "of_limit", 0.9),
        ("canvas_dali_cpu", "canvas", "", "canvas: dali-cpu", "of_limit", 0.9),
        ("canvas_arrays", "canvas", "", "canvas: arrays", "of_limit", 0.9),
        ("canvas_scaled", "canvas", "", "canvas: ffcv, scaled", "of_limit", 1.5),
    ]
    for pair in ("imagenet", "tllib"):
        wanted.append((f"views_224_{pair}_parity", "views", pair, "views: ffcv", "of_pil", 1.5))
        wanted.append((f"views_224_{pair}_scaled_composed", "views", pair, "views: ffcv, scaled", "of_pil", 1.5))
    wanted.append(("views_cifar10", "views", "cifar", "views: arrays", "of_pil", 8.0))
    found = []
    for name, makes, pair, start, key, target in wanted:
        exact = [r for r in rows if (r["makes"], r["pair"], r["cores"]) == (makes, pair, 1) and key in r]
        row = next((r for r in exact if r["name"] == start), None) or next((r for r in exact if start.endswith("scaled") and r["name"].startswith(start)), None)
        if row:
            found.append({"name": name, "value": row[key], "target": target, "met": row[key] >= target})
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """The table, group by group."""
    width = max(len(row["name"]) for row in rows) + 2
    for group, title in NAMES.items():
        mine = [row for row in rows if (row["pair"] or row["makes"]) == group]
        if not mine:
            continue
        print(f"\n{title}\n{'':{width}s}{'cores':>6}{'images/s':>11}{'per core':>10}{'of (a)':>8}{'of PIL':>8}{'of best peer':>14}")
        for row in mine:
            if "images_per_s" not in row:
                print(f"{row['name']:{width}s}{row['cores']:>6}  {row['state']}: {row['said']}")
                continue
            ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("of_limit", "of_pil", "of_best_peer")]
            views = f"   {2 * row['per_core_s']:,.0f} views/s per core" if row["makes"] == "render" else ""
            print(
                f"{row['name']:{width}s}{row['cores']:>6}{row['images_per_s']:>11,.0f}{row['per_core_s']:>10,.0f}"
                f"{ratios[0]:>8}{ratios[1]:>8}{ratios[2]:>14}{views}"
            )
    print()
    for row in rows:
        if row["cores"] == 1 and row["makes"] == "canvas" and "step_of_384_MB" in row:
            high, wide, _ = row["canvas"]
            print(f"{row['name']}: {high}x{wide}; a step of 64 + 320 images is {row['step_of_384_MB']} MB, packed {row['step_of_384_packed_MB']} MB")
    for row in rows:
        if row["cores"] == 1 and "feed" in row:
            print(f"{row['name']} ({row['pair']}): {row['feed']}")
    print()


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Images per second and core, ours and the peers', one panel per group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = {title: [r for r in rows if (r["pair"] or r["makes"]) == g and r["cores"] == 1 and "per_core_s" in r] for g, title in NAMES.items()}
    groups = {title: mine for title, mine in groups.items() if mine}
    if not groups:
        return
    lines = [len(mine) + 1 for mine in groups.values()]
    figure, all_axes = plt.subplots(len(groups), 1, figsize=(8, 0.6 * len(groups) + 0.27 * sum(lines)), height_ratios=lines, squeeze=False)
    for axes, (title, mine) in zip(all_axes[:, 0], groups.items(), strict=True):
        colours = ["#888888" if r["makes"] in ("limit", "render") else "#4878a8" if r["ours"] else "#c08050" for r in mine]
        bars = axes.barh([r["name"] for r in mine], [r["per_core_s"] for r in mine], color=colours, height=0.75)
        axes.bar_label(bars, [f"{r['per_core_s']:,.0f}" for r in mine], padding=3, fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1, 0].set_xlabel("images per second and core (blue: fastssl, brown: peers, grey: limits and rendering alone)", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
