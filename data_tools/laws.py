"""Laws that draw labelled rows from a label vector: the published ones number for number, and a nested balanced one.

Only the labels and their order matter.  Every law takes ``labels`` int64 [N] and the number of classes K and returns (labeled, unlabeled), disjoint row
arrays that together hold every row, in the order in which the published code lists them.  Rows whose class nobody knows (-1) are never drawn as labelled and
always belong to the unlabelled side.  numpy's legacy generator (RandomState) is used throughout: its
numbers are frozen by numpy's compatibility promise.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from fastssl.errors import DataError, nearest

Draw = tuple[np.ndarray, np.ndarray]


def _rows_of(labels: np.ndarray, num_classes: int, need: Callable[[int, int], int]) -> list[tuple[np.ndarray, int]]:
    """Per class: its rows ascending and how many to label, ``need(class, rows it has)``; DataError when a class has too few."""
    found = []
    for label, rows in enumerate(_by_class(labels, num_classes)):
        count = need(label, len(rows))
        if not len(rows):
            raise DataError(f"class {label} has no images at all; the class count of the dataset is wrong, or drop that class from it")
        if count > len(rows):
            raise DataError(
                f"{count} labels were asked for class {label}, which has only {len(rows)} images; ask for fewer with --per-class, --percent or --fraction"
            )
        found.append((rows, count))
    return found


def _by_class(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Places of each class, ascending, with one sort for all classes."""
    order = np.argsort(labels, kind="stable")
    borders = np.searchsorted(labels[order], np.arange(num_classes + 1))
    return [order[start:stop] for start, stop in zip(borders[:-1], borders[1:], strict=True)]


def _rest(labels: np.ndarray, labeled: np.ndarray) -> np.ndarray:
    mask = np.ones(len(labels), bool)
    mask[labeled] = False
    return np.flatnonzero(mask)


def tllib(labels: np.ndarray, num_classes: int, per_class: int, seed: int) -> Draw:
    """TLlib: class by class a choice without replacement; unlabelled = the remaining rows ascending."""
    random = np.random.RandomState(seed)
    labeled = np.concatenate([random.choice(rows, n, replace=False) for rows, n in _rows_of(labels, num_classes, lambda *_: per_class)])
    return labeled, _rest(labels, labeled)


def simmatch_cifar(labels: np.ndarray, num_classes: int, per_class: int, seed: int) -> Draw:
    """SimMatch and FixMatch-style CIFAR: class by class shuffle, the first n are labelled, the rest of the shuffled list follows as unlabelled."""
    return _shuffled(labels, num_classes, lambda *_: per_class, seed)


def torchssl(labels: np.ndarray, num_classes: int, per_class: int, seed: int) -> Draw:
    """TorchSSL (SVHN, STL-10): class by class a choice without replacement from numpy's global generator; unlabelled = the remaining rows ascending."""
    return tllib(labels, num_classes, per_class, seed)  # a freshly seeded global generator yields the same numbers as RandomState(seed)


def eman10pct(labels: np.ndarray, num_classes: int, fraction: float, seed: int) -> Draw:
    """FixMatch-EMAN: class by class shuffle, the first max(1, round(fraction * n)) are labelled, the rest unlabelled."""
    return _shuffled(labels, num_classes, lambda _, n: max(1, round(fraction * n)), seed)


def balanced(labels: np.ndarray, num_classes: int, per_class: int | np.ndarray, seed: int) -> Draw:
    """n rows of every class (or n[c] of class c), nested: for one seed, the rows of a smaller n are among those of a larger n.  Unlabelled = the remaining
    rows ascending."""
    wanted = np.broadcast_to(np.asarray(per_class), (num_classes,)).tolist()
    found = _rows_of(labels, num_classes, lambda label, _: wanted[label])
    labeled = np.concatenate([np.random.RandomState([seed, label]).permutation(rows)[:n] for label, (rows, n) in enumerate(found)])
    return labeled, _rest(labels, labeled)


