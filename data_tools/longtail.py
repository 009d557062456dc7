"""Long-tailed label splits by name: the published class counts, how the unlabelled tail is arranged, and which rows are taken.

A setting is written as ``DATASET [ARRANGEMENT] [option=value ...]``, for example ``cifar10-lt reversed gamma=150`` or ``cifar10-lt exp=2``:

``gamma``      labelled images of the largest class over those of the smallest; the head is always class 0
``gamma_u``    the same for the unlabelled images (default: gamma; 1 for ``uniform``)
``head``       labelled images of the largest class, ``head_u`` unlabelled ones (default: the published ones)
``exp``        the number of a published setting (``exp_index`` of SimPro's scripts) in place of all the others; ``@exp=2`` without a space is the same
``code``       ``simpro`` (default) or ``acr_d``, whose ``random`` arrangement is switched off in the released code and gives ``consistent``

Rows are taken in dataset order without drawing, so the seed matters for ``random`` alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastssl.errors import DataError, nearest

ARRANGEMENTS = ("consistent", "reversed", "random", "middle", "head-tail")  # in the order of the published flags 0..4
CODES = ("simpro", "acr_d")
REST = "rest"  # every row that is not labelled
UNKNOWN = "unknown"  # every row without a label
TEST_PER_CLASS = 50  # of the balanced ImageNet-127 test


def class_counts(head: int, num_classes: int, gamma: float) -> np.ndarray:
    """Images per class from ``head`` down to head / gamma, geometrically, rounded towards zero: int64 [num_classes]."""
    if head < 1 or num_classes < 1 or not gamma > 0:
        raise DataError(f"long-tailed counts need head >= 1, classes >= 1 and gamma > 0, got head={head}, {num_classes} classes, gamma={gamma}")
    if num_classes == 1:
        return np.array([head], np.int64)
    base = (1 / gamma) ** (1 / (num_classes - 1))
    return np.array([int(head * base**i) for i in range(num_classes - 1)] + [int(head / gamma)], np.int64)


def arrange(counts: np.ndarray, arrangement: str, seed: int = 0) -> np.ndarray:
    """Counts of the largest to the smallest class -> counts by class. ``random`` shuffles with Python's generator, seeded with ``seed``."""
    ranks = list(range(len(counts)))
    if arrangement == "random":
        random.Random(seed).shuffle(ranks)
    elif arrangement == "reversed":
        ranks = ranks[::-1]
    elif arrangement == "middle":
        ranks = ranks[::2][::-1] + ranks[1::2]
    elif arrangement == "head-tail":
        ranks = ranks[1::2] + ranks[::2][::-1]
    elif arrangement != "consistent":
        raise DataError(f"unknown arrangement {arrangement!r}{nearest(arrangement, ARRANGEMENTS)}; known: uniform, {', '.join(ARRANGEMENTS)}")
    return counts[ranks]


def choose(labels: np.ndarray, labeled: Sequence[int], unlabeled: Sequence[int], *, keep_labeled: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Class by class in dataset order: the first ``labeled[c]`` rows are labelled, the next ``unlabeled[c]`` unlabelled. Short where a class is too small.

    ``keep_labeled``: the unlabelled rows begin with the labelled ones, as ACR and ACR_d list them.
    """
    rows = [np.flatnonzero(labels == c) for c in range(len(labeled))]
    first = [of_class[:n] for of_class, n in zip(rows, labeled, strict=True)]
    then = [of_class[0 if keep_labeled else n : n + m] for of_class, n, m in zip(rows, labeled, unlabeled, strict=True)]
    return np.concatenate(first), np.concatenate(then)


def balanced_test(labels: np.ndarray, num_classes: int, per_class: int, seed: int) -> np.ndarray:
    """``per_class`` rows of every class, all shuffled: how SimPro's code picks a balanced test from the validation images (numpy's legacy generator)."""
    generator = np.random.RandomState(seed)
    picked = []
    for c in range(num_classes):
        rows = np.flatnonzero(labels == c)
        generator.shuffle(rows)
        picked.append(rows[:per_class])
    test = np.concatenate(picked)
    generator.shuffle(test)
    return test


def size_order(counts: np.ndarray) -> np.ndarray:
    """New label of every class when classes are numbered from the largest to the smallest, int64 [C]; equal ones keep their order."""
    table = np.empty(len(counts), np.int64)
    table[np.argsort(-np.asarray(counts), kind="stable")] = np.arange(len(counts))
    return table


def share_counts(labels: np.ndarray, num_classes: int, share: float) -> np.ndarray:
    """``share`` of each class, halves rounded to the even number: the labelled counts of ImageNet-127 with 0.1."""
    return np.array([round(share * int(n)) for n in np.bincount(labels[labels >= 0], minlength=num_classes)], np.int64)


def share_rows(labels: np.ndarray, num_classes: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(the first ``share`` of each class, all other rows ascending)."""
    labeled, _ = choose(labels, share_counts(labels, num_classes, share).tolist(), [0] * num_classes)
    return labeled, np.setdiff1d(np.arange(len(labels)), labeled)


