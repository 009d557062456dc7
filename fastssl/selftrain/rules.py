"""What is selected: the rule, with its variants, and how it turns ranked lists into a training set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fastssl.errors import DataError, nearest
from fastssl.selftrain.ranking import hash64
from fastssl.selftrain.topk import Ranked

POOL_SHARE = 0.16  # of the pool that automatic lists hold together: 16k rows for each of 1000 classes out of 100M images, the paper's setting
CHOICES = {"fill": ("none", "duplicate"), "over": ("class", "all")}


@dataclass(frozen=True)
class Rule:
    """A selection rule. The paper's (Yalniz et al., 2019, arXiv:1905.00546) is ``Rule(k=16000, p=10)``: equal lists, no threshold, hard labels.

    k                rows per class; 0 = so many that all lists hold 16 % of the pool, which is the paper's k / M at 1000 classes
    p                classes per image that may compete, the first p of the log; 0 = all that the log has
    seed             of the hash that decides among equal scores, and of who is repeated
    min_probability  rows below this softmax probability are left out (Noisy Student, arXiv:1911.04252: 0.3) ...
    floor            ... but never so many that a class keeps fewer than its best ``floor`` rows
    caps             class name or number -> its own k
    fill             "duplicate": rows of classes with fewer than k rows are repeated up to k rows (Noisy Student's balancing); "none"
    over             "class": k per class; "all": the k times classes best rows of all classes together (unbalanced, for comparison)
    """

    k: int = 0
    p: int = 0
    seed: int = 0
    min_probability: float = 0.0
    floor: int = 0
    caps: dict[str, int] = field(default_factory=dict)
    fill: str = "none"
    over: str = "class"

    def __post_init__(self) -> None:
        for name in ("k", "p", "seed", "floor"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise DataError(f"select.{name} = {value!r} must be a whole number, at least 0")
        if not 0 <= self.min_probability < 1:
            raise DataError(f"select.min_probability = {self.min_probability!r} must be in [0, 1)")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise DataError(f"select.{name} = {getattr(self, name)!r} must be one of {', '.join(choices)}{nearest(str(getattr(self, name)), choices)}")
        if any(not isinstance(cap, int) or cap < 0 for cap in self.caps.values()):
            raise DataError(f"select.caps = {self.caps} must hold whole numbers, at least 0")
        if self.over == "all" and (self.caps or self.floor or self.fill != "none"):
            raise DataError("select.over = all ranks all classes together; caps, floor and fill are about single classes: leave them out")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows_per_class(self, classes: Sequence[str], pool: int) -> np.ndarray:
        """int64 [C]: k of each class in a pool of this many images. Raises DataError for caps of classes that do not exist."""
        k = self.k or automatic_k(len(classes), pool)
        out = np.full(len(classes), k, dtype=np.int64)
        for name, cap in self.caps.items():
            out[class_number(name, classes)] = cap
        return out


def rule_from(values: Mapping[str, Any]) -> Rule:
    """A rule from plain values; DataError names the nearest key for one that does not exist."""
    known = Rule.__dataclass_fields__
    for name in values:
        if name not in known:
            raise DataError(f"select.{name} is no part of a selection rule{nearest(name, known)}; there are: {', '.join(known)}")
    return Rule(**values)


def automatic_k(classes: int, pool: int) -> int:
    """k such that all lists together hold 16 % of the pool: 1.6e-4 M at 1000 classes, the paper's constant ratio."""
    return max(1, round(POOL_SHARE * pool / classes))


def class_number(name: str, classes: Sequence[str]) -> int:
    """Number of a class given by name or number."""
    if name in classes:
        return list(classes).index(name)
    if str(name).isdigit() and int(name) < len(classes):
        return int(name)
    raise DataError(f"there is no class {name!r}{nearest(str(name), classes)}; classes are named as in dataset.json or numbered 0..{len(classes) - 1}")


def log_odds(probability: float) -> float:
    """log(p / (1 - p)); minus infinity for 0."""
    return math.log(probability / (1 - probability)) if probability > 0 else -math.inf


@dataclass(frozen=True)
class Selected:
    """Rows of the lists that are kept, and how often each counts: ``copies_N`` int32, 1 unless rare classes are filled up."""

    ranked: Ranked
    copies_N: np.ndarray


def apply_rule(rule: Rule, ranked: Ranked, k_C: np.ndarray) -> Selected:
    """Threshold, floor and repetition on lists that are cut to ``k_C`` already."""
    keep = (ranked.score_N >= np.float32(log_odds(rule.min_probability))) | (ranked.rank_N < rule.floor)
    ranked = ranked.take(keep)
    copies = np.ones(len(ranked), dtype=np.int32)
    if rule.fill == "duplicate":
        counts = ranked.counts(len(k_C))
        for c in np.flatnonzero((counts > 0) & (counts < k_C)):
            mine = np.flatnonzero(ranked.cls_N == c)
            whole, rest = divmod(int(k_C[c]), len(mine))
            drawn = np.argsort(hash64(ranked.id_N[mine], rule.seed + 1), kind="stable")[:rest]
            copies[mine] = whole
            copies[mine[drawn]] += 1
    return Selected(ranked, copies)
