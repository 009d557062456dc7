"""What a run folder says, read leniently: a page about a crashed run is worth more than an error about it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastssl.errors import DataError

MARKS = ("config.yaml", "metrics.jsonl", "summary.json")  # any of these makes a folder a run folder
WEIGHTS = ("ema", "raw")

# Recipe keys that may differ between repetitions of one experiment. The split is one: every seed usually has its own label split.
REPETITION_KEYS = (
    "seed", "name", "title", "runs_dir", "data.split", "data.path", "data.ahead", "data.workers", "data.stall_timeout_s", "data.device_resident",
    "train.threads", "log.", "checkpoint.", "eval.",
)  # fmt: skip


@dataclass
class Run:
    """One run folder. ``train`` and ``evals`` are its metric lines in order of step; ``notes`` say what was missing or broken."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def method(self) -> str:
        return str(self.summary.get("method") or _dig(self.config, "method", "name") or _dig(self.config, "method") or "unknown method")

    @property
    def seed(self) -> Any:
        return self.summary.get("seed", self.config.get("seed"))

    @property
    def finished(self) -> bool:
        return self.summary.get("status") == "finished"

    @property
    def headline(self) -> str:
        """Which weights speak for the run: the recipe's choice if they were evaluated, else what there is."""
        wish = _dig(self.config, "eval", "headline") or "ema"
        have = [w for w in WEIGHTS if self.score(w, "last") is not None]
        return wish if wish in have or not have else have[0]

    def score(self, which: str, when: str, name: str = "top1") -> float | None:
        """``name`` in percent of the ``which`` ("ema", "raw") weights at the ``when`` ("last", "best") evaluation; None = not measured.

        From summary.json, or from the metric lines of a run that never wrote one.
        """
        value = _number(_dig(self.summary, "eval", which, when, name))
        if value is not None or _dig(self.summary, "eval", which, when) is not None:
            return value
        _, _, top1 = self.series("eval", f"eval/{which}/top1")
        steps, _, y = self.series("eval", f"eval/{which}/{name}")
        if not len(y):
            return None
        if when == "last":
            return float(y[-1])
        return float(top1.max()) if name == "top1" else None

    def series(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(step, wall seconds, value) arrays [T] of a metric's finite values, T may be 0; wall time is NaN where it was not logged."""
        lines = self.train if kind == "train" else self.evals
        found = [(line["step"], _number(line.get("time/wall_s")), _number(line.get(name))) for line in lines]
        kept = [(s, math.nan if w is None else w, v) for s, w, v in found if v is not None]
        table = np.array(kept, dtype=float).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2]

    def latest(self, *names: str) -> Any:
        """The value of the first of ``names`` in the last evaluation line that has one."""
        for line in reversed(self.evals):
            for name in names:
                if line.get(name) is not None:
                    return line[name]
        return None

    def typical(self, name: str) -> float | None:
        """Median of a train metric over the run without its first tenth (start-up)."""
        _, _, y = self.series("train", name)
        return float(np.median(y[len(y) // 10 :])) if len(y) else None

    def figure_of(self, key: str, metric: str) -> float | None:
        """A number of summary.json, or the typical value of the train metric that it is made from."""
        value = _number(self.summary.get(key))
        return self.typical(metric) if value is None else value

    @property
    def wall_s(self) -> float | None:
        value = _number(self.summary.get("train_wall_s"))
        if value is None:
            walls = [w for w in (_number(line.get("time/wall_s")) for line in self.train + self.evals) if w is not None]
            value = max(walls) if walls else None
        return value

    @property
    def class_names(self) -> list[str] | None:
        """Names from the summary, else from the dataset folder if it is still where the recipe says."""
        names = self.summary.get("classes")
        if not names and _dig(self.config, "data", "path"):
            names = _read_json(Path(str(self.config["data"]["path"])) / "dataset.json", []).get("classes")
        return [str(n) for n in names] if isinstance(names, list) else None


@dataclass
class Group:
    """Repetitions of one experiment: same method and settings, different seeds. ``number`` fixes its colour and marker on the page."""

    label: str
    number: int
    runs: list[Run]

    @property
    def counted(self) -> list[Run]:
        """The runs that means are made of: the finished ones, or all if none has finished."""
        return [r for r in self.runs if r.finished] or self.runs

    def mean_std(self, value: Callable[[Run], float | None]) -> tuple[float, float | None, int] | None:
        """(mean, sample standard deviation or None for one value, count) of ``value`` over the counted runs that have it."""
        have = [v for v in map(value, self.counted) if v is not None]
        if not have:
            return None
        return float(np.mean(have)), (float(np.std(have, ddof=1)) if len(have) > 1 else None), len(have)


def read_runs(paths: Path | str | Sequence[Path | str]) -> list[Run]:
    """Runs in the given order. A folder that is no run itself stands for the run folders in it (up to two levels down), sorted by name.

    Raises :class:`DataError` if a path does not exist or there is no run in it.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    folders: list[Path] = []
    for path in map(Path, given):
        if not path.is_dir():
            raise DataError(f"no run folder at {path}")
        found = [path] if _is_run(path) else sorted(p for pattern in ("*", "*/*") for p in path.glob(pattern) if p.is_dir() and _is_run(p))
        if not found:
            raise DataError(f"{path} is not a run folder and holds none: none of {', '.join(MARKS)} found")
        folders += [p for p in found if p.resolve() not in {f.resolve() for f in folders}]
    if not folders:
        raise DataError("a report needs at least one run folder")
    runs = [read_run(p) for p in folders]
    _name(runs)
    return runs


def read_run(path: Path) -> Run:
    run = Run(Path(path))
    run.summary = _read_json(run.path / "summary.json", run.notes)
    run.env = _read_json(run.path / "env.json", run.notes)
    try:
        config = yaml.safe_load((run.path / "config.yaml").read_text())
        run.config = config if isinstance(config, dict) else {}
    except (OSError, yaml.YAMLError) as error:
        run.notes.append(f"config.yaml: {_short(error)}")
    broken, lines = 0, {}
    try:
        text = (run.path / "metrics.jsonl").read_text()
    except OSError as error:
        run.notes.append(f"metrics.jsonl: {_short(error)}")
        text = ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
            lines[record["kind"], int(record["step"])] = record  # a step logged twice (resume): the later line counts
        except (ValueError, KeyError, TypeError):
            broken += bool(line.strip())
    if broken:
        run.notes.append(f"metrics.jsonl: {broken} unreadable line{'s' if broken > 1 else ''} skipped")
    run.train = [lines[k] for k in sorted(lines) if k[0] == "train"]
    run.evals = [lines[k] for k in sorted(lines) if k[0] == "eval"]
    return run


def group_runs(runs: list[Run]) -> list[Group]:
    """Repetitions together, in order of first appearance; experiments that share a method are told apart by what differs."""
    keyed: dict[Any, list[Run]] = {}
    for run in runs:
        kept = {k: v for k, v in flatten(run.config).items() if not k.startswith(REPETITION_KEYS)}
        sizes = {k: run.summary.get(k) for k in ("dataset", "num_labeled", "num_unlabeled", "total_steps")}
        keyed.setdefault((run.method, json.dumps(sizes, default=str), json.dumps(kept, sort_keys=True, default=str)), []).append(run)
    heads = [members[0] for members in keyed.values()]
    groups = []
    for number, members in enumerate(keyed.values()):
        same = [h for h in heads if h.method == members[0].method]
        tail = ""
        if len(same) > 1:
            views = {id(h): {**{k: h.summary.get(k) for k in ("dataset", "num_labeled")}, **flatten(h.config)} for h in same}
            keys = [k for k in differing([views[id(h)] for h in same]) if not k.startswith(REPETITION_KEYS)]
            mine = views[id(members[0])]
            said = [f"{k.rpartition('.')[2]}={shown(mine[k])}" for k in keys if k in mine][:3]
            tail = " · " + ", ".join(said) if said else f" · variant {same.index(members[0]) + 1}"
        groups.append(Group(members[0].method + tail, number, members))
    return groups


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one mapping with dotted keys; lists are values."""
    if not isinstance(tree, dict):
        return {prefix: tree} if prefix else {}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        out.update(flatten(value, name) if isinstance(value, dict) and value else {name: value})
    return out


def differing(tables: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all tables, in order of appearance."""
    keys = dict.fromkeys(k for table in tables for k in table)
    return [k for k in keys if len({shown(table.get(k, "<absent>")) for table in tables}) > 1]


def shown(value: Any) -> str:
    """A setting as text: YAML's words for None and booleans."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _name(runs: list[Run]) -> None:
    """Short unique labels: method and seed, with the folder's name where that is not enough."""
    labels = [f"{r.method}, seed {r.seed}" if r.seed is not None else r.method for r in runs]
    for run, label in zip(runs, labels, strict=True):
        run.label = label if labels.count(label) == 1 else f"{label} ({run.path.resolve().name})"


def _is_run(path: Path) -> bool:
    return any((path / mark).is_file() for mark in MARKS)


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name}: {_short(error)}")
        return {}


def _short(error: Exception) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({type(error).__name__})"


def _dig(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
