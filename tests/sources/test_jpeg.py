"""Reduced JPEG decoding: the rule, the pixels, and what a source says about sizes."""

import json
from math import ceil

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools.convert import convert
from fastssl.errors import DataError
from fastssl.sources import load_manifest, open_source
from fastssl.sources.jpeg import decode_into, reduced_sizes, reductions
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
    whole = simplejpeg.decode_jpeg(jpeg, "RGB").astype(float)
    height, width = reduced_sizes(np.asarray([size]), np.asarray([factor]))[0].tolist()
    slot = np.full((height + spare[0], width + spare[1], channels), 9, np.uint8)
    decode_into(jpeg, slot, size, (height, width), np.empty(height * width * 3, np.uint8))
    assert (slot[height:] == 9).all() and (slot[:, width:] == 9).all()
    got = slot[:height, :width].astype(float)
    if factor == 1:
        assert np.array_equal(got, whole[..., :channels])
        return
    inner = whole[: size[0] // factor * factor, : size[1] // factor * factor]  # reducing is close to averaging blocks
    means = inner.reshape(size[0] // factor, factor, size[1] // factor, factor, 3).mean((1, 3))
    assert np.abs(got[: means.shape[0], : means.shape[1]] - means[..., :channels]).mean() < 6


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
