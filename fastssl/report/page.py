"""``write_report``: run folders -> one HTML file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path

import numpy as np

from fastssl import __version__
from fastssl.errors import DataError
from fastssl.report import figures, tables
from fastssl.report.runs import Group, Run, group_runs, read_runs
from fastssl.report.style import CSS

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_report(
    runs: Path | str | Sequence[Path | str],
    out: Path | str | None = None,
    *,
    title: str | None = None,
    extra_sections: Sequence[tuple[str, str]] | None = None,
    views: Sequence[Path | str] = (),
) -> Path:
    """Write the page about one or several runs and return its path.

    ``runs``: run folders, or folders that hold run folders.  ``out``: the HTML file; by default ``report.html`` in the run's folder, or
    in the folder that all runs have in common.  ``extra_sections``: (heading, HTML) pairs set before the settings, trusted as they are.
    ``views``: PNG contact sheets to embed besides each run's own ``views*.png``.

    Metrics that are missing leave out their plots; unreadable files are named on the page.  Raises :class:`DataError` if there is no run
    or a sheet in ``views`` is no PNG.
    """
    found = read_runs(runs)
    groups = group_runs(found)
    if out is None:
        folder = found[0].path if len(found) == 1 else Path(os.path.commonpath([r.path.resolve() for r in found]))
        out = folder / "report.html"
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".part")
    temporary.write_text(render_page(groups, title=title, extra_sections=extra_sections or (), views=[Path(v) for v in views]), encoding="utf-8")
    os.replace(temporary, out)
    return out


def render_page(groups: Sequence[Group], *, title: str | None, extra_sections: Sequence[tuple[str, str]], views: Sequence[Path]) -> str:
    runs = [r for g in groups for r in g.runs]
    several = any(len(g.runs) > 1 for g in groups)
    title = title or _default_title(groups)
    sections: list[tuple[str, str, str]] = [("results", "Results", tables.cards(groups) + tables.headline(groups) + _reading(several) + tables.troubles(runs))]

    add = sections.append
    add(("curves", "Learning curves", _plots(groups, _learning(groups), _strokes(several, "Dashes: raw weights."))))
    add(("losses", "Losses", _plots(groups, _losses(groups), _strokes(several))))
    add(("pseudo", "Pseudo-labels", _plots(groups, _pseudo(groups), "Accuracy is judged against labels that training never sees.")))
    add(("classes", "Classes", _classes(groups)))
    add(("time", "Time", _time(groups, runs)))
    add(("views", "Views", _sheets(groups, views)))
    sections += [(f"extra-{k}", escape(heading), body) for k, (heading, body) in enumerate(extra_sections)]
    diff = tables.settings_diff(groups)
    note = '<p class="note">Only the keys that differ; several values in one cell follow the order of the runs above.</p>' if diff else ""
    add(("settings-all", "Settings", note + diff + tables.all_settings(runs)))
    add(("env", "Environment", tables.environment(runs)))
    add(("how", "Commands", tables.commands(runs)))

    kept = [(k, heading, body) for k, heading, body in sections if body]
    nav = "".join(f'<a href="#{k}">{heading}</a>' for k, heading, _ in kept)
    body = "".join(f'<section id="{k}"><h2>{heading}</h2>{content}</section>' for k, heading, content in kept)
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><div class="soft">{_subtitle(groups, runs)}</div></header><nav>{nav}</nav>{body}'
        f"<footer>Written by fastssl {escape(__version__)}, {made}.</footer></main></body></html>\n"
    )


def _default_title(groups: Sequence[Group]) -> str:
    runs = [r for g in groups for r in g.runs]
    if len(runs) == 1:
        return str(runs[0].summary.get("title") or runs[0].config.get("title") or runs[0].label)
    methods = list(dict.fromkeys(r.method for r in runs))
    return " and ".join([", ".join(methods[:-1]), methods[-1]] if len(methods) > 1 else [f"{methods[0]}, {len(runs)} runs"])


def _subtitle(groups: Sequence[Group], runs: Sequence[Run]) -> str:
    def every(key: str) -> str:
        values = list(dict.fromkeys(str(r.summary[key]) for r in runs if r.summary.get(key) not in (None, "")))
        return " / ".join(values) if len(values) <= 3 else f"{len(values)} different"

    parts = [f"{len(runs)} run{'s' if len(runs) > 1 else ''}"]
    wanted = (("dataset", "{}"), ("num_labeled", "{} labels"), ("steps", "{} updates"), ("device", "{}"), ("precision", "precision {}"))
    parts += [form.format(every(key)) for key, form in wanted if every(key)]
    return escape(" · ".join(parts))


def _reading(several: bool) -> str:
    spread = " <b>mean</b> counts finished runs only; ± is their sample standard deviation." if several else ""
    return (
        '<p class="note">Top-1 accuracy in percent on the evaluation set. <b>last</b> is the final evaluation, <b>best</b> the highest of all '
        f"evaluations (chosen on the same images, so it flatters).{spread} <b>images/s</b> counts labelled and unlabelled images; "
        "<b>data wait</b> is the share of time that training stood still for data.</p>"
    )


def _strokes(several: bool, more: str = "") -> str:
    return " ".join(filter(None, ["Thin: single runs. Thick: their mean." if several else "", more]))


def _plots(groups: Sequence[Group], plots: Sequence[str], note: str = "", wide: bool = False) -> str:
    """The plots that exist, under one legend of the groups that occur in them."""
    shown = [p for p in plots if p]
    if not shown:
        return ""
    text = f'<p class="note">{note}</p>' if note else ""
    seen = [g for g in groups if any(f"-run-{g.number}-" in p or f'-classes-{g.number}"' in p for p in shown)]
    return f'{text}{tables.legend(seen)}<div class="plots{" wide" if wide else ""}">{"".join(shown)}</div>'


def _time_unit(runs: Sequence[Run]) -> tuple[float, str]:
    longest = max((r.wall_s or 0.0 for r in runs), default=0.0)
    return (3600.0, "h") if longest >= 7200 else (60.0, "min") if longest >= 120 else (1.0, "s")


def _metric(kind: str, name: str | Callable[[Run], str], wall: float | None = None, scale: float = 1.0) -> figures.Series:
    """x = step, or wall time in units of ``wall`` seconds."""

    def series(run: Run) -> tuple[np.ndarray, np.ndarray]:
        step, seconds, y = run.series(kind, name if isinstance(name, str) else name(run))
        return (step if wall is None else seconds / wall), y * scale

    return series


def _headline_metric(run: Run) -> str:
    name = f"eval/{run.headline}/top1"
    return name if any(name in line for line in run.evals) else "eval/top1"


def _learning(groups: Sequence[Group]) -> list[str]:
    runs = [r for g in groups for r in g.runs]
    unit, unit_name = _time_unit(runs)

    def raw(run: Run) -> str:
        return "eval/raw/top1" if run.headline != "raw" else ""

    out = []
    for name, x, wall in (("curve-steps", "updates", None), ("curve-wall", f"training time ({unit_name})", unit)):
        title = "Top-1 accuracy over updates" if wall is None else "Top-1 accuracy over training time"
        plain, dashed = _metric("eval", _headline_metric, wall), _metric("eval", raw, wall)
        out.append(figures.curves(groups, plain, name=name, title=title, xlabel=x, ylabel="top-1 (%)", dashed=dashed))
    return out


def _losses(groups: Sequence[Group]) -> list[str]:
    wanted = {"loss": "Total loss", "sup_loss": "Supervised loss", "unsup_loss": "Unsupervised loss"}
    lines = [line for g in groups for r in g.runs for line in r.train]
    others = sorted({k[6:] for line in lines for k in line if k.startswith("train/") and k.endswith("_loss")} - set(wanted))
    wanted |= {k: k.replace("_", " ").capitalize() for k in others}
    plots = [figures.curves(groups, _metric("train", f"train/{k}"), name=k, title=t, xlabel="updates", ylabel="loss") for k, t in wanted.items()]
    return [*plots, figures.curves(groups, _metric("eval", "eval/loss"), name="eval-loss", title="Loss on the evaluation set", xlabel="updates", ylabel="loss")]


def _pseudo(groups: Sequence[Group]) -> list[str]:
    wanted = [
        ("util_ratio", "Share of unlabelled images used (mask)", "share (%)", 100.0),
        ("pseudo_acc", "Accuracy of the selected pseudo-labels", "accuracy (%)", 1.0),
        ("pseudo_acc_all", "Accuracy of all pseudo-labels", "accuracy (%)", 1.0),
        ("confidence", "Mean confidence", "confidence (%)", 100.0),
    ]
    return [
        figures.curves(groups, _metric("train", f"train/{k}", scale=s), name=k.replace("_", "-"), title=t, xlabel="updates", ylabel=y) for k, t, y, s in wanted
    ]


def _classes(groups: Sequence[Group]) -> str:
    per_run = {id(r): _vector(r.latest(f"eval/{r.headline}/per_class", "eval/per_class")) for g in groups for r in g.runs}
    size = max((len(v) for v in per_run.values() if v is not None), default=0)
    plots: list[str] = []
    lists = ""
    if size:
        runs = [r for g in groups for r in g.runs]
        names = next((n for n in (r.class_names for r in runs) if n and len(n) == size), [str(k) for k in range(size)])
        shown = [(g, [v for v in (per_run[id(r)] for r in g.counted) if v is not None and len(v) == size]) for g in groups]
        shown = [(g, vs) for g, vs in shown if vs]
        means = [_known_mean(np.array(vs)) for _, vs in shown]
        spreads = [np.std(vs, axis=0, ddof=1) if len(vs) > 1 else None for _, vs in shown]
        plots.append(figures.class_bars([g for g, _ in shown], means, spreads, names))
        if size > 30:
            worst = [", ".join(f"{names[k]} {m[k]:.1f}" for k in np.argsort(m)[:10]) for m in means]
            items = "".join(f"<li><b>{escape(g.label)}</b>: {escape(w)}</li>" for (g, _), w in zip(shown, worst, strict=True))
            lists = f'<p class="note">The ten worst classes (%):</p><ul class="note">{items}</ul>'
    note = "Last evaluation, mean over runs; whiskers: standard deviation." if any(len(g.runs) > 1 for g in groups) else "Last evaluation."
    bars = _plots(groups, plots, note, wide=True)
    tables_ = [_confusion(g) for g in groups]
    return bars + lists + (f'<div class="plots" style="margin-top:12px">{"".join(tables_)}</div>' if any(tables_) else "")


def _confusion(group: Group) -> str:
    """Confusion matrix summed over the group's runs, if they recorded one of at most 50 classes (``eval/<weights>/confusion``, rows = truth)."""
    found = [m for m in (_matrix(r.latest(f"eval/{r.headline}/confusion", "eval/confusion")) for r in group.counted) if m is not None]
    if not found or len({m.shape for m in found}) > 1 or len(found[0]) > 50:
        return ""
    names = group.runs[0].class_names or []
    names = names if len(names) == len(found[0]) else [str(k) for k in range(len(found[0]))]
    return figures.confusion(np.sum(found, axis=0), names, group)


