"""Plots as inline SVG that follows the page's colours: matplotlib draws with placeholder colours, CSS variables replace them.

A group keeps its colour (a colour-blind-safe palette, one set for light and one for dark pages) and its marker everywhere.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastssl.report.runs import Group, Run

# Okabe and Ito's palette (2008), darkened or lightened where needed for contrast with the page.
LIGHT = ("#0072b2", "#d55e00", "#00825f", "#b3508a", "#a87900", "#3a8fc7", "#6b4fa0", "#555555")
DARK = ("#58b4ee", "#ff8f45", "#33cc9f", "#ea9cc9", "#f0bd3f", "#a5dcff", "#b9a3f0", "#bbbbbb")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_INK, _GRID, _PAPER = "#010203", "#010204", "#010205"  # placeholders: text and axes, grid lines, the card behind
_POINTS = 400  # drawn per curve

RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastssl",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "lines.solid_capstyle": "round",
}

Series = Callable[[Run], tuple[np.ndarray, np.ndarray]]


def colour(number: int) -> str:
    """Placeholder of a group's colour; becomes ``var(--m<number>)``."""
    return f"#0a0b{number % len(LIGHT):02x}"


def marker(number: int) -> str:
    # after one round through the colours the markers move on by one, so that the pair stays unique for 64 groups
    return MARKERS[(number + number // len(LIGHT)) % len(MARKERS)]


def curves(
    groups: Sequence[Group], series: Series, *, name: str, title: str, xlabel: str, ylabel: str, dashed: Series | None = None, zero: bool = False
) -> str:
    """Every run as a thin line and each group's mean as a thick one; ``""`` if no run has the series.

    ``series(run)`` -> (x [T], y [T]).  ``dashed`` adds a second family (e.g. raw weights) in dashes, means only.
    ``zero`` starts the y axis at 0.
    """
    with matplotlib.rc_context(RC):
        figure, axes = _panel(title, xlabel, ylabel)
        drawn = 0
        for group in groups:
            tint = colour(group.number)
            lines = [(r, *_thin(*series(r))) for r in group.runs]
            lines = [(r, x, y) for r, x, y in lines if len(y)]
            drawn += len(lines)
            many = len(lines) > 1
            for k, (_run, x, y) in enumerate(lines):
                style = {"lw": 0.8, "alpha": 0.5} if many else {"lw": 2.0}
                axes.plot(x, y, color=tint, gid=f"run-{group.number}-{k}", marker="." if len(y) == 1 else None, **style)
            counted = [(x, y) for r, x, y in lines if r in group.counted] or [(x, y) for _, x, y in lines]
            if lines:
                x, y = mean_curve(counted)
                if many:
                    axes.plot(x, y, color=tint, lw=2.2, gid=f"mean-{group.number}")
                marks = np.unique(np.linspace(len(x) // 8, max(len(x) - 1, 0), 5).astype(int))[: len(x)]
                axes.plot(x[marks], y[marks], color=tint, ls="none", marker=marker(group.number), ms=5)
            if dashed is not None:
                extra = [(x, y) for x, y in (_thin(*dashed(r)) for r in group.counted) if len(y)]
                if extra:
                    axes.plot(*mean_curve(extra), color=tint, lw=1.3, ls=(0, (4, 2)), gid=f"dashed-{group.number}")
        if not drawn:
            return ""
        if zero:
            axes.set_ylim(bottom=0)
        return to_svg(figure, name, title)


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean of curves at the x that all of them cover, linear in between; with equal x it is the plain mean."""
    if len(curves) == 1:
        return curves[0]
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if low > high:  # they never overlap: there is no mean to draw
        return np.empty(0), np.empty(0)
    grid = np.unique(np.concatenate([x[(x >= low) & (x <= high)] for x, _ in curves]))
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)


def class_bars(groups: Sequence[Group], values: Sequence[np.ndarray], spreads: Sequence[np.ndarray | None], names: Sequence[str]) -> str:
    """Per-class accuracy in percent, one bar per group: ``values[g]`` and ``spreads[g]`` are [K]. More than 30 classes are drawn as sorted curves."""
    classes = len(names)
    title = "Accuracy per class" if classes <= 30 else f"Accuracy of the {classes} classes, each method sorted from worst to best"
    with matplotlib.rc_context(RC):
        figure, axes = _panel(title, "" if classes <= 30 else "class rank", "accuracy (%)", width=10.6, height=3.1)
        for k, (group, y, spread) in enumerate(zip(groups, values, spreads, strict=True)):
            tint = colour(group.number)
            if classes > 30:
                rank, every = np.arange(1, classes + 1), max(1, classes // 8)
                axes.plot(rank, np.sort(y), color=tint, lw=2, marker=marker(group.number), markevery=every, gid=f"classes-{group.number}")
                continue
            width = 0.82 / len(groups)
            at = np.arange(classes) + (k - (len(groups) - 1) / 2) * width
            axes.bar(at, y, width * 0.92, color=tint)[0].set_gid(f"classes-{group.number}")
            if spread is not None:
                axes.errorbar(at, y, spread, fmt="none", ecolor=_INK, elinewidth=0.8, capsize=1.5)
        axes.set_ylim(0, 100)
        if classes <= 30:
            axes.grid(axis="x", visible=False)
            crowded = classes > 12 or max(map(len, names)) > 9
            axes.set_xticks(range(classes), names, rotation=40 if crowded else 0, ha="right" if crowded else "center")
        return to_svg(figure, "per-class", title)


def confusion(matrix: np.ndarray, names: Sequence[str], group: Group) -> str:
    """Confusion matrix [K, K] of counts (rows: truth, columns: prediction) in percent of the row; the ink follows the square root."""
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    classes = len(share)
    title = f"Confusion (%): {group.label}"
    with matplotlib.rc_context({**RC, "axes.grid": False}):
        figure, axes = _panel(title, "predicted", "true", width=5.2, height=4.6)
        for i, j in np.argwhere(share >= 0.05):
            depth = float(np.sqrt(share[i, j] / 100))
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour(group.number), alpha=depth, lw=0))
            if classes <= 15 and share[i, j] >= 0.95:
                axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=8.5, color=_PAPER if depth > 0.6 else _INK)
        axes.set(xlim=(-0.5, classes - 0.5), ylim=(classes - 0.5, -0.5), aspect="equal")
        axes.tick_params(length=0)
        if classes <= 15:
            axes.set_xticks(range(classes), names, rotation=40, ha="right")
            axes.set_yticks(range(classes), names)
        return to_svg(figure, f"confusion-{group.number}", title)


def time_split(runs: Sequence[Run], numbers: Sequence[int]) -> str:
    """One bar per run: milliseconds of a step spent waiting for data (hatched) and on everything else."""
    rows = [(r, n, r.typical("time/data"), r.typical("time/step")) for r, n in zip(runs, numbers, strict=True)]
    known = [(r, n, d or 0.0, s) for r, n, d, s in rows if s]
    if not known:
        return ""
    title = "Time of one update (median)"
    with matplotlib.rc_context({**RC, "hatch.linewidth": 0.8}):
        figure, axes = _panel(title, "milliseconds", "", width=10.6, height=0.9 + 0.34 * len(known))
        for k, (_run, number, data, step) in enumerate(known):
            data = min(data, step)
            axes.barh(k, 1e3 * (step - data), left=1e3 * data, height=0.62, color=colour(number), gid=f"compute-{k}")
            axes.barh(k, 1e3 * data, height=0.62, color="none", edgecolor=colour(number), hatch="////", gid=f"data-{k}")
            said = f"{_ms(step)}, {data / step:.1%} waiting"
            axes.annotate(said, (1e3 * step, k), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(known)), [r.label for r, *_ in known])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1e3 * max(s for *_, s in known) * 1.28)
        return to_svg(figure, "time-split", title)


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an ``<svg>`` element: no prolog, no metadata, no namespaces, ids made unique by ``name``, colours from CSS."""
    raw = io.StringIO()
    figure.savefig(raw, format="svg", transparent=True, metadata={k: None for k in ("Date", "Creator", "Format", "Type")})
    text = raw.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' id="[A-Za-z2.]+_\d+"', "", text)  # the plotter's own names of parts, which nothing refers to
    prefix = re.sub(r"\W+", "-", name) + "-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    for number in range(len(LIGHT)):
        text = text.replace(colour(number), f"var(--m{number})")
    text = text.replace(_INK, "var(--ink)").replace(_GRID, "var(--grid)").replace(_PAPER, "var(--card)")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)  # the page's font, not the plotter's
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    text = re.sub(r"<svg [^>]*?>", f'<svg viewBox="0 0 {size[1]} {size[2]}" role="img" aria-label="{html.escape(label, quote=True)}">', text, count=1)
    return f'<figure class="plot" data-plot="{html.escape(name, quote=True)}">{text}</figure>'


def swatch(number: int) -> str:
    """A group's legend sign: its marker on a piece of its line."""
    shapes = {
        "o": '<circle cx="14" cy="7" r="4"/>',
        "s": '<rect x="10.3" y="3.3" width="7.4" height="7.4"/>',
        "^": '<path d="M14 2.4 18.6 11H9.4z"/>',
        "D": '<path d="M14 1.8 19 7 14 12.2 9 7z"/>',
        "v": '<path d="M14 11.6 18.6 3H9.4z"/>',
        "P": '<path d="M12.4 2.5h3.2v3h3v3h-3v3h-3.2v-3h-3v-3h3z"/>',
        "X": '<path d="m10 4.8 1.8-1.8L14 5.2 16.2 3 18 4.8 15.8 7 18 9.2 16.2 11 14 8.8 11.8 11 10 9.2 12.2 7z"/>',
        "*": '<path d="m14 1.5 1.6 3.7 4 .3-3 2.6.9 3.9L14 9.9 10.5 12l.9-3.9-3-2.6 4-.3z"/>',
    }
    tint = f"var(--m{number % len(LIGHT)})"
    style = f"fill:{tint};stroke:{tint}"
    return f'<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true" style="{style}"><path d="M1 7h26" stroke-width="2"/>{shapes[marker(number)]}</svg>'


def _panel(title: str, xlabel: str, ylabel: str, width: float = 5.2, height: float = 3.1):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(title, int(width * 11)), loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if "step" in xlabel or "update" in xlabel:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e6:g}M" if abs(x) >= 1e6 else f"{x / 1e3:g}k" if abs(x) >= 1e4 else f"{x:g}"))
    return figure, axes


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finite points in order of x, at most ``_POINTS`` of them (bucket means, first and last kept exactly)."""
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    if len(x) <= _POINTS:
        return x, y
    inner_x, inner_y = np.array_split(x[1:-1], _POINTS - 2), np.array_split(y[1:-1], _POINTS - 2)
    return np.array([x[0], *(b.mean() for b in inner_x), x[-1]]), np.array([y[0], *(b.mean() for b in inner_y), y[-1]])


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
