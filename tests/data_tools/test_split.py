"""Label split files as drawn by laws and written to disk, through the function and through the command."""

import numpy as np
import pytest
import torch

import data_tools.verbs.split
from data_tools.cli import main
from data_tools.convert import convert
from data_tools.laws import draw, percent_counts
from data_tools.split import make_split
from data_tools.split_lists import own_draw_note
from fastssl.engine.assemble import open_data
from fastssl.errors import DataError
from fastssl.sources import load_labels, load_manifest, load_split
from tests.data_tools.collections import idx_folder
from tests.helpers import tiny_recipe


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    return convert(idx_folder(root / "raw", train=60), root / "data")


@pytest.fixture
def dataset(pristine):
    yield pristine
    for file in (pristine / "splits").iterdir():
        file.unlink()


def test_a_split_is_a_short_text_to_read(dataset):
    made = make_split(dataset, "a", per_class=2, seed=3, validation=10)
    manifest = load_manifest(dataset)
    lines = (dataset / "splits" / "a.txt").read_text().splitlines()
    assert lines[:14] == [
        "# fastssl label split 2",
        "# name: a",
        "# law: tllib",
        "# seed: 3",
        '# arguments: {"per_class": 2, "validation": 10}',
        f"# dataset: {manifest.name}",
        f"# dataset_digest: {manifest.digest}",
        f"# rows_digest: {manifest.split('train').rows_digest}",
        "# of: train",
        "# labeled: 20",
        "# validation: 10",
        "# unlabeled: 30 rest",
        f"# digest: {made.digest}",
        "[labeled]",
    ]
    assert lines[14:34] == [str(row) for row in made.labeled] and lines[34] == "[validation]" and len(lines) == 45
    assert made.unlabeled.tolist() == sorted(set(range(60)) - set(made.labeled.tolist()) - set(made.validation.tolist()))


@pytest.mark.parametrize("law", ["tllib", "simmatch_cifar", "torchssl", "balanced"])
def test_labelled_rows_are_those_of_the_law_in_its_order(dataset, law):
    made = make_split(dataset, "a", law=law, per_class=3, seed=7)
    labeled, unlabeled = draw(law, load_labels(load_manifest(dataset)), 10, per_class=3, fraction=None, seed=7)
    assert np.array_equal(made.labeled, labeled) and np.array_equal(made.unlabeled, np.sort(unlabeled))


def test_validation_never_takes_labelled_rows_nor_changes_them(dataset):
    plain, held = make_split(dataset, "a", per_class=3, seed=1), make_split(dataset, "b", per_class=3, seed=1, validation=20)
    assert np.array_equal(plain.labeled, held.labeled)
    assert set(held.validation.tolist()) | set(held.unlabeled.tolist()) == set(plain.unlabeled.tolist())
    assert not set(held.validation.tolist()) & set(held.unlabeled.tolist())
    assert np.bincount(load_labels(load_manifest(dataset))[held.validation]).tolist() == [2] * 10


def test_writing_it_again_is_fine_but_other_rows_need_force(dataset):
    make_split(dataset, "a", per_class=2)
    before = (dataset / "splits" / "a.txt").read_bytes()
    make_split(dataset, "a", per_class=2)
    assert (dataset / "splits" / "a.txt").read_bytes() == before
    with pytest.raises(DataError, match="--force"):
        make_split(dataset, "a", per_class=3)
    assert make_split(dataset, "a", per_class=3, force=True).labeled.size == 30
    assert sorted(file.name for file in (dataset / "splits").iterdir()) == ["a.txt"]


def test_a_split_of_the_older_form_is_replaced_only_by_force(dataset):
    (dataset / "splits" / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"a\.json.*--force"):
        make_split(dataset, "a", per_class=2)
    make_split(dataset, "a", per_class=2, force=True)
    assert sorted(file.name for file in (dataset / "splits").iterdir()) == ["a.txt"]


def test_all_rows_labelled_is_a_split(dataset):
    made = make_split(dataset, "all", per_class=6)
    assert made.labeled.size == 60 and made.unlabeled.size == made.validation.size == 0


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"per_class": 7}, "only 6 images"),
        ({"per_class": 0}, "empty split"),
        ({"per_class": 2, "validation": 50}, "--validation"),
        ({"per_class": 2, "validation": -1}, "negative"),
        ({"per_class": 2, "name": "a/b"}, "file name"),
        ({"per_class": 2, "name": ""}, "file name"),
        ({"per_class": 2, "name": "a\nb"}, "file name"),
        ({"per_class": 2, "name": "a.txt"}, "file name"),
        ({"percent": 1}, "fewer than one for each"),
        ({"percent": 0}, "above 0"),
        ({"percent": 101}, "at most 100"),
        ({"percent": "nan"}, "no percentage"),
        ({"percent": "1/0"}, "no percentage"),
        ({"percent": 20, "per_class": 2}, "instead of --per-class"),
        ({"percent": 20, "law": "tllib"}, "size of the law balanced"),
        ({"percent": 20, "setting": "own-lt gamma=2 head=2 head_u=2"}, "leave out"),
    ],
)
def test_wrong_wishes_leave_no_file(dataset, arguments, match):
    with pytest.raises(DataError, match=match):
        make_split(dataset, arguments.pop("name", "a"), **arguments)
    assert not list((dataset / "splits").iterdir())


