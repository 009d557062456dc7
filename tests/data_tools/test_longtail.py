"""Long-tailed settings: counts against hand-made ones and the published totals, rows, names, and the split file through the command."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.cli import main
from data_tools.convert import convert
from data_tools.longtail import (
    ARRANGEMENTS,
    COLLECTIONS,
    arrange,
    balanced_test,
    choose,
    class_counts,
    draw_setting,
    parse_setting,
    renumbered_counts,
    share_counts,
    size_order,
)
from data_tools.split import make_split
from fastssl.errors import DataError
from fastssl.sources import load_labels, load_manifest
from fastssl.sources.manifest import load_split
from fastssl.sources.split_text import read_split_text
from tests.data_tools.collections import idx_folder


def test_the_published_tables():
    assert class_counts(500, 10, 150).tolist() == [500, 286, 164, 94, 53, 30, 17, 10, 5, 3]
    assert class_counts(4000, 10, 100).tolist() == [4000, 2397, 1437, 861, 516, 309, 185, 111, 66, 40]
    assert class_counts(450, 10, 20).tolist() == [450, 322, 231, 165, 118, 85, 61, 43, 31, 22]
    assert class_counts(7, 4, 1).tolist() == [7] * 4 and class_counts(7, 1, 5).tolist() == [7]


TOTALS = {
    "cifar10-lt": {0: (1162, 9329), 1: (1162, 40000), 5: (1236, 9922), 6: (1236, 40000), 10: (1162, 9643), 17: (1162, 12416), 19: (1236, 9922)},
    "cifar100-lt": {0: (1545, 12719), 1: (1545, 40000), 5: (1911, 15651), 10: (1545, 12719)},
    "imagenet1k-lt": {0: (45589, 184264), 1: (45589, 184264)},
}  # fmt: skip


@pytest.mark.parametrize(("name", "number"), [(name, number) for name, of in TOTALS.items() for number in of])
def test_the_published_totals(name, number):
    labeled, unlabeled = parse_setting(f"{name} exp={number}").counts(COLLECTIONS[name].classes)
    assert (labeled.sum(), unlabeled.sum()) == TOTALS[name][number]


def test_arrangements():
    ranks = np.arange(10)
    assert arrange(ranks, "consistent").tolist() == list(range(10))
    assert arrange(ranks, "reversed").tolist() == list(range(9, -1, -1))
    assert arrange(ranks, "middle").tolist() == [8, 6, 4, 2, 0, 1, 3, 5, 7, 9]
    assert arrange(ranks, "head-tail").tolist() == [1, 3, 5, 7, 9, 8, 6, 4, 2, 0]
    with pytest.raises(DataError, match="did you mean 'reversed'"):
        arrange(ranks, "reverse")


@settings(derandomize=True, max_examples=60, deadline=None)
@given(head=st.integers(1, 5000), classes=st.integers(1, 30), gamma=st.floats(1, 300), how=st.sampled_from(ARRANGEMENTS), seed=st.integers(0, 99))
def test_counts_fall_and_arrangements_only_permute(head, classes, gamma, how, seed):
    counts = class_counts(head, classes, gamma)
    assert counts[0] == head and (np.diff(counts) <= 0).all() and counts[-1] == (int(head / gamma) if classes > 1 else head)
    arranged = arrange(counts, how, seed)
    assert sorted(arranged) == sorted(counts) and np.array_equal(arranged, arrange(counts, how, seed))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), classes=st.integers(1, 6))
def test_rows_are_the_first_of_each_class(seed, classes):
    random = np.random.RandomState(seed)
    labels = random.randint(0, classes, 40)
    n, m = random.randint(0, 9, classes).tolist(), random.randint(0, 9, classes).tolist()
    labeled, unlabeled = choose(labels, n, m)
    _, with_labeled = choose(labels, n, m, keep_labeled=True)
    want: dict[str, list[int]] = {"labeled": [], "unlabeled": [], "both": []}
    for c in range(classes):
        rows = [i for i, label in enumerate(labels) if label == c]
        want["labeled"] += rows[: n[c]]
        want["unlabeled"] += rows[n[c] : n[c] + m[c]]
        want["both"] += rows[: n[c] + m[c]]
    assert (labeled.tolist(), unlabeled.tolist(), with_labeled.tolist()) == (want["labeled"], want["unlabeled"], want["both"])


def test_a_balanced_test_set():
    labels = np.random.RandomState(0).randint(0, 4, 200)
    test = balanced_test(labels, 4, 20, seed=3)
    assert np.bincount(labels[test]).tolist() == [20] * 4 and len(set(test.tolist())) == 80
    assert not np.array_equal(test, balanced_test(labels, 4, 20, seed=4)) and not (np.diff(labels[test]) >= 0).all()


def test_classes_are_renumbered_by_size_and_the_misaligned_counts_are_not():
    labels = np.repeat([0, 1, 2, 3], [20, 50, 20, 35])
    labeled = share_counts(labels, 4, 0.1)
    assert labeled.tolist() == [2, 5, 2, 4]  # 3.5 becomes 4; 2.5 would become 2
    assert share_counts(np.repeat(0, 25), 1, 0.1).tolist() == [2]
    assert size_order(labeled).tolist() == [2, 0, 3, 1]
    assert [part.tolist() for part in renumbered_counts(labels, labeled)] == [[5, 4, 2, 2], [45, 31, 18, 18]]
    assert [part.tolist() for part in renumbered_counts(labels, labeled, misaligned=True)] == [[2, 5, 2, 4], [18, 45, 18, 31]]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("cifar10-lt consistent gamma=150", "cifar10-lt exp=0"),
        ("cifar10-lt gamma=150", "cifar10-lt@exp=0"),
        ("cifar10-lt uniform gamma=150", "cifar10-lt exp=1"),
        ("cifar10-lt reversed gamma=150", "cifar10-lt exp=2"),
        ("cifar10-lt middle gamma=100", "cifar10-lt exp=8"),
        ("cifar10-lt head-tail gamma=100", "cifar10-lt exp=9"),
        ("cifar10-lt consistent gamma=150 gamma_u=90", "cifar10-lt exp=11"),
        ("cifar10-lt reversed gamma=150 gamma_u=30", "cifar10-lt exp=17"),
        ("cifar10-lt random gamma=100", "cifar10-lt exp=19"),
        ("cifar10-lt consistent gamma=100", "cifar10-lt exp=19 code=acr_d"),
        ("cifar10-lt gamma=100 head=500 head_u=4000", "cifar10-lt exp=5"),
        ("cifar100-lt uniform gamma=10", "cifar100-lt exp=6"),
        ("stl10-lt gamma=20", "stl10-lt exp=1"),
        ("imagenet127", "imagenet127 exp=1"),
        ("imagenet1k-lt", "imagenet1k-lt@exp=0"),
    ],
)
def test_names_and_numbers_mean_the_same(text, same):
    assert parse_setting(text) == parse_setting(same)


@pytest.mark.parametrize("name", [name for name, of in COLLECTIONS.items() if of.published])
def test_every_setting_can_be_written_out_and_read_again(name):
    for number in range(len(COLLECTIONS[name].published)):
        setting = parse_setting(f"{name} exp={number}")
        assert parse_setting(setting.text) == setting


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "begins with one of"),
        ("cifar10lt gamma=3", "did you mean 'cifar10-lt'"),
        ("cifar10-lt revers gamma=3", "did you mean 'reversed'"),
        ("cifar10-lt middle reversed gamma=3", "no arrangement"),
        ("cifar10-lt beta=3", "unknown option 'beta'"),
        ("cifar10-lt consistent", "needs gamma"),
        ("cifar10-lt gamma=x", "number above 0"),
        ("cifar10-lt gamma=-2", "number above 0"),
        ("cifar10-lt gamma=2 head=2.5", "whole number"),
        ("cifar10-lt exp=20", "0..19"),
        ("cifar10-lt exp=one", "0..19"),
        ("cifar10-lt middle exp=1", "exp says everything"),
        ("cifar10-lt exp=1 gamma=2", "exp says everything"),
        ("cifar10-lt uniform gamma=2 gamma_u=2", "gamma_u=1"),
        ("cifar10-lt exp=1 code=acr", "simpro, acr_d"),
        ("own-lt gamma=2", "head= and head_u="),
        ("own-lt exp=0", "not published"),
        ("imagenet127 gamma=2", "no choice of gamma"),
        ("stl10-lt gamma=2 head_u=5", "no choice of head_u"),
        ("stl10-lt reversed gamma=2", "no choice of an arrangement"),
    ],
)
def test_settings_that_make_no_sense_are_explained(text, match):
    with pytest.raises(DataError, match=match):
        parse_setting(text)


def test_stl10_takes_every_image_without_a_label():
    labels = np.concatenate([np.full(7, -1), np.arange(5000) % 10, np.full(5, -1)])
    labeled, unlabeled = draw_setting(parse_setting("stl10-lt gamma=10"), labels, 10)
    assert np.bincount(labels[labeled]).tolist() == [450, 348, 269, 208, 161, 125, 96, 75, 58, 45]
    assert unlabeled.tolist() == [*range(7), *range(5007, 5012)]
    with pytest.raises(DataError, match="without labels"):
        draw_setting(parse_setting("stl10-lt gamma=10"), labels[7:5007], 10)


def test_small_imagenet_lists_become_shorter_where_a_class_is():
    labels = np.repeat(np.arange(1000), np.minimum(1300, class_counts(1280, 1000, 256) + (np.arange(1000) % 2)))
    whole, _ = draw_setting(parse_setting("imagenet1k-lt"), labels, 1000)
    labeled, unlabeled = draw_setting(parse_setting("imagenet1k-lt"), labels[labels != 999], 1000)
    assert len(whole) == 45589 and len(labeled) == 45588 and not set(labeled.tolist()) & set(unlabeled.tolist())


def test_imagenet127_takes_a_tenth_of_each_class_and_leaves_the_rest():
    labels = np.random.RandomState(0).randint(0, 127, 5000)
    labeled, unlabeled = draw_setting(parse_setting("imagenet127"), labels, 127)
    assert np.bincount(labels[labeled], minlength=127).tolist() == [round(0.1 * n) for n in np.bincount(labels, minlength=127).tolist()]
    assert sorted([*labeled, *unlabeled]) == list(range(5000)) and (np.diff(unlabeled) > 0).all()


def test_a_dataset_that_does_not_fit_is_refused():
    labels = np.arange(600) % 3
    with pytest.raises(DataError, match="10 classes, the dataset has 3"):
        draw_setting(parse_setting("cifar10-lt exp=0"), labels, 3)
    with pytest.raises(DataError, match="takes 250 images of class 0, which has 200"):
        draw_setting(parse_setting("own-lt gamma=5 head=50 head_u=200"), labels, 3)


@pytest.fixture
def dataset(tmp_path):
    return convert(idx_folder(tmp_path / "raw", train=300), tmp_path / "data")


def test_the_command_writes_a_split_that_training_reads(dataset, capsys):
    text = "own-lt reversed gamma=10 head=8 head_u=20"
    assert main(["split", str(dataset), "--name", "lt", "--setting", text, "--validation", "20"]) == 0
    want = class_counts(8, 10, 10)
    assert f"{want.sum()} labelled" in capsys.readouterr().out
    manifest = load_manifest(dataset)
    split, labels = load_split(manifest, "lt"), load_labels(manifest)
    assert np.bincount(labels[split.labeled], minlength=10).tolist() == want.tolist()
    everything = np.concatenate([split.unlabeled, split.validation])
    assert np.bincount(labels[everything], minlength=10).tolist() == class_counts(20, 10, 10)[::-1].tolist()
    content = read_split_text(dataset / "splits" / "lt.txt")
    assert content["law"] == "longtail" and content["arguments"]["setting"] == "own-lt reversed gamma=10 gamma_u=10 head=8 head_u=20"
    again = make_split(dataset, "again", setting=content["arguments"]["setting"], seed=5, validation=0)
    assert np.array_equal(again.labeled, split.labeled)  # the seed draws nothing


def test_the_command_explains_what_is_wrong(dataset, capsys):
    for arguments, match in (
        (["--setting", "cifar10-lt exp=0"], "takes 4500 images of class 0"),
        (["--setting", "own-lt gamma=2 head=3 head_u=3", "--per-class", "4"], "leave out --per-class"),
    ):
        assert main(["split", str(dataset), "--name", "a", *arguments]) == 2
        assert match in capsys.readouterr().err
