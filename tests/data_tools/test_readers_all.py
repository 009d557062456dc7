"""Every kind of source, built in its published layout: converts, reads back image for image, verifies and trains."""

import pickle

import numpy as np
import pytest

from data_tools.convert import convert
from data_tools.readers import READERS, open_raw
from data_tools.split import make_split
from data_tools.verify import verify
from fastssl.engine.train import train
from fastssl.sources import load_manifest, open_source
from fastssl.types import RawBatch
from tests.data_tools import layouts_arrays, layouts_files, layouts_transfer
from tests.data_tools.layouts import pixels
from tests.helpers import metric_lines, tiny_recipe

LAYOUTS = layouts_arrays.LAYOUTS | layouts_files.LAYOUTS | layouts_transfer.LAYOUTS
FORMATS = {"stl10": "arrays", "cub200": "dali", "tar": "dali", "hf_saved": "ffcv", "imagenet": "ffcv", "flat": "ffcv", "flowers102": "ffcv"}


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def converted(request, tmp_path_factory):
    """(layout, converted folder)."""
    root = tmp_path_factory.mktemp(request.param)
    layout = LAYOUTS[request.param](root / "raw")
    format = FORMATS.get(request.param, "arrays")
    return layout, convert(layout.source, root / "data", format=format, options=layout.options, workers=1)


def read_all(dataset, split):
    source = open_source(dataset, split)
    out = RawBatch.allocate(source.num_rows, *source.canvas)
    source.fill(np.arange(source.num_rows), out)
    images = [pixels[:height, :width].numpy().copy() for pixels, (height, width) in zip(out.pixels_BHWC, out.extent_B2.tolist(), strict=True)]
    labels = source.labels_N.tolist()
    source.close()
    return images, labels


def test_every_image_and_label_comes_out_in_order(converted):
    layout, dataset = converted
    manifest = load_manifest(dataset)
    assert manifest.source["kind"] == layout.kind and manifest.classes == layout.classes and manifest.channels == layout.channels
    assert set(manifest.splits) == set(layout.splits)
    for name, (images, labels) in layout.splits.items():
        found, own = read_all(dataset, name)
        assert own == labels, name
        assert len(found) == len(images)
        for row, (image, truth) in enumerate(zip(found, map(pixels, images), strict=True)):
            assert np.array_equal(image, truth), f"{name} row {row}"
        info = manifest.split(name)
        assert info.unlabeled == labels.count(-1) and sum(info.class_counts) == len(labels) - labels.count(-1)


def test_it_verifies(converted):
    assert verify(converted[1], workers=1, ffcv=False).problems == []


def test_rows_are_found_by_parts_as_they_are_by_the_whole(converted):
    layout, _ = converted
    raw = open_raw(layout.source, options=layout.options)
    again = open_raw(layout.source, kind=raw.kind if not layout.source.startswith("torchvision:") else "torchvision", options=layout.options)
    assert again.stamp() == raw.stamp()
    for split in raw.splits.values():
        count = min(split.count, 20)
        keys = [split.key(row) for row in range(count)]
        assert len(set(keys)) == count
        for start, stop in ((0, 1), (count // 2, count), (count - 1, count)):
            part = pickle.loads(pickle.dumps(split.part(start, stop)))
            assert part.count == stop - start and np.asarray(part.labels).tolist() == np.asarray(split.labels)[start:stop].tolist()
            assert [part.key(i) for i in range(part.count)] == keys[start:stop]
            inner = part.part(part.count - 1, part.count)
            assert inner.key(0) == keys[stop - 1]
            for one, other in ((part.read(0), split.read(start)), (inner.read(0), split.read(stop - 1))):
                assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def test_it_trains(converted, tmp_path):
    layout, dataset = converted
    manifest = load_manifest(dataset)
    held = () if "test" in manifest.splits else ("data.eval_on=validation",)
    make_split(dataset, "tiny", law="balanced", per_class=1, validation=manifest.num_classes if held else 0)
    grey = () if manifest.channels == 3 else ("augment.strong=[{flip: {}}]",)
    # With deterministic algorithms, torchmetrics counts classes x classes for every image: minutes for 1000 classes.
    many = ("train.deterministic=false",) if manifest.num_classes > 200 else ()
    steps = ("train.steps=2", "train.steps_per_epoch=2", "log.every=1", "data.labeled_batch=2", "data.unlabeled_batch=2")
    lines = metric_lines(train(tiny_recipe(dataset, tmp_path, *steps, *held, *grey, *many)))
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == [1, 2] and all(np.isfinite(line["train/loss"]) for line in trained)
    (scored,) = (line for line in lines if line["kind"] == "eval")
    assert scored["eval/num_images"] == (manifest.num_classes if held else len(layout.splits["test"][1]))


def test_every_kind_has_a_layout_here():
    names = {"parquet": "hf_parquet"}
    assert {names.get(reader.kind, reader.kind) for reader in READERS} <= set(LAYOUTS)