def test_percent_is_balanced_nested_and_rounded_down(dataset):
    labels = load_labels(load_manifest(dataset))
    small, large = make_split(dataset, "small", percent="21.9", seed=5), make_split(dataset, "large", percent=45, seed=5)
    assert (small.labeled.size, large.labeled.size) == (13, 27) and small.law == "balanced"
    for made in (small, large):
        counts = np.bincount(labels[made.labeled], minlength=10)
        assert counts.max() - counts.min() <= 1
    assert set(small.labeled.tolist()) < set(large.labeled.tolist())
    assert not np.array_equal(np.sort(make_split(dataset, "other", percent=45, seed=6).labeled), np.sort(large.labeled))


def test_percent_of_imagenet_has_the_published_sizes():
    one, ten = (percent_counts(1281167, 1000, percent, 0) for percent in (1, 10))
    assert (one.sum(), ten.sum()) == (12811, 128116) and (one.min(), one.max(), ten.min(), ten.max()) == (12, 13, 128, 129)
    assert (one <= ten).all() and percent_counts(1000, 10, 0.7 * 100, 0).sum() == 700


def test_an_own_percentage_is_not_taken_for_a_published_list(dataset, capsys, monkeypatch):
    assert "simclr-1pct (12811 images), simmatch-1pct (13000 images)" in own_draw_note(1, 12811, 1000)
    assert "128000" in own_draw_note(10, 128116, 1000) and own_draw_note(5, 64058, 1000) == "" == own_draw_note(1, 12811, 10)
    monkeypatch.setattr(data_tools.verbs.split, "own_draw_note", lambda percent, count, classes: f"note {percent} {count} {classes}")
    assert main(["split", "make", str(dataset), "--name", "p", "--percent", "50"]) == 0
    assert "note 50 30 10" in capsys.readouterr().err


@pytest.mark.parametrize("law", ["tllib", "simmatch_cifar", "torchssl", "eman10pct", "balanced"])
def test_rows_without_a_known_class_are_never_labelled_and_always_unlabelled(law):
    labels = np.random.RandomState(0).permutation(np.repeat([-1, 0, 1, 2], [9, 5, 5, 5]))
    sizes = {"per_class": None, "fraction": 0.5} if law == "eman10pct" else {"per_class": 4, "fraction": None}
    labeled, unlabeled = draw(law, labels, 3, seed=1, **sizes)
    assert labels[labeled].min() == 0 and set(np.flatnonzero(labels < 0)) <= set(unlabeled.tolist())
    assert sorted([*labeled, *unlabeled]) == list(range(len(labels)))


def test_a_law_draws_the_same_whether_or_not_there_are_rows_without_a_class():
    labels = np.arange(30) % 3
    plain, _ = draw("torchssl", labels, 3, per_class=4, fraction=None, seed=2)
    more, _ = draw("torchssl", np.concatenate([labels, np.full(50, -1)]), 3, per_class=4, fraction=None, seed=2)
    assert np.array_equal(plain, more)


def test_the_short_command_is_make(dataset, capsys):
    assert main(["split", str(dataset), "--name", "a", "--per-class", "2"]) == 0
    assert main(["split", "make", str(dataset), "--name", "b", "--per-class", "2"]) == 0
    assert "a.txt: 20 labelled, 40 unlabelled, 0 validation" in capsys.readouterr().out
    manifest = load_manifest(dataset)
    assert load_split(manifest, "a").digest == load_split(manifest, "b").digest


def test_info_shows_header_counts_classes_and_overlap(dataset, capsys):
    small = make_split(dataset, "small", law="balanced", per_class=1, seed=1)
    make_split(dataset, "large", law="balanced", per_class=3, seed=1, validation=10)
    assert main(["split", "info", str(dataset), "small", "--with", "large"]) == 0
    out = capsys.readouterr().out
    for text in (
        small.digest,
        '{"per_class": 1}',
        "labelled        10 of 60 images (16.7 %)",
        "50, and 60 with data.include_labeled=true",
        "labelled images per class: 1..1",
        "labelled in both        10: 100 % of this, 33.3 % of the other",
        "nested",
        "labelled here, validation there 0",
    ):
        assert text in out
    assert sum("█" in line for line in out.splitlines()) == 10
    assert main(["split", "info", str(dataset), "small", "--with", "lage"]) == 2
    assert "did you mean 'large'" in capsys.readouterr().err


def test_info_of_a_long_tail_says_what_is_in_neither_side(dataset, capsys):
    assert main(["split", "make", str(dataset), "--name", "lt", "--setting", "own-lt gamma=2 head=2 head_u=4"]) == 0
    assert main(["split", "info", str(dataset), "lt"]) == 0
    out = capsys.readouterr().out
    made = load_split(load_manifest(dataset), "lt")
    assert f"in neither      {60 - made.labeled.size - made.unlabeled.size}" in out and "labelled images per class: 1..2" in out


@pytest.mark.parametrize("include", [False, True])
def test_training_takes_its_rows_from_the_text(dataset, tmp_path, include):
    made = make_split(dataset, "a", per_class=2, seed=3, validation=10)
    data = open_data(tiny_recipe(dataset, tmp_path / "runs", "data.split=a", f"data.include_labeled={str(include).lower()}"), torch.device("cpu"))
    assert np.array_equal(data.split.labeled, made.labeled) and np.array_equal(data.split.validation, made.validation)
    wanted = np.sort(np.concatenate([made.labeled, made.unlabeled])) if include else made.unlabeled
    assert np.array_equal(data.unlabeled_rows, wanted) and len(wanted) == (50 if include else 30)
