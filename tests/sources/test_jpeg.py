"""Reduced JPEG decoding: the rule, the pixels, and what a source says about sizes."""

import json
from math import ceil

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools.convert import convert
from fastssl.augment import build_policy, draw, render
from fastssl.errors import DataError
from fastssl.sources import load_manifest, open_source
from fastssl.sources.feed import Feed, Stream
from fastssl.sources.jpeg import decode_into, reduced_sizes, reductions
from fastssl.sources.order import Order
from fastssl.types import RawBatch
from tests.data_tools.collections import idx_folder, photo_folders, smooth
from tests.sources.engines import ENGINES


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), view=st.integers(1, 600), share=st.floats(0.1, 2.0))
def test_reduction_is_the_largest_that_serves_the_view(height, width, view, share):
    chosen = int(reductions(np.asarray([[height, width]], np.int32), view, share)[0])
    need = max(8, ceil(share * view))
    serve = [d for d in (1, 2, 4, 8) if d == 1 or (ceil(height / d) >= need and ceil(width / d) >= need)]
    assert chosen == max(serve)


def test_off_means_off():
    sizes = np.asarray([[4000, 4000]], np.int32)
    assert reductions(sizes, 224, 0.0).tolist() == [1] and reductions(sizes, 0, 1.0).tolist() == [1]