def _known_mean(values: np.ndarray) -> np.ndarray:
    """Mean over runs [R, K] -> [K] of what is known; NaN for classes that no run could measure."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def _vector(value: object) -> np.ndarray | None:
    try:
        array = np.array(value, dtype=float)  # None inside (a class without images) becomes NaN
    except (TypeError, ValueError):
        return None
    return array if array.ndim == 1 and len(array) else None


def _matrix(value: object) -> np.ndarray | None:
    try:
        array = np.array(value, dtype=float)
    except (TypeError, ValueError):
        return None
    return array if array.ndim == 2 and array.shape[0] == array.shape[1] and array.size and np.isfinite(array).all() else None


def _time(groups: Sequence[Group], runs: Sequence[Run]) -> str:
    bars = figures.time_split(runs, [g.number for g in groups for _ in g.runs])
    rate = figures.curves(groups, _metric("train", "perf/images_per_s"), name="rate", title="Images per second", xlabel="updates", ylabel="images/s", zero=True)
    share = _metric("train", "perf/data_wait_share", scale=100.0)
    wait = figures.curves(groups, share, name="wait", title="Share of time waiting for data", xlabel="updates", ylabel="%", zero=True)
    split = f'<p class="note">Hatched: waiting for data.</p><div class="plots wide" style="margin-bottom:12px">{bars}</div>' if bars else ""
    return split + _plots(groups, [rate, wait])


def _sheets(groups: Sequence[Group], views: Sequence[Path]) -> str:
    """Contact sheets as data URLs: the named ones, then those of each group's first run that has any (other seeds draw from the same laws)."""
    sheets = [(path, path.stem) for path in views]
    for group in groups:
        own = ([(path, f"{run.label}: {path.stem}") for path in sorted(run.path.glob("views*.png"))] for run in group.runs)
        sheets += next(filter(None, own), [])
    out: dict[bytes, str] = {}
    for path, caption in sheets:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"view sheet {path} cannot be read: {error}") from error
        if not data.startswith(_SIGNATURE):
            raise DataError(f"view sheet {path} is not a PNG file")
        image = f'<img alt="{escape(caption, quote=True)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        out.setdefault(data, f'<figure class="sheet card"><figcaption>{escape(caption)}</figcaption>{image}</figure>')
    return f'<div class="plots wide">{"".join(out.values())}</div>' if out else ""
