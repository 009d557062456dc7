"""The page's tables and cards as HTML text. Every number keeps its full value in ``data-value`` beside the rounded one."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

from fastssl.report.figures import swatch
from fastssl.report.runs import WEIGHTS, Group, Run, differing, flatten, shown

_ABSENT = '<span class="soft">–</span>'


def number(value: float | None, key: str, form: str = "{:.2f}", *, tag: str = "td", css: str = "") -> str:
    """A cell with a number, or a dash; ``key`` says in ``data-key`` where the number comes from."""
    style = f' class="{css}"' if css else ""
    if value is None:
        return f"<{tag}{style}>{_ABSENT}</{tag}>"
    return f'<{tag}{style} data-key="{escape(key)}" data-value="{value!r}">{_text(value, form)}</{tag}>'


def duration(seconds: float | None) -> str:
    """1:02:03 as ``1 h 02 min``; seconds below two minutes."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _text(value: float, form: str) -> str:
    """``value`` in a format; the empty format means a duration in seconds."""
    return form.format(value) if form else duration(value)


def legend(groups: Sequence[Group]) -> str:
    return '<div class="legend">' + "".join(f"<span>{swatch(g.number)}{escape(g.label)}</span>" for g in groups) + "</div>"


def cards(groups: Sequence[Group]) -> str:
    """One card per group: last accuracy of the headline weights, mean and spread over its runs."""
    out = []
    for group in groups:
        which = group.runs[0].headline
        last = group.mean_std(_accuracy(which, "last"))
        best = group.mean_std(_accuracy(which, "best"))
        rate = group.mean_std(lambda r: r.figure_of("images_per_s", "perf/images_per_s"))
        big = "not evaluated" if last is None else f"{last[0]:.2f}<small> {'± ' + format(last[1], '.2f') + ' ' if last[1] is not None else ''}%</small>"
        lines = [f"top-1 at the last evaluation, {_weights(which)}" + (f", {last[2]} runs" if last and last[2] > 1 else "")] if last else []
        if best:
            lines.append(f"best {best[0]:.2f}" + (f" ± {best[1]:.2f}" if best[1] is not None else "") + " %")
        if rate:
            lines.append(f"{rate[0]:,.0f} images/s")
        body = "".join(f'<span class="note">{line}</span>' for line in lines)
        out.append(f'<div class="card"><h3>{swatch(group.number)}{escape(group.label)}</h3><span class="big">{big}</span>{body}</div>')
    return f'<div class="cards">{"".join(out)}</div>'


def _weights(which: str) -> str:
    return "EMA weights" if which == "ema" else f"{which} weights"


_Value = Callable[[Run], "float | None"]


def _accuracy(which: str, when: str, name: str = "top1") -> _Value:
    return lambda run: run.score(which, when, name)


def _columns(runs: Sequence[Run]) -> list[tuple[str, str, str, _Value]]:
    """(heading, data-key, format, value) of the headline table; columns that nobody has are left out."""
    out: list[tuple[str, str, str, _Value]] = []
    for which in WEIGHTS:
        for when in ("last", "best"):
            out.append((f"{which.upper() if which == 'ema' else which}<br>{when}", f"eval.{which}.{when}.top1", "{:.2f}", _accuracy(which, when)))
    out.append(("images/s", "images_per_s", "{:,.0f}", lambda r: r.figure_of("images_per_s", "perf/images_per_s")))
    out.append(("data<br>wait", "data_wait_share", "{:.1%}", lambda r: r.figure_of("data_wait_share", "perf/data_wait_share")))
    out.append(("wall<br>time", "train_wall_s", "", lambda r: r.wall_s))
    which = runs[0].headline
    out += [(h, f"eval.{which}.last.{n}", "{:.2f}", _accuracy(which, "last", n)) for n, h in (("balanced_acc", "balanced<br>last"), ("top5", "top-5<br>last"))]
    return [c for c in out if any(c[3](r) is not None for r in runs)]


