"""Which rows the published codes label."""

from __future__ import annotations

import re

import numpy as np

from data_tools.laws import draw
from tests.golden.recorder import Recorder

CHECKSUM_PERIOD = 9973  # of the recorded checksum: sum of (position mod period) * row
EMAN_FRACTION = 0.1


def tllib(rec: Recorder) -> None:
    for case in range(rec.hp("n_cases")):
        labels = rec.raw(f"case{case}_targets").astype(np.int64)
        classes, per_class, seed = (rec.hp(f"case{case}_{name}") for name in ("num_classes", "num_samples_per_class", "seed"))
        labeled, unlabeled = draw("tllib", labels, classes, per_class=per_class, fraction=None, seed=seed)
        rec.check(f"case{case}_labeled_idxes", labeled)
        rec.check(f"case{case}_n_unlabeled", np.array(len(unlabeled)))
        rec.check(f"case{case}_unlabeled_head", unlabeled[: len(rec.arrays[f"case{case}_unlabeled_head"])])
        weights = np.arange(len(unlabeled)) % CHECKSUM_PERIOD
        rec.check(f"case{case}_unlabeled_weighted_checksum", np.array((weights * unlabeled).sum()))


def simmatch(rec: Recorder) -> None:
    labels = rec.raw("labels").astype(np.int64)
    classes, per_class = rec.hp("hp.C"), rec.hp("hp.per_class")
    for name in rec.names():
        found = re.fullmatch(r"(cifar|torchssl|eman10pct)\.seed(\d+)\.labelled", name)
        if not found:
            continue
        law, seed = {"cifar": "simmatch_cifar"}.get(found[1], found[1]), int(found[2])
        by_share = law == "eman10pct"
        labeled, unlabeled = draw(law, labels, classes, per_class=None if by_share else per_class, fraction=EMAN_FRACTION if by_share else None, seed=seed)
        rec.check(name, labeled)
        if law == "simmatch_cifar":
            # The published unlabelled list keeps the labelled rows: class by class the whole shuffled list, here put together again.
            rows = [np.concatenate([part[labels[part] == label] for part in (labeled, unlabeled)]) for label in range(classes)]
            rec.check(name.replace("labelled", "unlabelled"), np.concatenate(rows))
        elif law == "eman10pct":
            rec.check(name.replace("labelled", "unlabelled"), unlabeled)


HANDLERS = {"labeled_subset_": tllib, "shrinkmatch_splits_": simmatch}