def renumbered_counts(labels: np.ndarray, labeled: np.ndarray, *, misaligned: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(labelled, unlabelled) counts of ImageNet-127 by the labels after :func:`size_order`.

    ``misaligned``: as ACR_d's released code has them, by the labels before, although its targets are renumbered: its class prior belongs to other classes.
    """
    unlabeled = np.bincount(labels[labels >= 0], minlength=len(labeled)) - labeled
    if misaligned:
        return labeled, unlabeled
    order = np.argsort(size_order(labeled))
    return labeled[order], unlabeled[order]


@dataclass(frozen=True)
class Collection:
    """What a dataset's settings have in common. ``classes`` 0 = any. ``head_u``: a number, or which rows are unlabelled whatever their class.

    ``share``: this part of each class's images is labelled (``total``: of each class's count in one long tail, the others of which are unlabelled).
    ``published``: (gamma, gamma_u, arrangement) by exp_index.
    """

    classes: int
    head: int = 0
    head_u: int | str = 0
    published: tuple[tuple[float, float, str], ...] = ()
    share: float = 0.0
    total: bool = False
    may_shorten: bool = False


def _five(gamma: float) -> list[tuple[float, float, str]]:
    others = [(gamma, gamma, name) for name in ("reversed", "middle", "head-tail")]
    return [(gamma, gamma, "consistent"), (gamma, 1, "consistent"), *others]


_MILDER = [(150, gamma_u, name) for name in ("consistent", "reversed") for gamma_u in (120, 90, 60, 30)]
COLLECTIONS = {
    "cifar10-lt": Collection(10, 500, 4000, (*_five(150), *_five(100), *_MILDER, (150, 150, "random"), (100, 100, "random"))),
    "cifar100-lt": Collection(100, 50, 400, (*_five(20), *_five(10), (20, 20, "random"))),
    "stl10-lt": Collection(10, 450, UNKNOWN, ((10, 10, "consistent"), (20, 20, "consistent"))),
    # the two published numbers of these are two image sizes of the same rows
    "imagenet127": Collection(127, 0, REST, ((0, 0, "consistent"),) * 2, share=0.1),
    "imagenet1k-lt": Collection(1000, 1280, 0, ((256, 256, "consistent"),) * 2, share=0.2, total=True, may_shorten=True),
    "own-lt": Collection(0),
}


@dataclass(frozen=True)
class Setting:
    """A long-tailed setting in numbers; ``gamma`` 0 where the dataset's own counts decide. ``arrangement`` is that of the unlabelled images."""

    collection: str
    arrangement: str
    gamma: float
    gamma_u: float
    head: int
    head_u: int

    @property
    def text(self) -> str:
        """The setting written out, to be read by :func:`parse_setting`."""
        of = COLLECTIONS[self.collection]
        if of.share:
            return self.collection
        if of.head_u == UNKNOWN:
            return f"{self.collection} gamma={self.gamma:g} head={self.head}"
        return f"{self.collection} {self.arrangement} gamma={self.gamma:g} gamma_u={self.gamma_u:g} head={self.head} head_u={self.head_u}"

    def counts(self, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
        """(labelled, unlabelled) images per class as the formulas say; None for unlabelled rows that no formula counts."""
        of = COLLECTIONS[self.collection]
        if of.total:
            total = class_counts(self.head, num_classes, self.gamma)
            labeled = np.array([int(of.share * int(n)) for n in total], np.int64)
            return labeled, total - labeled
        labeled = class_counts(self.head, num_classes, self.gamma)
        if of.head_u == UNKNOWN:
            return labeled, None
        return labeled, arrange(class_counts(self.head_u, num_classes, self.gamma_u), self.arrangement, seed)


def parse_setting(text: str) -> Setting:
    """Read a setting; DataError says what is wrong with the text and what there is."""
    name, *words = text.replace("@", " ").split() or [""]
    if name not in COLLECTIONS:
        raise DataError(f"unknown long-tailed setting {text!r}{nearest(name, COLLECTIONS)}; it begins with one of {', '.join(COLLECTIONS)}")
    arrangement, options = "", {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            if arrangement or word not in ("uniform", *ARRANGEMENTS):
                raise DataError(f"setting {text!r}: {word!r} is no arrangement{nearest(word, ARRANGEMENTS)}; known: uniform, {', '.join(ARRANGEMENTS)}")
            arrangement = word
        elif key not in ("gamma", "gamma_u", "head", "head_u", "exp", "code"):
            raise DataError(f"setting {text!r} has the unknown option {key!r}; known: gamma, gamma_u, head, head_u, exp, code")
        else:
            options[key] = value
    code = options.pop("code", CODES[0])
    if code not in CODES:
        raise DataError(f"setting {text!r}: code={code} must be one of {', '.join(CODES)}")
    setting = _published(text, name, arrangement, options) if "exp" in options else _spelled(text, name, arrangement, options)
    return replace(setting, arrangement="consistent") if code == "acr_d" and setting.arrangement == "random" else setting


def _published(text: str, name: str, arrangement: str, options: dict[str, str]) -> Setting:
    of, number = COLLECTIONS[name], options["exp"]
    if arrangement or len(options) > 1:
        raise DataError(f"setting {text!r}: exp says everything; leave out the rest or write the setting without exp")
    if not number.isdigit() or int(number) >= len(of.published):
        raise DataError(f"setting {text!r}: exp={number} is not published for {name}; it has 0..{len(of.published) - 1}")
    gamma, gamma_u, how = of.published[int(number)]
    return Setting(name, how, gamma, gamma_u, of.head, of.head_u if isinstance(of.head_u, int) else 0)


def _spelled(text: str, name: str, arrangement: str, options: dict[str, str]) -> Setting:
    of = COLLECTIONS[name]
    numbers = {key: _number(text, key, value) for key, value in options.items()}
    fixed = set(numbers) if of.share else set(numbers) & {"gamma_u", "head_u"} if of.head_u == UNKNOWN else set()
    if fixed or (arrangement and isinstance(of.head_u, str)):
        raise DataError(f"setting {text!r}: {name} leaves no choice of {', '.join(sorted(fixed)) or 'an arrangement'}")
    if of.share:
        return replace(_published(text, name, "", {"exp": "0"}), arrangement="consistent")
    head, head_u = numbers.get("head", of.head), numbers.get("head_u", of.head_u if isinstance(of.head_u, int) else 0)
    if "gamma" not in numbers or not head or not (head_u or of.head_u == UNKNOWN):
        raise DataError(f"setting {text!r} needs {'gamma' if 'gamma' not in numbers else 'head= and head_u='}; for example {name} consistent gamma=100")
    if arrangement == "uniform" and numbers.get("gamma_u", 1) != 1:
        raise DataError(f"setting {text!r}: uniform means gamma_u=1")
    gamma_u = 1.0 if arrangement == "uniform" else numbers.get("gamma_u", numbers["gamma"])
    how = "consistent" if arrangement in ("", "uniform") else arrangement
    return Setting(name, how, numbers["gamma"], gamma_u, int(head), int(head_u))


def _number(text: str, key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf") or (key.startswith("head") and number != int(number)):
        raise DataError(f"setting {text!r}: {key}={value} must be a {'whole ' if key.startswith('head') else ''}number above 0")
    return number


def draw_setting(setting: Setting, labels: np.ndarray, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(labelled, unlabelled) rows of a setting, disjoint int64 arrays. ``labels`` int64 [N], -1 for rows without one.

    DataError when the dataset has other classes than the setting, no rows without labels where it needs them, or too few of a class (small-ImageNet-1k's
    own classes are shorter than its formula here and there: there, as published, the lists become shorter).
    """
    of = COLLECTIONS[setting.collection]
    if of.classes and num_classes != of.classes:
        raise DataError(f"setting {setting.text!r} is about {of.classes} classes, the dataset has {num_classes}; own-lt takes any number of classes")
    if of.head_u == REST:
        return share_rows(labels, num_classes, of.share)
    n, m = setting.counts(num_classes, seed)
    want, have = n if m is None else n + m, np.bincount(labels[labels >= 0], minlength=num_classes)
    short = np.flatnonzero(want > have)
    if len(short) and not of.may_shorten:
        c = int(short[0])
        raise DataError(f"setting {setting.text!r} takes {want[c]} images of class {c}, which has {have[c]}; lower head or head_u")
    labeled, unlabeled = choose(labels, n.tolist(), (np.zeros_like(n) if m is None else m).tolist())
    if m is None:
        unlabeled = np.flatnonzero(labels < 0)
        if not len(unlabeled):
            raise DataError(f"setting {setting.text!r} uses images without labels, and the dataset has none; convert it with its unlabelled part")
    return labeled, unlabeled