def _setup(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(heading, summary key) of what belongs beside a result unless it is the same for all runs (then the page's head says it)."""
    wanted = [("dataset", "dataset"), ("labels", "num_labeled"), ("updates", "steps")]
    return [(heading, key) for heading, key in wanted if len({shown(r.summary.get(key)) for r in runs}) > 1]


def headline(groups: Sequence[Group]) -> str:
    """Each run's numbers; a group of several runs ends in its mean ± standard deviation. The best mean of an accuracy column is bold."""
    runs = [r for g in groups for r in g.runs]
    columns = _columns(runs)
    setup = _setup(runs)
    means = [[g.mean_std(c[3]) for g in groups] for c in columns]
    tops = [max((m[0] for m in column if m), default=None) if len(groups) > 1 else None for column in means]
    tops = [t if c[1].startswith("eval.") else None for t, c in zip(tops, columns, strict=True)]
    headings = "".join(f"<th>{c[0]}</th>" for c in columns)
    given = "".join(f"<th>{heading}</th>" for heading, _ in setup)
    head = f'<th class="l">run</th>{given}{headings}'
    rows = []
    for k, group in enumerate(groups):
        one = len(group.runs) == 1
        for run in group.runs:
            cells = [*(_given(run.summary.get(name)) for _, name in setup)]
            for (_, key, form, value), top in zip(columns, tops, strict=True):
                v = value(run)
                cells.append(number(v, key, form, css="top" if one and v is not None and v == top else ""))
            where, status = escape(str(run.path), quote=True), escape(str(run.summary.get("status") or "no summary"), quote=True)
            name = f'<th class="l">{swatch(group.number)}{escape(run.label)}{_state(run)}</th>'
            rows.append(f'<tr data-run="{where}" data-status="{status}">{name}{"".join(cells)}</tr>')
        if not one:
            cells = ["<td></td>"] * len(setup)
            for column, top, (_, key, form, _value) in zip(means, tops, columns, strict=True):
                m = column[k]
                if m is None:
                    cells.append(f"<td>{_ABSENT}</td>")
                    continue
                spread = f' <small class="soft">± {_text(m[1], form)}</small>' if m[1] is not None and form else ""
                css = ' class="top"' if m[0] == top else ""
                cells.append(f'<td{css} data-key="mean:{escape(key)}" data-value="{m[0]!r}" data-std="{m[1]!r}">{_text(m[0], form)}{spread}</td>')
            said = "mean" if len(group.counted) == len(group.runs) else f"mean of {len(group.counted)} finished"
            name = f'<th class="l">{swatch(group.number)}{escape(group.label)}, {said}</th>'
            rows.append(f'<tr class="mean" data-group="{escape(group.label, quote=True)}">{name}{"".join(cells)}</tr>')
    return f'<div class="scroll"><table id="headline"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _given(value: Any) -> str:
    return f"<td>{_ABSENT if value is None else f'{value:,}' if isinstance(value, int) else escape(str(value))}</td>"


def _state(run: Run) -> str:
    """A badge for runs that did not finish."""
    status = str(run.summary.get("status") or "no summary")
    return "" if run.finished else f' <span class="state">{escape(status)}</span>'


def troubles(runs: Sequence[Run]) -> str:
    """What went wrong with runs and what their folders lack; empty if nothing."""
    lines = []
    for run in runs:
        said = list(run.notes)
        if run.summary.get("error"):
            said.insert(0, f"stopped with: {run.summary['error']}")
        lines += [f"<li><b>{escape(run.label)}</b>: {escape('; '.join(said))}</li>"] if said else []
    return f'<ul class="note">{"".join(lines)}</ul>' if lines else ""


def settings_diff(groups: Sequence[Group]) -> str:
    """The recipe keys that differ between runs, one column per group (one value, or one per run); empty if there is nothing to compare."""
    keys = differing([flatten(r.config) for g in groups for r in g.runs])
    if not keys:
        return ""
    head = '<th class="l">key</th>' + "".join(f'<th class="l">{escape(g.label)}</th>' for g in groups)
    rows = []
    for key in keys:
        cells = []
        for group in groups:
            values = [escape(shown(t[key])) if key in t else _ABSENT for t in (flatten(r.config) for r in group.runs)]
            cells.append(f'<td class="l wrap">{" / ".join(values if len(set(values)) > 1 else values[:1])}</td>')
        rows.append(f'<tr data-setting="{escape(key, quote=True)}"><th class="l"><code>{escape(key)}</code></th>{"".join(cells)}</tr>')
    return f'<div class="scroll"><table id="settings"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def all_settings(runs: Sequence[Run]) -> str:
    """Each run's whole resolved recipe, folded away."""
    out = []
    for run in runs:
        text = "\n".join(f"{k}: {shown(v)}" for k, v in flatten(run.config).items())
        if text:
            out.append(f"<details><summary>All settings: {escape(run.label)}</summary><pre>{escape(text)}</pre></details>")
    return out[0] if len(out) == 1 else f"<details><summary>All settings of every run</summary>{''.join(out)}</details>" if out else ""


_COMMANDS = ("command", "argv", "commands")


def environment(runs: Sequence[Run]) -> str:
    """env.json of all runs: one value where they agree, each value with its runs where they do not."""
    tables = [{k: v for k, v in flatten(r.env).items() if k.partition(".")[0] not in _COMMANDS} for r in runs]
    keys = list(dict.fromkeys(k for t in tables for k in t))
    if not keys:
        return ""
    apart = set(differing(tables))
    rows = [
        f'<tr><th class="l">{escape(k)}</th><td class="l wrap">{escape(shown(next(t[k] for t in tables if k in t)))}</td></tr>' for k in keys if k not in apart
    ]
    for key in (k for k in keys if k in apart):
        holders: dict[str, list[str]] = {}
        for run, table in zip(runs, tables, strict=True):
            holders.setdefault(escape(shown(table[key])) if key in table else _ABSENT, []).append(escape(run.label))
        values = "<br>".join(f'{value} <span class="soft">({"; ".join(labels)})</span>' for value, labels in holders.items())
        rows.append(f'<tr><th class="l">{escape(key)}</th><td class="l wrap">{values}</td></tr>')
    return f'<div class="scroll"><table id="environment"><tbody>{"".join(rows)}</tbody></table></div>'


def commands(runs: Sequence[Run]) -> str:
    """The command of each run as one would type it (``command`` or ``argv`` of env.json)."""
    lines = []
    for run in runs:
        value: Any = next((run.env[k] for k in _COMMANDS if run.env.get(k)), None)
        if value is not None:
            lines += [f"# {run.label}", typed(value)]
    return f'<pre id="commands">{escape(chr(10).join(lines))}</pre>' if lines else ""


def typed(command: Any) -> str:
    """A recorded command (text, or ``sys.argv``) as a shell line; the path of a ``__main__.py`` becomes ``python -m package``."""
    if not isinstance(command, (list, tuple)):
        return shown(command)
    words = [str(w) for w in command]
    program = PurePath(words[0])
    first = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join(first + words[1:])