def percent_counts(known: int, num_classes: int, percent: float | str, seed: int) -> np.ndarray:
    """Labels per class, int64 [K], that together are ``percent`` of ``known`` rows, rounded down, and differ by at most one between classes.

    Which classes get one more is drawn once per seed, so that no class loses a label when ``percent`` grows: with ``balanced`` 1 % lies inside 10 %.
    1 % and 10 % of ImageNet's 1 281 167 images are 12 811 and 128 116, as in SimCLR's lists.
    """
    try:
        share = Fraction(str(percent)) / 100
    except (ValueError, ZeroDivisionError) as error:
        raise DataError(f"{percent!r} is no percentage; give a number above 0 and at most 100") from error
    if not 0 < share <= 1:
        raise DataError(f"{percent} percent gives an empty or impossible split; it must be above 0 and at most 100")
    total = int(share * known)
    if total < num_classes:
        raise DataError(f"{percent} percent of {known} images are {total} labels, fewer than one for each of {num_classes} classes; ask for more")
    order = np.random.RandomState([seed, 0x706374]).permutation(num_classes)
    return total // num_classes + (order < total % num_classes)


def _shuffled(labels: np.ndarray, num_classes: int, need: Callable[[int, int], int], seed: int) -> Draw:
    random = np.random.RandomState(seed)
    labeled, unlabeled = [], []
    for rows, count in _rows_of(labels, num_classes, need):
        random.shuffle(rows)
        labeled.append(rows[:count])
        unlabeled.append(rows[count:])
    unlabeled.append(np.flatnonzero(labels < 0))
    return np.concatenate(labeled), np.concatenate(unlabeled)


LAWS: dict[str, Callable[..., Draw]] = {"tllib": tllib, "simmatch_cifar": simmatch_cifar, "torchssl": torchssl, "eman10pct": eman10pct, "balanced": balanced}


def draw(
    law: str, labels: np.ndarray, num_classes: int, *, per_class: int | None, fraction: float | None, seed: int, percent: float | str | None = None
) -> Draw:
    """Apply a law by name.  ``eman10pct`` takes ``fraction`` in (0, 1], the others ``per_class`` >= 1, ``balanced`` also ``percent`` in (0, 100] of the rows
    with a known class; DataError for anything else."""
    if law not in LAWS:
        raise DataError(f"unknown split law {law!r}{nearest(law, LAWS)}; known: {', '.join(LAWS)}")
    if not num_classes:
        raise DataError("no image of the dataset has a label, so none can be drawn as labelled; convert it with the labels that are known")
    if not 0 <= seed < 2**32:
        raise DataError(f"seed {seed} is outside 0..{2**32 - 1}")
    if percent is not None:
        if law != "balanced" or per_class is not None or fraction is not None:
            raise DataError("--percent is a size of the law balanced, instead of --per-class; for a share of each class use --law eman10pct --fraction")
        return balanced(labels, num_classes, percent_counts(int((labels >= 0).sum()), num_classes, percent, seed), seed)
    if law == "eman10pct":
        if fraction is None or per_class is not None:
            raise DataError("law eman10pct draws a share of each class: give --fraction (0.1 for 10 %) and no --per-class")
        if not 0 < fraction <= 1:
            raise DataError(f"fraction {fraction} gives an empty or impossible split; it must be above 0 and at most 1")
        return LAWS[law](labels, num_classes, fraction, seed)
    if per_class is None or fraction is not None:
        raise DataError(f"law {law} draws a number of each class: give --per-class and no --fraction")
    if per_class < 1:
        raise DataError(f"{per_class} labels per class gives an empty split; ask for at least 1")
    return LAWS[law](labels, num_classes, per_class, seed)


def hold_out(labels: np.ndarray, candidates: np.ndarray, num_classes: int, count: int, seed: int) -> np.ndarray:
    """``count`` rows out of ``candidates`` for validation, ascending, as equal per class as possible (the first classes get the remainder).

    Its generator is separate from the laws', so the labelled rows are the published ones whether or not rows are held out.
    """
    share, extra = divmod(count, num_classes)
    candidates = np.sort(candidates)
    held = []
    for label, places in enumerate(_by_class(labels[candidates], num_classes)):
        rows = candidates[places]
        need = share + (label < extra)
        if need > len(rows):
            have = f"{len(rows)} images without a label"
            raise DataError(f"{need} validation rows were asked of class {label}, which has only {have}; ask for fewer with --validation")
        held.append(np.random.RandomState([seed, label, 0x76616C]).permutation(rows)[:need])
    return np.sort(np.concatenate(held)).astype(np.int64)