@pytest.mark.parametrize("size", [(64, 96), (61, 95), (67, 70)])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("spare", [(0, 0), (3, 5)])
@pytest.mark.parametrize("channels", [3, 1])
def test_decode_into_a_corner(size, factor, spare, channels):
    jpeg = np.frombuffer(simplejpeg.encode_jpeg(smooth(*size, 3), 95, "RGB", "420"), np.uint8)
    whole = simplejpeg.decode_jpeg(jpeg, "RGB" if channels == 3 else "GRAY").astype(float)
    height, width = reduced_sizes(np.asarray([size]), np.asarray([factor]))[0].tolist()
    slot = np.full((height + spare[0], width + spare[1], channels), 9, np.uint8)
    decode_into(jpeg, slot, size, (height, width), np.empty(height * width * 3, np.uint8))
    assert (slot[height:] == 9).all() and (slot[:, width:] == 9).all()
    got = slot[:height, :width].astype(float)
    if factor == 1:
        assert np.array_equal(got, whole)
        return
    inner = whole[: size[0] // factor * factor, : size[1] // factor * factor]  # reducing is close to averaging blocks
    means = inner.reshape(size[0] // factor, factor, size[1] // factor, factor, channels).mean((1, 3))
    assert np.abs(got[: means.shape[0], : means.shape[1]] - means).mean() < 6


def test_damage_and_other_sizes_are_value_errors():
    jpeg = np.frombuffer(simplejpeg.encode_jpeg(smooth(32, 32, 3), 95, "RGB", "420"), np.uint8)
    slot, scratch = np.zeros((32, 32, 3), np.uint8), np.empty(32 * 32 * 3, np.uint8)
    for data, size, extent in (
        (jpeg, (32, 31), (32, 31)),
        (jpeg[:-200], (32, 32), (32, 32)),
        (jpeg[::-1].copy(), (32, 32), (32, 32)),
        (jpeg, (32, 32), (21, 21)),
    ):
        with pytest.raises(ValueError):
            decode_into(data, slot, size, extent, scratch)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A bare beton with JPEGs of several sizes and one raw image, with the JPEGs themselves."""
    folder = tmp_path_factory.mktemp("mixed")
    sizes = [(100, 130), (140, 90), (70, 60), (300, 280), (64, 64), (50, 40)]
    jpegs = []
    for i, size in enumerate(sizes):
        image = smooth(*size, i)
        jpegs.append(None if i == 4 else simplejpeg.encode_jpeg(image, 90, "RGB", "420"))
        for split in ("train", "test"):
            file = folder / "raw" / split / f"class{i}" / ("a.png" if i == 4 else "a.jpg")
            file.parent.mkdir(parents=True)
            file.write_bytes(jpegs[i]) if jpegs[i] else Image.fromarray(image).save(file)
    return convert(folder / "raw", folder / "data", format="ffcv") / "train.beton", sizes, jpegs


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workers", [1, 3])
def test_sources_reduce_each_jpeg_by_its_own_factor(mixed, engine, workers):
    file, sizes, jpegs = mixed
    source = open_source(file, engine=engine, workers=workers, view_size=32, scaled_decode=1.0)
    factors = [2, 2, 1, 8, 1, 1]  # short sides 100, 90, 60, 280 and need 32; the 64 x 64 is stored raw
    expected = [[ceil(h / f), ceil(w / f)] for (h, w), f in zip(sizes, factors, strict=True)]
    assert source.extents_N2.tolist() == expected and source.sizes_N2.tolist() == [list(s) for s in sizes] and source.sizes_N2.dtype == np.int32
    assert source.canvas == (max(h for h, _ in expected), max(w for _, w in expected), 3)
    rows = [3, 0, 5, 3, 1, 2, 4]
    out = RawBatch.allocate(8, *source.canvas)
    out.pixels_BHWC.fill_(9)
    source.fill(np.asarray(rows), out)
    for slot, row in enumerate(rows):
        height, width = out.extent_B2[slot].tolist()
        assert [height, width] == expected[row]
        got = out.pixels_BHWC[slot, :height, :width].numpy().astype(int)
        truth = smooth(64, 64, 4) if row == 4 else simplejpeg.decode_jpeg(jpegs[row], "RGB", min_height=height, min_width=width)
        assert np.abs(got - truth).max() <= 1 and (out.pixels_BHWC[slot, height:] == 9).all() and (out.pixels_BHWC[slot, :, width:] == 9).all()
    assert source.bad_rows == 0
    source.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_without_reduction_sizes_are_the_extents(mixed, engine):
    file, sizes, _ = mixed
    for options in ({}, {"view_size": 32}, {"scaled_decode": 1.0}, {"view_size": 200, "scaled_decode": 1.0}):
        source = open_source(file, engine=engine, **options)
        assert source.sizes_N2 is None and source.extents_N2.tolist() == [list(s) for s in sizes] and source.canvas == (300, 280, 3)
        source.close()


def test_shards_reduce_what_they_decode_and_dali_refuses(mixed, tmp_path):
    """The same files by the same rule; a PNG, which no decoder reduces, becomes the mean of its blocks."""
    file, sizes, jpegs = mixed
    dataset = convert(file.parent.parent / "raw", tmp_path / "data", format="dali")
    beton = open_source(file, view_size=32, scaled_decode=1.0)
    source = open_source(dataset, workers=2, view_size=32, scaled_decode=1.0)
    factors = [2, 2, 1, 8, 2, 1]
    assert source.sizes_N2.tolist() == [list(s) for s in sizes] and source.canvas == beton.canvas
    assert source.extents_N2.tolist() == [[ceil(h / f), ceil(w / f)] for (h, w), f in zip(sizes, factors, strict=True)]
    ours, theirs = RawBatch.allocate(6, *source.canvas), RawBatch.allocate(6, *source.canvas)
    source.fill(np.arange(6), ours)
    beton.fill(np.arange(6), theirs)
    for row in range(6):
        height, width = source.extents_N2[row].tolist()
        got = ours.pixels_BHWC[row, :height, :width].numpy()
        if row == 4:
            truth = smooth(64, 64, 4).astype(float).reshape(32, 2, 32, 2, 3).mean((1, 3))
            assert np.abs(got - truth).max() <= 0.5
        else:
            assert np.array_equal(got, theirs.pixels_BHWC[row, :height, :width].numpy())
    assert source.bad_rows == 0
    source.close(), beton.close()
    with pytest.raises(DataError, match="scaled_decode=1: DALI decodes whole.*data.source=shards"):
        open_source(dataset, kind="dali", view_size=32, scaled_decode=1.0)


@pytest.mark.parametrize("kind", ["ffcv", "shards"])
def test_a_crop_drawn_on_the_image_shows_its_place_on_the_reduced_canvas(tmp_path, kind):
    """The same plan numbers, whole and reduced decode: the views show the same part of a picture in which every place has its own colour."""
    height, width = 200, 264
    down, across = np.mgrid[0:height, 0:width]
    image = np.stack([down * 255 // height, across * 255 // width, (down + across) * 255 // (height + width)], -1).astype(np.uint8)
    for split in ("train", "test"):
        (tmp_path / "raw" / split / "one").mkdir(parents=True)
        (tmp_path / "raw" / split / "one" / "a.jpg").write_bytes(simplejpeg.encode_jpeg(image, 98, "RGB", "444"))
    dataset = convert(tmp_path / "raw", tmp_path / "data", format="ffcv" if kind == "ffcv" else "dali")
    policy = build_policy("imagenet_weak", size=48, channels=3, mean=[0.0] * 3, std=[1.0] * 3)
    rows, views, boxes = 64, [], []
    for share in (0.0, 1.0):
        source = open_source(dataset, view_size=48, scaled_decode=share)
        stream = Stream("labeled", source, np.zeros(rows, np.int64), *[np.zeros(rows, np.int64)] * 2, np.ones(rows, bool), Order("sequential", rows), rows)
        with Feed([stream], stop_step=1, ahead=1) as feed:
            raw = feed.next()["labeled"]
            assert raw.size_B2.tolist() == [[height, width]] * rows
            assert raw.extent_B2.tolist() == [[50, 66] if share else [height, width]] * rows
            plan = draw(policy, seed=3, stream=0, view=0, draw_B=raw.draw_B, extent_B2=raw.extent_B2, size_B2=raw.size_B2)
            views.append(render(policy, plan, raw.pixels_BHWC, raw.extent_B2, torch.empty(rows, 3, 48, 48), backend="reference").clone() * 255)
            boxes.append(plan.laws[0]["box"])
        source.close()
    whole, reduced = boxes
    edges = torch.cat([whole[:, :2], whole[:, :2] + whole[:, 2:]], 1)
    assert torch.equal(torch.cat([reduced[:, :2], reduced[:, :2] + reduced[:, 2:]], 1), (edges + 2).div(4, rounding_mode="floor"))  # 1/4, a half goes up
    # One pixel of the image is up to 255 / 200 levels.  An edge moves by 2 pixels; outside the centre of a border pixel of the canvas, 1.5 pixels in, nothing
    # is known; quantisation by the encoder and the rounding of two resamplings are a level each.
    assert (views[0] - views[1]).abs().max() < 3.5 * 255 / height + 3 and (views[0] - views[0][:1]).abs().max() > 60


def test_negative_wish_is_refused(mixed):
    with pytest.raises(DataError, match="scaled_decode"):
        open_source(mixed[0], scaled_decode=-1.0, view_size=32)


def test_sizes_before_conversion_come_from_the_folder(tmp_path):
    dataset = convert(photo_folders(tmp_path / "raw"), tmp_path / "data", format="ffcv")
    count = load_manifest(dataset).split("train").count
    own = np.stack([np.arange(count) + 100, np.arange(count) + 200], axis=1).astype(np.int32)
    np.save(dataset / "train.sizes.npy", own)
    table = json.loads((dataset / "dataset.json").read_text())
    table["splits"]["train"]["files"]["sizes"] = "train.sizes.npy"
    (dataset / "dataset.json").write_text(json.dumps(table))
    for options in ({}, {"view_size": 10, "scaled_decode": 1.0}):
        source = open_source(dataset, **options)
        assert np.array_equal(source.sizes_N2, own)
        source.close()
    np.save(dataset / "train.sizes.npy", own[:-1])
    with pytest.raises(DataError, match="sizes"):
        open_source(dataset)


@pytest.mark.parametrize("engine", ENGINES)
def test_grey_dataset_of_jpegs_hands_back_one_channel(tmp_path, engine):
    dataset = convert(idx_folder(tmp_path / "raw", side=32), tmp_path / "data", format="ffcv", mode="jpg")
    source = open_source(dataset, engine=engine, view_size=16, scaled_decode=1.0)
    whole = open_source(dataset, engine=engine)
    out, full = RawBatch.allocate(3, *source.canvas), RawBatch.allocate(3, *whole.canvas)
    source.fill(np.asarray([2, 0, 1]), out)
    whole.fill(np.asarray([2, 0, 1]), full)
    assert source.canvas == (16, 16, 1) and whole.canvas == (32, 32, 1) and source.bad_rows == 0
    means = full.pixels_BHWC.float().reshape(3, 16, 2, 16, 2).mean((2, 4))
    assert (out.pixels_BHWC[..., 0] - means).abs().mean() < 12 and out.pixels_BHWC.float().std() > 10
    source.close()
    whole.close()
