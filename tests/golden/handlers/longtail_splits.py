"""Class counts of the long-tailed settings, rows that they take, and the renumbering of ImageNet-127."""

from __future__ import annotations

import re

import numpy as np

from data_tools.longtail import (
    ARRANGEMENTS,
    COLLECTIONS,
    TEST_PER_CLASS,
    UNKNOWN,
    arrange,
    balanced_test,
    choose,
    class_counts,
    parse_setting,
    renumbered_counts,
    share_counts,
    share_rows,
    size_order,
)
from tests.golden.recorder import Recorder

NAMES = {"cifar10": "cifar10-lt", "cifar100": "cifar100-lt", "stl10": "stl10-lt"}  # recorded name -> ours
ALL_UNLABELED = 100_000  # recorded in place of a head where every unlabelled image is taken
BIG = "smallimagenet_1k_"


def settings(rec: Recorder) -> None:
    _settings(rec, "simpro")


def settings_acr_d(rec: Recorder) -> None:
    _settings(rec, "acr_d")


def _settings(rec: Recorder, code: str) -> None:
    for name in [name for name in rec.names() if name.endswith("_cfg")]:
        stem = name.removesuffix("_cfg")
        if stem.startswith("extra_"):
            head, classes, gamma, active, flag, seed = rec.raw(name).tolist()
            how = ARRANGEMENTS[int(flag)] if active == 0 else "consistent"
            if code == "acr_d" and how == "random":
                how = "consistent"
            rec.check(stem, arrange(class_counts(int(head), int(classes), gamma), how, int(seed)))
            continue
        dataset, number = re.fullmatch(r"(.+)_(\d+)", stem).groups()  # type: ignore[union-attr]
        published = parse_setting(f"{NAMES[dataset]} exp={int(number)}")
        setting, of = parse_setting(f"{NAMES[dataset]}@exp={int(number)} code={code}"), COLLECTIONS[NAMES[dataset]]
        assert parse_setting(setting.text) == setting
        head_u = ALL_UNLABELED if of.head_u == UNKNOWN else setting.head_u
        rec.check(name, np.array([setting.head, head_u, setting.gamma, setting.gamma_u, ARRANGEMENTS.index(published.arrangement)]))
        for found in [n for n in rec.names(f"{stem}_") if n.endswith("_l")]:
            seed = re.search(r"_seed(\d+)_l$", found)
            labeled, unlabeled = setting.counts(of.classes, int(seed[1]) if seed else 0)
            rec.check(found, labeled)
            if unlabeled is not None:
                rec.check(found.removesuffix("_l") + "_u", unlabeled)
    if rec.names(BIG):
        labeled, unlabeled = parse_setting("imagenet1k-lt").counts(len(rec.arrays[f"{BIG}l"]))
        assert unlabeled is not None
        for part, counts in {"l": labeled, "u": unlabeled, "total": labeled + unlabeled}.items():
            rec.check(BIG + part, counts)


def split_simpro(rec: Recorder) -> None:
    _split(rec, keep_labeled=False)


def split_acr_d(rec: Recorder) -> None:
    _split(rec, keep_labeled=True)


def _split(rec: Recorder, keep_labeled: bool) -> None:
    labels, n, m = (rec.raw(name) for name in ("labels", "n_l", "n_u"))
    labeled, unlabeled = choose(labels, n.tolist(), m.tolist(), keep_labeled=keep_labeled)
    rec.check("idx_l", labeled)
    rec.check("idx_u", unlabeled)
    rec.check("idx_l_only", choose(labels, n.tolist(), np.zeros_like(m).tolist())[0])
    rec.check("idx_test", balanced_test(labels, len(n), rec.hp("testsplit_n"), rec.hp("seed")))


def small127_simpro(rec: Recorder) -> None:
    _small127(rec, misaligned=False)


def small127_acr_d(rec: Recorder) -> None:
    _small127(rec, misaligned=True)


def _small127(rec: Recorder, misaligned: bool) -> None:
    train, val = rec.raw("train_labels"), rec.raw("val_labels")
    classes, share = len(rec.arrays["num_l"]), COLLECTIONS["imagenet127"].share
    counts = share_counts(train, classes, share)
    labeled, unlabeled = share_rows(train, classes, share)
    table, test = size_order(counts), balanced_test(val, classes, TEST_PER_CLASS, rec.hp("seed"))
    rec.check("idx_l", labeled)
    rec.check("idx_u", unlabeled)
    rec.check("idx_test", test)
    rec.check("remap_train", table[train])
    rec.check("remap_val", table[val])
    num_l, num_u = renumbered_counts(train, counts, misaligned=misaligned)
    rec.check("num_l", num_l)
    rec.check("num_u", num_u)
    if "num_t" in rec.arrays:
        rec.check("num_t", np.bincount(table[val][test], minlength=classes))


HANDLERS = {
    "longtail_counts_settings": settings,
    "longtail_counts_settings_acr_d": settings_acr_d,
    "longtail_counts_split_simpro": split_simpro,
    "longtail_counts_split_acr_d": split_acr_d,
    "longtail_counts_small127_simpro": small127_simpro,
    "longtail_counts_small127_acr_d": small127_acr_d,
}
