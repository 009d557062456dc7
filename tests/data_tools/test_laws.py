"""Label-split laws against recorded draws of the published codes, and their general promises."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.laws import LAWS, draw, hold_out
from fastssl.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def tllib_cases():
    with np.load(GOLDEN / "labeled_subset_s1.npz") as data:
        return {key: data[key] for key in data.files}


@pytest.mark.parametrize("case", range(7))
def test_tllib_draws_the_recorded_rows(tllib_cases, case):
    def get(name):
        return tllib_cases[f"case{case}_{name}"]

    labeled, unlabeled = draw(
        "tllib", get("targets").astype(np.int64), int(get("num_classes")), per_class=int(get("num_samples_per_class")), fraction=None, seed=int(get("seed"))
    )
    assert np.array_equal(labeled, get("labeled_idxes"))
    assert len(unlabeled) == get("n_unlabeled") and np.array_equal(unlabeled[:64], get("unlabeled_head"))
    assert int(((np.arange(len(unlabeled)) % 9973) * unlabeled).sum()) == get("unlabeled_weighted_checksum")


def test_every_recorded_tllib_case_is_used(tllib_cases):
    assert tllib_cases["n_cases"] == 7


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_simmatch_family_draws_the_recorded_rows(seed):
    with np.load(GOLDEN / "shrinkmatch_splits_a.npz") as data:
        labels, num_classes, per_class = data["labels"], int(data["hp.C"]), int(data["hp.per_class"])
        labeled, unlabeled = draw("simmatch_cifar", labels, num_classes, per_class=per_class, fraction=None, seed=seed)
        assert np.array_equal(labeled, data[f"cifar.seed{seed}.labelled"])
        # The original keeps labelled rows in its unlabelled list; ours is that list without them, in its order.
        theirs = data[f"cifar.seed{seed}.unlabelled"]
        assert len(theirs) == len(labels) and np.array_equal(unlabeled, theirs[~np.isin(theirs, labeled)])

        labeled, _ = draw("torchssl", labels, num_classes, per_class=per_class, fraction=None, seed=seed)
        assert np.array_equal(labeled, data[f"torchssl.seed{seed}.labelled"])

        labeled, unlabeled = draw("eman10pct", labels, num_classes, per_class=None, fraction=0.1, seed=seed)
        assert np.array_equal(labeled, data[f"eman10pct.seed{seed}.labelled"])
        assert np.array_equal(unlabeled, data[f"eman10pct.seed{seed}.unlabelled"])


def arguments(law, n):
    return {"per_class": None, "fraction": n / 20} if law == "eman10pct" else {"per_class": n, "fraction": None}


@settings(max_examples=60, deadline=None)
@given(law=st.sampled_from(sorted(LAWS)), seed=st.integers(0, 2**32 - 1), n=st.integers(1, 5), counts=st.lists(st.integers(5, 20), min_size=1, max_size=6))
def test_laws_divide_all_rows_and_repeat_themselves(law, seed, n, counts):
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
    before = labels.copy()
    labeled, unlabeled = draw(law, labels, len(counts), seed=seed, **arguments(law, n))
    assert sorted(np.concatenate([labeled, unlabeled])) == list(range(len(labels)))
    expected = [max(1, round(n / 20 * count)) for count in counts] if law == "eman10pct" else [n] * len(counts)
    assert np.bincount(labels[labeled], minlength=len(counts)).tolist() == expected
    again = draw(law, labels, len(counts), seed=seed, **arguments(law, n))
    assert np.array_equal(labeled, again[0]) and np.array_equal(unlabeled, again[1]) and np.array_equal(labels, before)


def test_balanced_splits_are_nested():
    labels = np.arange(300) % 3
    draws = [set(draw("balanced", labels, 3, per_class=n, fraction=None, seed=4)[0].tolist()) for n in (1, 4, 25, 100)]
    assert all(small < large for small, large in zip(draws, draws[1:], strict=False))


@pytest.mark.parametrize("law", sorted(LAWS))
def test_seeds_differ(law):
    labels = np.arange(1000) % 10
    first, second = (draw(law, labels, 10, seed=seed, **arguments(law, 4))[0] for seed in (0, 1))
    assert not np.array_equal(np.sort(first), np.sort(second))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"law": "tlib"}, "did you mean 'tllib'"),
        ({"per_class": 0}, "empty split"),
        ({"per_class": -3}, "empty split"),
        ({"per_class": 7}, "only 6 images"),
        ({"per_class": None}, "--per-class"),
        ({"fraction": 0.5}, "no --fraction"),
        ({"seed": -1}, "seed"),
        ({"law": "eman10pct"}, "--fraction"),
        ({"law": "eman10pct", "per_class": None, "fraction": 0.0}, "empty"),
        ({"law": "eman10pct", "per_class": None, "fraction": 1.5}, "at most 1"),
        ({"num_classes": 4}, "class 3 has no images"),
    ],
)
def test_impossible_wishes_are_explained(changes, match):
    wish = {"law": "tllib", "labels": np.arange(18) % 3, "num_classes": 3, "per_class": 2, "fraction": None, "seed": 0, **changes}
    with pytest.raises(DataError, match=match):
        draw(wish.pop("law"), wish.pop("labels"), wish.pop("num_classes"), **wish)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 1000))
def test_hold_out_is_balanced_and_stays_within_the_candidates(count, seed):
    labels = np.arange(100) % 4
    candidates = np.arange(20, 100)
    held = hold_out(labels, candidates, 4, count, seed)
    per_class = np.bincount(labels[held], minlength=4)
    assert len(set(held.tolist())) == count and np.isin(held, candidates).all() and per_class.max() - per_class.min() <= 1
    assert np.array_equal(held, hold_out(labels, candidates[::-1], 4, count, seed))


def test_hold_out_says_when_a_class_is_too_small():
    with pytest.raises(DataError, match="--validation"):
        hold_out(np.arange(12) % 3, np.arange(12), 3, 15, 0)
