"""Training does not depend on who delivers the pixels, nor on how they travel: the same recipe, the same numbers."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from data_tools.shards_writer import ShardsWriter
from fastssl.engine.train import train
from tests.helpers import metric_lines, tiny_recipe, without_times
from tests.sources.worlds import HAS_DALI


def as_shards(data, dest):
    """The arrays dataset ``data`` as tar shards of PNGs."""
    shutil.copytree(data, dest)
    manifest = json.loads((dest / "dataset.json").read_text())
    manifest["format"] = "dali"
    for name, entry in manifest["splits"].items():
        pixels, labels = np.load(dest / f"{name}.pixels.npy"), np.load(dest / f"{name}.labels.npy")
        (dest / f"{name}.pixels.npy").unlink()
        writer = ShardsWriter(dest, name, len(labels), shard_mb=1)
        for image, label in zip(pixels, labels.tolist(), strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            writer.store("png", buffer.getvalue(), label, *image.shape[:2])
        entry["files"] = writer.finish()
    (dest / "dataset.json").write_text(json.dumps(manifest))
    return dest


@pytest.fixture(scope="module")
def reference(tiny_data, tmp_path_factory):
    return without_times(metric_lines(train(tiny_recipe(tiny_data, tmp_path_factory.mktemp("runs"), "train.steps=6"))))


@pytest.fixture(scope="module")
def shards(tiny_data, tmp_path_factory):
    return as_shards(tiny_data, tmp_path_factory.mktemp("shards") / "data")


OTHERS = [("arrays", "data.pack=on"), ("shards", "data.source=auto"), ("shards", "data.source=shards", "data.workers=3", "data.pack=on")]


@pytest.mark.parametrize("how", [*OTHERS, *([("shards", "data.source=dali")] if HAS_DALI else [])], ids=" ".join)
def test_the_same_recipe_gives_the_same_run(how, reference, tiny_data, shards, tmp_path):
    run = train(tiny_recipe({"arrays": tiny_data, "shards": shards}[how[0]], tmp_path, "train.steps=6", *how[1:]))
    lines = without_times(metric_lines(run))
    assert all(line.pop("data/bad_rows", 0) == 0 for line in lines)  # reported by sources that decode
    assert lines == reference


def test_the_log_says_once_what_travels(tiny_data, tmp_path):
    run = train(tiny_recipe(tiny_data, tmp_path, "train.steps=2"))
    lines = [line for line in (run / "train.log").read_text().splitlines() if "feed:" in line]
    assert len(lines) == 1 and "per step" in lines[0] and "labeled 4 x 8x8x3" in lines[0] and "unlabeled 8 x 8x8x3" in lines[0]
