"""Rows whose class nobody knows (-1): verbs, laws, label splits, training and evaluation."""

import json

import numpy as np
import pytest
import torch

from data_tools.cli import main
from data_tools.convert import convert
from data_tools.longtail import share_counts, share_rows
from data_tools.split import make_split
from fastssl.errors import DataError
from fastssl.sources import load_manifest
from tests.data_tools import layouts_files as files
from tests.data_tools.layouts import put


def test_every_verb_takes_a_dataset_without_any_class(tmp_path, capsys):
    files.flat(tmp_path / "raw")
    dataset = str(convert(tmp_path / "raw", tmp_path / "data"))
    assert main(["inspect", dataset, "--sheet", str(tmp_path / "a.png"), "--html", str(tmp_path / "a.html")]) == 0
    assert main(["split", "make", dataset, "--name", "a", "--per-class", "1"]) == 2
    assert main(["split", "make", dataset, "--name", "a", "--percent", "10"]) == 2
    assert capsys.readouterr().err.count("no image of the dataset has a label") == 2


def test_splits_leave_rows_of_unknown_class_unlabelled(tmp_path):
    dataset = convert(files.class_folders(tmp_path / "raw").source, tmp_path / "data")
    unknown = set(range(9, 13))
    for law in ("tllib", "simmatch_cifar", "torchssl", "balanced"):
        made = make_split(dataset, law, law=law, per_class=1, validation=3)
        assert unknown <= set(made.unlabeled.tolist()) and not unknown & {*made.labeled.tolist(), *made.validation.tolist()}
    assert unknown <= set(make_split(dataset, "share", law="eman10pct", fraction=0.5).unlabeled.tolist())


@pytest.mark.parametrize("labeled, validation, match", [([0, 10], [], "1 labelled rows whose class nobody knows"), ([0], [3, 9], "1 validation rows")])
def test_a_split_that_labels_rows_of_unknown_class_is_refused(tmp_path, labeled, validation, match):
    from data_tools.split import write_split
    from fastssl.sources.split_text import rest_of

    dataset = convert(files.class_folders(tmp_path / "raw").source, tmp_path / "data")
    manifest = load_manifest(dataset)
    rows, held = np.array(labeled), np.array(validation, np.int64)
    with pytest.raises(DataError, match=match):
        write_split(manifest, "bad", law="test", seed=0, arguments={}, labeled=rows, unlabeled=rest_of(13, rows, held), validation=held)


def test_training_takes_unknown_rows_as_unlabelled_and_does_not_score_them(tmp_path):
    layout = files.class_folders(tmp_path / "raw")
    lines = train_tiny(tmp_path, layout, labeled=np.arange(9), unlabeled=np.arange(9, 13))
    assert all(line["train/pseudo_acc_all"] is None and line["train/util_ratio"] is not None for line in lines if line["kind"] == "train")


def train_tiny(tmp_path, layout, *overrides, labeled, unlabeled, method="fixmatch"):
    from data_tools.split import write_split
    from fastssl.engine.train import train
    from tests.helpers import metric_lines, tiny_recipe

    if not (tmp_path / "data").exists():
        convert(layout.source, tmp_path / "data", options=layout.options)
    none = np.zeros(0, np.int64)
    write_split(load_manifest(tmp_path / "data"), "tiny", law="test", seed=0, arguments={}, labeled=labeled, unlabeled=unlabeled, validation=none, force=True)
    steps = ("train.steps=2", "log.every=1", "data.labeled_batch=2", "data.unlabeled_batch=4", "data.include_labeled=false")
    return metric_lines(train(tiny_recipe(tmp_path / "data", tmp_path / "runs", *steps, *overrides, method=method)))


def test_training_on_every_label_takes_the_known_ones(tmp_path):
    train_tiny(tmp_path, files.class_folders(tmp_path / "raw"), labeled=np.arange(3, 9), unlabeled=np.array([0, 1, 2, *range(9, 13)]), method="oracle")
    (summary,) = (tmp_path / "runs").rglob("summary.json")
    assert json.loads(summary.read_text())["num_labeled"] == 9


def test_test_images_of_unknown_class_are_not_scored(tmp_path):
    layout = files.webdataset(tmp_path / "raw")
    (tmp_path / "raw" / "val-000000.tar").unlink()
    (tmp_path / "raw" / "train-000000.tar").rename(tmp_path / "raw" / "test-000000.tar")  # the fifth image has no label
    lines = train_tiny(tmp_path, layout, labeled=np.arange(3), unlabeled=np.array([3]))
    assert [line["eval/num_images"] for line in lines if line["kind"] == "eval"] == [4]
    layout.options["label"] = "none"
    convert(layout.source, tmp_path / "data", options={**layout.options, "classes": str(put_names(tmp_path))}, force=True)
    from fastssl.engine.assemble import build_evaluator
    from tests.helpers import tiny_recipe

    with pytest.raises(DataError, match="no rows whose class is known"):
        build_evaluator(tiny_recipe(tmp_path / "data", tmp_path), load_manifest(tmp_path / "data"), None, "test", 3, torch.device("cpu"))


def put_names(folder):
    put(folder / "names.txt", "a\nb\nc\n")
    return folder / "names.txt"


def test_shares_of_classes_ignore_rows_of_unknown_class():
    labels = np.array([0, -1, 1, 1, -1, 0, 0, 0])
    assert share_counts(labels, 2, 0.5).tolist() == [2, 1]
    labeled, rest = share_rows(labels, 2, 0.5)
    assert labeled.tolist() == [0, 5, 2] and rest.tolist() == [1, 3, 4, 6, 7]
