"""What a selection is worth: counts, lowest scores, and, where the pool's true classes are known, its precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.errors import DataError
from fastssl.selftrain.histogram import BINS, bin_of, edges
from fastssl.selftrain.log import Log
from fastssl.selftrain.rules import rule_from
from fastssl.selftrain.select import rank
from fastssl.sources.manifest import load_labels
from fastssl.sources.selection import Selection, load_selection

CURVE_POINTS = 40
BEYOND = 4  # with the log the curve goes on to this many times the selection's k


@dataclass
class Curve:
    """Precision in percent of lists cut to ``k`` rows, for growing k: all rows together (``all``) and the mean over classes (``classes``)."""

    k: list[int]
    rows: list[int]
    all: list[float]
    classes: list[float]


@dataclass
class Judgement:
    """Facts about a selection. ``right_N``: whether each row's label is the image's true class, None where no truth is known (-1 rows are left out)."""

    selection: Selection
    columns: dict[str, np.ndarray]
    right_N: np.ndarray | None
    known_N: np.ndarray | None
    curve: Curve | None
    precision_C: np.ndarray | None  # percent, NaN where a class has no row of known truth
    histogram: dict[str, np.ndarray] | None  # of the whole log: rows per bin, by place in the image ("first", "later")

    def precision(self) -> float | None:
        """Percent of the rows of known truth whose label is right."""
        if self.right_N is None or self.known_N is None or not self.known_N.any():
            return None
        return float(100 * self.right_N[self.known_N].mean())

    def facts(self) -> dict[str, Any]:
        """Plain values for summary.json."""
        info, precision = self.selection.info, self.precision()
        rule = info["request"]["rule"]
        return {
            **{name: info[name] for name in ("rows", "images", "examples", "bad_images", "p", "k_per_class")},
            "pool": info["pool"]["rows"],
            "short_classes": len(info["short_classes"]),
            "rule": rule,
            "precision": precision,
            "worst_class_precision": None if self.precision_C is None or np.isnan(self.precision_C).all() else float(np.nanmin(self.precision_C)),
        }

    def lines(self) -> list[str]:
        info, precision = self.selection.info, self.precision()
        out = [f"{info['rows']} rows, {info['images']} images, {info['examples']} examples of a pool of {info['pool']['rows']}"]
        out[0] += f"; {len(info['short_classes'])} of {len(info['classes'])} lists are short" if info["short_classes"] else ""
        if precision is not None and self.precision_C is not None:
            worst = int(np.nanargmin(self.precision_C))
            out.append(f"precision {precision:.2f} %; worst class {info['classes'][worst]} with {self.precision_C[worst]:.2f} %")
        return out


def judge(path: str | Path, *, log: str | Path | None = None) -> Judgement:
    """Judge a selection. ``log``: its scoring log, for histograms of all scores and a curve beyond its own k. DataError if it is another selection's log."""
    selection = load_selection(path)
    columns = selection.columns()
    truth = _truth(selection)
    right = known = precision_C = curve = None
    if truth is not None:
        true_N = truth[columns["image_id"].astype(np.int64)]
        known, right = true_N >= 0, true_N == columns["cls"]
        classes = len(selection.classes)
        rows_C = np.bincount(columns["cls"][known], minlength=classes)
        right_C = np.bincount(columns["cls"][known & right], minlength=classes)
        precision_C = np.where(rows_C > 0, 100.0 * right_C / np.maximum(rows_C, 1), np.nan)
        curve = _curve(columns["cls"], columns["rank"], right, known, classes)
    histogram = None
    if log is not None:
        opened = Log(log)
        if opened.digest != selection.info["log_identity"]:
            raise DataError(f"{log} is not the log that {selection.folder} was selected from")
        histogram = _histogram(opened)
        if truth is not None:
            curve = _curve_of_log(opened, selection, truth)
    return Judgement(selection, columns, right, known, curve, precision_C, histogram)


def _truth(selection: Selection) -> np.ndarray | None:
    """The pool's true classes int64 [rows of its split], -1 unknown; None if the pool names other classes or knows nothing."""
    manifest = selection.pool()
    if manifest.classes != selection.classes:
        return None
    truth = load_labels(manifest, selection.info["pool"]["split"])
    return truth if (truth >= 0).any() else None


def _curve(cls_N: np.ndarray, rank_N: np.ndarray, right_N: np.ndarray, known_N: np.ndarray, classes: int) -> Curve | None:
    if not known_N.any():
        return None
    cls_N, rank_N, right_N = cls_N[known_N], rank_N[known_N], right_N[known_N]
    longest = int(rank_N.max()) + 1
    k = np.unique(np.round(np.geomspace(1, longest, CURVE_POINTS)).astype(np.int64))
    rows, every, mean = [], [], []
    for depth in k:
        inside = rank_N < depth
        of_class = np.bincount(cls_N[inside], minlength=classes)
        right = np.bincount(cls_N[inside & right_N], minlength=classes)
        rows.append(int(of_class.sum()))
        every.append(100.0 * right.sum() / of_class.sum())
        mean.append(float(np.mean(100.0 * right[of_class > 0] / of_class[of_class > 0])))
    return Curve(k.tolist(), rows, [float(x) for x in every], mean)


def _curve_of_log(log: Log, selection: Selection, truth: np.ndarray) -> Curve | None:
    """The curve of plain lists, without threshold, copies or caps, up to several times the selection's k."""
    rule = rule_from(selection.info["request"]["rule"])
    k_C = rule.rows_per_class(log.classes, log.num_rows)
    plain = replace(rule, k=min(log.num_rows, BEYOND * max(1, int(k_C.max()))), min_probability=0.0, floor=0, caps={}, fill="none", over="class")
    lists = rank(lambda: log.parts(check=False), log.classes, log.num_rows, plain).ranked
    true_N = truth[lists.id_N.astype(np.int64)]
    return _curve(lists.cls_N, lists.rank_N, true_N == lists.cls_N, true_N >= 0, len(log.classes))


def _histogram(log: Log) -> dict[str, np.ndarray]:
    counts = {"first": np.zeros(BINS, np.int64), "later": np.zeros(BINS, np.int64)}
    for part in log.parts(check=False):
        bins = bin_of(part.score_NP)
        counts["first"] += np.bincount(bins[:, 0], minlength=BINS)
        counts["later"] += np.bincount(bins[:, 1:].reshape(-1), minlength=BINS)
    return counts


def coarse(counts_B: np.ndarray, by: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """(middles, counts) of a histogram with ``by`` bins in one."""
    middles = edges()[:-1].reshape(-1, by).mean(axis=1)
    return middles, counts_B.reshape(-1, by).sum(axis=1)
