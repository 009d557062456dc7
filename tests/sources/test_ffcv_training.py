"""Training on .beton files: what a run says about images that cannot be decoded, and what it does with the keys of the reader."""

import json
import warnings

import numpy as np
import pytest
import torch

from data_tools.convert import convert
from fastssl.engine.assemble import build_evaluator, open_data
from fastssl.engine.train import train
from fastssl.sources import load_manifest
from fastssl.sources.ffcv import FFCVSource
from tests.data_tools.collections import photo_folders
from tests.helpers import metric_lines, tiny_recipe, write_split
from tests.sources.engines import ENGINES
from tests.sources.test_ffcv import spoil


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A converted dataset of 24 photographs with the label split "tiny"; the stored JPEGs of rows 0 (labelled) and 8 are damaged."""
    root = tmp_path_factory.mktemp("photos")
    dataset = convert(photo_folders(root / "raw", per_class=8), root / "data", format="ffcv")
    rows = np.arange(load_manifest(dataset).split("train").count)
    write_split(dataset, "tiny", rows[::4], np.delete(rows, rows[::4]), [])
    spoil(dataset, 0, "tail")
    spoil(dataset, 8, "zeros")
    return dataset


def recipe_of(photos, runs, *overrides):
    views = ["augment.weak=imagenet_weak", "augment.strong=imagenet_weak", "augment.eval=tllib_cifar_eval"]
    return tiny_recipe(photos, runs, "train.steps=6", "log.every=2", "data.unlabeled_batch=12", *views, *overrides)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_reports_its_bad_rows(photos, tmp_path, engine):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        run = train(recipe_of(photos, tmp_path / "runs", f"data.engine={engine}"))
    counts = [line["data/bad_rows"] for line in metric_lines(run) if line["kind"] == "train"]
    assert counts == sorted(counts) and counts[-1] == 2
    assert json.loads((run / "summary.json").read_text())["bad_rows"] == 2
    assert "2 image(s) cannot be decoded" in (run / "train.log").read_text()


def test_scaled_decode_is_for_training_rows_and_the_largest_view(photos, tmp_path):
    recipe = recipe_of(photos, tmp_path / "runs", "data.scaled_decode=1.0", "data.engine=native")
    data = open_data(recipe, torch.device("cpu"))
    assert type(data.source) is FFCVSource and data.source.sizes_N2 is not None
    jpegs = data.source.sizes_N2[:, 0] != data.source.extents_N2[:, 0]  # views of 8: an image of 20 x 26 serves them at half its size
    assert np.array_equal(-(-data.source.sizes_N2[jpegs] // 2), data.source.extents_N2[jpegs]) and jpegs.sum() > 12
    evaluator = build_evaluator(recipe, data.manifest, data.split, "test", 3, torch.device("cpu"))
    assert evaluator.source.sizes_N2 is None
    data.source.close()
    evaluator.source.close()


def test_a_run_with_scaled_decode_trains(photos, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        run = train(recipe_of(photos, tmp_path / "runs", "data.scaled_decode=1.0"))
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
