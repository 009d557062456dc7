"""dataset.json and label split files: what is read, and how each kind of damage is reported."""

import json
import shutil

import numpy as np
import pytest

from data_tools.convert import convert
from data_tools.split import make_split
from fastssl.errors import DataError
from fastssl.sources import load_labels, load_manifest, load_split, open_source
from tests.data_tools.collections import idx_folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("manifest")
    convert(idx_folder(root / "raw"), root / "data", name="tiny")
    write_json(root / "data", make_split(root / "data", "two", per_class=2, validation=10))
    return root


def write_json(root, made):
    """The older form of a label split, which is still read, in place of the text."""
    manifest = load_manifest(root)
    rows = {side: getattr(made, side).tolist() for side in ("labeled", "unlabeled", "validation")}
    facts = {"format_version": 1, "name": made.name, "law": made.law, "seed": made.seed, "of": made.of, "dataset": manifest.name, "digest": made.digest}
    facts |= {"dataset_digest": manifest.digest, "rows_digest": manifest.split("train").rows_digest, **rows}
    (root / "splits" / f"{made.name}.json").write_text(json.dumps(facts))
    (root / "splits" / f"{made.name}.txt").unlink()


@pytest.fixture
def dataset(pristine, tmp_path):
    shutil.copytree(pristine / "data", tmp_path / "data")
    return tmp_path / "data"


def edit(file, **changes):
    content = json.loads(file.read_text())
    for path, value in changes.items():
        target = content
        *parents, last = path.split("__")
        for key in parents:
            target = target[key]
        target[last] = value
    file.write_text(json.dumps(content))


def test_manifest_holds_the_facts(dataset):
    manifest = load_manifest(dataset)
    pixels = np.load(dataset / "train.pixels.npy") / 255
    assert (manifest.name, manifest.format, manifest.channels, manifest.num_classes) == ("tiny", "arrays", 1, 10)
    assert manifest.split("train").class_counts == (4,) * 10 and manifest.split("test").count == 20
    assert manifest.mean == pytest.approx([pixels.mean()], abs=1e-7) and manifest.std == pytest.approx([pixels.std()], abs=1e-7)
    assert load_labels(manifest).tolist() == [i % 10 for i in range(40)]


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"format_version": 2}, "format version 2"),
        ({"format": "array"}, "did you mean 'arrays'"),
        ({"channels": 4}, "4 channels"),
        ({"mean": [0.1, 0.2]}, "2 means"),
        ({"splits": {}}, "no split"),
        ({"splits": None}, "damaged"),
        ({"classes": ["a", "b"]}, "10 classes but the dataset names 2"),
        ({"splits__train__count": 0}, "empty"),
        ({"splits__train__count": 41}, "sum to 40"),
        ({"splits__train__count": "many"}, "damaged"),
    ],
)
def test_wrong_manifests_are_refused(dataset, changes, match):
    edit(dataset / "dataset.json", **changes)
    with pytest.raises(DataError, match=match):
        load_manifest(dataset)


def test_missing_key_is_named(dataset):
    content = json.loads((dataset / "dataset.json").read_text())
    del content["classes"]
    (dataset / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="classes"):
        load_manifest(dataset)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_unreadable_json_is_refused(dataset, text):
    (dataset / "dataset.json").write_text(text)
    with pytest.raises(DataError, match="JSON"):
        load_manifest(dataset)


def test_missing_folder_and_foreign_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_manifest(tmp_path / "none")
    with pytest.raises(DataError, match="not a converted dataset"):
        load_manifest(tmp_path)


def test_class_counts_that_disagree_with_the_labels(dataset):
    edit(dataset / "dataset.json", splits__train__class_counts=[5, 3] + [4] * 8)
    with pytest.raises(DataError, match="4 rows of class 0 .* says 5"):
        open_source(dataset)


def test_labels_beyond_the_class_count(dataset):
    labels = np.load(dataset / "train.labels.npy")
    labels[3] = 10
    np.save(dataset / "train.labels.npy", labels)
    with pytest.raises(DataError, match="labels 0..10, but the dataset names 10 classes"):
        open_source(dataset)


@pytest.mark.parametrize("name", ["train.pixels.npy", "train.labels.npy"])
@pytest.mark.parametrize("keep", [0, 50, 200])
def test_truncated_files(dataset, name, keep):
    data = (dataset / name).read_bytes()
    (dataset / name).write_bytes(data[:keep])
    with pytest.raises(DataError, match="truncated"):
        open_source(dataset)


@pytest.mark.parametrize("name", ["train.pixels.npy", "train.labels.npy"])
def test_missing_files(dataset, name):
    (dataset / name).unlink()
    with pytest.raises(DataError, match="missing"):
        open_source(dataset)


def test_pixels_of_another_shape(dataset):
    np.save(dataset / "train.pixels.npy", np.zeros((40, 7, 8, 1), np.uint8))
    with pytest.raises(DataError, match=r"uint8\[40, 7, 8, 1\].* says uint8\[40, 8, 8, 1\]"):
        open_source(dataset)


def test_split_by_name_and_by_path(dataset):
    manifest = load_manifest(dataset)
    by_name, by_path = load_split(manifest, "two"), load_split(manifest, dataset / "splits" / "two.json")
    assert by_name.digest == by_path.digest
    assert [rows.dtype for rows in (by_name.labeled, by_name.unlabeled, by_name.validation)] == [np.int64] * 3
    assert sorted(np.concatenate([by_name.labeled, by_name.unlabeled, by_name.validation])) == list(range(40))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"format_version": 0}, "format version"),
        ({"labeled": [1]}, "own digest"),
        ({"dataset_digest": "0", "rows_digest": "1"}, "other data"),
        ({"labeled": "x"}, "damaged"),
    ],
)
def test_wrong_splits_are_refused(dataset, changes, match):
    edit(dataset / "splits" / "two.json", **changes)
    with pytest.raises(DataError, match=match):
        load_split(load_manifest(dataset), "two")


@pytest.mark.parametrize(
    "rows, match",
    [
        (([], [1], []), "no labelled"),
        (([0], [40], []), "row 40"),
        (([0], [-1], []), "row -1"),
        (([0], [1, 0], []), "twice"),
        (([0], [1], [1]), "twice"),
    ],
)
def test_impossible_rows_are_refused_even_with_a_right_digest(dataset, rows, match):
    from fastssl.sources.manifest import split_digest

    manifest = load_manifest(dataset)
    digest = split_digest("train", manifest.split("train").rows_digest, *rows)
    edit(dataset / "splits" / "two.json", labeled=rows[0], unlabeled=rows[1], validation=rows[2], digest=digest)
    with pytest.raises(DataError, match=match):
        load_split(manifest, "two")


def test_unknown_split_names_the_nearest(dataset):
    with pytest.raises(DataError, match="did you mean 'two'"):
        load_split(load_manifest(dataset), "twoo")
    with pytest.raises(DataError, match="no label split"):
        load_split(load_manifest(dataset), "")


def test_a_split_fits_the_same_rows_in_another_format(pristine, dataset, tmp_path):
    convert(pristine / "raw", tmp_path / "beton", format="ffcv")
    convert(idx_folder(tmp_path / "raw2", seed=5), tmp_path / "other")
    file = dataset / "splits" / "two.json"
    assert load_split(load_manifest(tmp_path / "beton"), file).digest == load_split(load_manifest(dataset), "two").digest
    with pytest.raises(DataError, match="other data"):
        load_split(load_manifest(tmp_path / "other"), file)
