"""The GPU suite's results as one table and one plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    ("seconds", "ms", 1e3), ("eager_s", "eager ms", 1e3), ("compiled_s", "compiled ms", 1e3), ("views_per_s", "views/s", 1), ("images_per_s", "images/s", 1),
    ("bandwidth_share", "of bandwidth", 100), ("mfu", "MFU %", 100), ("overhead", "overhead %", 100), ("busy_share", "busy %", 100), ("top1", "top-1 %", 1),
)  # fmt: skip


def rows_of(results: Path, part: str) -> dict[str, dict[str, Any]]:
    """The finished items of a part, by name; empty if it has not run."""
    path = results / f"{part}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def table(parts: Mapping[str, Mapping[str, Mapping[str, Any]]], *, dry: bool) -> str:
    """One line per item; what is not equal, failed or was left out says so."""
    said = ["DRY RUN: tiny sizes, figures mean nothing", ""] if dry else []
    for part, rows in parts.items():
        shown = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows.values())]
        said.append(f"{part:<52}" + "".join(f"{title:>14}" for _, title, _ in shown) + "  ")
        for name, row in rows.items():
            said.append(f"  {name:<50}" + "".join(_cell(row.get(key), scale) for key, _, scale in shown) + "  " + verdict(row))
        said.append("")
    return "\n".join(said)


def _cell(value: Any, scale: float) -> str:
    return f"{'-' if value is None else f'{value * scale:,.3g}' if value * scale < 1000 else f'{value * scale:,.0f}':>14}"


def verdict(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"FAILED: {row['error']}"
    for key in ("skipped", "uncapturable"):
        if key in row:
            return f"{key}: {row[key]}"
    if row.get("host_waits"):
        return f"THE HOST WAITS: {row['host_waits']}"
    if "equal" in row:
        return "equal" if row["equal"] else f"NOT EQUAL: {row.get('largest', row.get('largest_difference'))}"
    return ""


def plot(parts: Mapping[str, Mapping[str, Mapping[str, Any]]], out: Path, *, dry: bool) -> Path:
    """Bars: share of the bandwidth for kernels and renders, time of an update beside the bare network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = {
        f"{part}: {name}": row["bandwidth_share"] for part in ("kernels", "render") for name, row in parts.get(part, {}).items() if row.get("bandwidth_share")
    }
    steps = {name: 1e3 * row["seconds"] for name, row in parts.get("step", {}).items() if row.get("seconds")}
    figure, axes = pyplot.subplots(1, 2, figsize=(15, max(3.0, 0.28 * max(len(shares), len(steps), 1))))
    for axis, bars, title in ((axes[0], shares, "share of the copy bandwidth"), (axes[1], steps, "milliseconds of an update")):
        axis.barh(list(bars), list(bars.values()), color="#4477aa")
        axis.invert_yaxis()
        axis.set_title(title + (" (dry run: figures mean nothing)" if dry else ""), fontsize=10)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return out
