"""The text form of label splits: what is written is read back, and every kind of damage is refused with one sentence."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.convert import convert
from data_tools.split import make_split, write_split
from fastssl.errors import DataError
from fastssl.sources import load_manifest, load_split
from fastssl.sources.manifest import split_files
from fastssl.sources.split_text import read_split_text, render_split
from tests.data_tools.collections import idx_folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return convert(idx_folder(root / "raw"), root / "data")


@pytest.fixture
def dataset(pristine):
    yield pristine
    for file in (pristine / "splits").iterdir():
        file.unlink()


def header(**rows):
    facts = {"name": "a", "law": "tllib", "seed": 4, "arguments": {"per_class": 2}, "dataset": "x: y", "dataset_digest": "d", "rows_digest": "", "of": "train"}
    return {**facts, "digest": "0", **rows}


@settings(derandomize=True, max_examples=80, deadline=None)
@given(seed=st.integers(0, 999), listed=st.booleans(), sizes=st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 60)))
def test_what_is_written_is_read_back(tmp_path_factory, seed, listed, sizes):
    rows = np.random.RandomState(seed).permutation(200)
    labeled, validation, unlabeled = (part[:size] for part, size in zip((rows[:40], rows[40:80], np.sort(rows[80:])), sizes, strict=True))
    raw = header(labeled=labeled, validation=validation, unlabeled=unlabeled if listed else None, unlabeled_count=len(unlabeled))
    file = tmp_path_factory.mktemp("t") / "a.txt"
    file.write_text(render_split(raw))
    found = read_split_text(file)
    assert {key: found[key] for key in header()} == header()
    assert np.array_equal(found["labeled"], labeled) and np.array_equal(found["validation"], validation) and found["unlabeled_count"] == len(unlabeled)
    assert np.array_equal(found["unlabeled"], unlabeled) if listed else found["unlabeled"] is None


def test_runs_of_unlabelled_rows_are_one_line_each(tmp_path):
    rows = np.array([0, 1, 2, 7, 9, 10])
    text = render_split(header(labeled=np.array([3]), validation=np.zeros(0, np.int64), unlabeled=rows, unlabeled_count=6))
    assert text.endswith("[labeled]\n3\n[unlabeled]\n0-2\n7\n9-10\n")


def test_only_the_rest_is_left_out_of_the_file(dataset):
    manifest, none = load_manifest(dataset), np.zeros(0, np.int64)
    part = write_split(manifest, "part", law="x", seed=0, arguments={}, labeled=np.array([3, 1]), unlabeled=np.arange(5, 40), validation=none)
    rest = write_split(manifest, "rest", law="x", seed=0, arguments={}, labeled=np.array([1, 0]), unlabeled=np.arange(2, 40), validation=none)
    assert "5-39" in (dataset / "splits" / "part.txt").read_text() and part.unlabeled.tolist() == list(range(5, 40)) and part.labeled.tolist() == [3, 1]
    assert "[unlabeled]" not in (dataset / "splits" / "rest.txt").read_text() and rest.unlabeled.tolist() == list(range(2, 40))


def replaced(old, new):
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    "harm, match",
    [
        (lambda text: "", "no label split"),
        (replaced("# fastssl label split 2", "# fastssl label split 3"), "format version '3'"),
        (replaced("# fastssl", "1 # fastssl"), "no label split"),
        (replaced("# seed: 3", "# seed: x"), "damaged"),
        (replaced("# seed: 3\n", ""), "damaged.*seed"),
        (replaced("# seed: 3", "# seed: 3\n# seed: 3"), "repeats"),
        (replaced("30 rest", "30 all"), "rest or listed"),
        (replaced("# labeled: 10", "# labeled: 11"), "header says 11"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "header says 10"),
        (replaced("[labeled]", "[labelled]"), "damaged"),
        (replaced("[labeled]\n", "5\n[labeled]\n"), "before any section"),
        (lambda text: text + "[unlabeled]\n7\n", "both derived and listed"),
        (lambda text: text.replace("[labeled]\n", "[labeled]\n0-99999999999999\n"), "10 rows that the header says"),
        (lambda text: text.replace("[labeled]\n", "[labeled]\n-4\n"), "damaged"),
        (lambda text: text.replace("[labeled]\n", "[labeled]\nfour\n"), "damaged"),
        (replaced("# of: train", "# of: tset"), "damaged|no split"),
        (lambda text: text.split("# digest")[0] + "# digest: 0\n[labeled]" + text.split("[labeled]")[1], "own digest"),
    ],
)
def test_damage_is_one_sentence(dataset, harm, match):
    make_split(dataset, "a", per_class=1, seed=3)
    file = dataset / "splits" / "a.txt"
    text = file.read_text()
    assert harm(text) != text
    file.write_text(harm(text))
    with pytest.raises(DataError, match=match) as caught:
        load_split(load_manifest(dataset), "a")
    assert "a.txt" in str(caught.value) or "no split" in str(caught.value)


def test_moving_a_row_by_hand_is_noticed(dataset):
    made = make_split(dataset, "a", per_class=1, seed=3)
    file = dataset / "splits" / "a.txt"
    file.write_text(file.read_text().replace(f"[labeled]\n{made.labeled[0]}\n", f"[labeled]\n{made.unlabeled[0]}\n"))
    with pytest.raises(DataError, match="own digest"):
        load_split(load_manifest(dataset), "a")


def test_a_split_for_other_data_is_refused_and_by_path_it_fits_another_format(dataset, tmp_path):
    made = make_split(dataset, "a", per_class=1, seed=3)
    file = dataset / "splits" / "a.txt"
    beton = convert(idx_folder(tmp_path / "raw"), tmp_path / "beton", format="ffcv")
    assert load_split(load_manifest(beton), file).digest == made.digest
    other = convert(idx_folder(tmp_path / "raw2", seed=9), tmp_path / "other")
    with pytest.raises(DataError, match="other data"):
        load_split(load_manifest(other), file)


def test_files_that_are_no_splits_are_not_listed(dataset):
    make_split(dataset, "b", per_class=1)
    for name in ("a.json", "notes.md", "b.txt.tmp-1"):
        (dataset / "splits" / name).write_text("")
    assert [file.name for file in split_files(dataset)] == ["a.json", "b.txt"]
    assert split_files(dataset / "nowhere") == []
