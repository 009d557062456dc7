"""Label split files as written to disk."""

import json

import numpy as np
import pytest

from data_tools.convert import convert
from data_tools.split import make_split
from fastssl.errors import DataError
from fastssl.sources import load_labels, load_manifest
from tests.data_tools.collections import idx_folder


@pytest.fixture
def dataset(tmp_path):
    return convert(idx_folder(tmp_path / "raw", train=60), tmp_path / "data")


def test_file_has_the_agreed_fields(dataset):
    made = make_split(dataset, "a", per_class=2, seed=3, validation=10)
    content = json.loads((dataset / "splits" / "a.json").read_text())
    assert (content["format_version"], content["name"], content["law"], content["seed"], content["of"]) == (1, "a", "tllib", 3, "train")
    assert content["dataset_digest"] == load_manifest(dataset).digest and content["digest"] == made.digest
    assert content["labeled"] == made.labeled.tolist() and len(content["validation"]) == 10


def test_validation_never_takes_labelled_rows_nor_changes_them(dataset):
    plain, held = make_split(dataset, "a", per_class=3, seed=1), make_split(dataset, "b", per_class=3, seed=1, validation=20)
    assert np.array_equal(plain.labeled, held.labeled)
    assert set(held.validation.tolist()) | set(held.unlabeled.tolist()) == set(plain.unlabeled.tolist())
    assert not set(held.validation.tolist()) & set(held.unlabeled.tolist())
    assert np.bincount(load_labels(load_manifest(dataset))[held.validation]).tolist() == [2] * 10


def test_writing_it_again_is_fine_but_other_rows_need_force(dataset):
    make_split(dataset, "a", per_class=2)
    before = (dataset / "splits" / "a.json").read_bytes()
    make_split(dataset, "a", per_class=2)
    assert (dataset / "splits" / "a.json").read_bytes() == before
    with pytest.raises(DataError, match="--force"):
        make_split(dataset, "a", per_class=3)
    assert make_split(dataset, "a", per_class=3, force=True).labeled.size == 30
    assert sorted(file.name for file in (dataset / "splits").iterdir()) == ["a.json"]


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
    ],
)
def test_wrong_wishes_leave_no_file(dataset, arguments, match):
    with pytest.raises(DataError, match=match):
        make_split(dataset, arguments.pop("name", "a"), **arguments)
    assert not list((dataset / "splits").iterdir())
