"""Every kind of odd image: converted by the stated rule, or left out with the reason."""

import struct

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.cli import main
from data_tools.collection import BadImage
from data_tools.convert import convert
from data_tools.images import Rules, prepare, reduced_size
from data_tools.jpeg_scan import scan_jpeg
from data_tools.storage import JPEG as JPEG_CODE
from data_tools.storage import Storage
from data_tools.verify import verify
from fastssl.errors import DataError
from tests.data_tools.test_convert import read_all
from tests.data_tools.zoo import BAD, DECODED, GOOD, GREY, JPEG, PHOTO, saved, with_orientation

RULES = Rules(max_pixels=2000 + 64 * 64)


@pytest.fixture
def zoo(tmp_path):
    root = tmp_path / "zoo"
    for split in ("train", "test"):
        for name, (data, *_) in {**GOOD, **BAD}.items():
            folder = root / split / "animals"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name.replace(".jpeg", "-j.jpg").replace("webp", "w.webp").replace("bmp", "b.bmp")).write_bytes(data)
    for name in ("jpeg", "png"):
        for split in ("train", "test"):
            (root / split / "animals" / name).rename(root / split / "animals" / f"plain.{name}")
    return root


@pytest.mark.parametrize("name", GOOD)
def test_rule(name):
    data, expected, tolerance = GOOD[name]
    pixels = prepare(data, RULES).decoded(3)
    assert pixels.shape == expected.shape and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance
    assert np.abs(pixels.astype(int) - expected).mean() <= tolerance / 4


@pytest.mark.parametrize("name", BAD)
def test_reason(name):
    data, reason = BAD[name]
    with pytest.raises(BadImage, match=reason):
        prepare(data, Rules(max_pixels=2000) if "huge" in name else RULES)


@pytest.mark.parametrize("name", ["jpeg", "grey.jpeg", "progressive.jpeg", "blank-optimised.jpeg", "1x1.jpeg"])
def test_ordinary_jpegs_are_kept_as_they_are(name):
    picture = prepare(GOOD[name][0], RULES)
    code, stored = Storage().encode(picture, name)
    assert code == JPEG_CODE and stored is GOOD[name][0]


@pytest.mark.parametrize("name", ["rgb-stored.jpeg", "cmyk.jpeg", "turned6.jpeg"])
def test_other_jpegs_are_encoded_again_and_need_no_rule_to_be_read(name):
    data, expected, _ = GOOD[name]
    code, stored = Storage(quality=95).encode(prepare(data, RULES), name)
    facts = scan_jpeg(bytes(stored))
    assert code == JPEG_CODE and (facts.components, facts.orientation, facts.unusual, facts.fault) == (3, 1, False, "")
    assert simplejpeg.decode_jpeg(stored, "RGB").shape == expected.shape


def test_exif_can_be_ignored_and_both_byte_orders_are_read():
    assert np.array_equal(prepare(with_orientation(JPEG, 6), Rules(exif="ignore")).decoded(3), DECODED)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + struct.pack(">HHIHH", 274, 3, 1, 8, 0)
    assert scan_jpeg(JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + JPEG[2:]).orientation == 8
    assert scan_jpeg(with_orientation(JPEG, 77)).orientation == 1


def test_a_png_with_orientation_is_turned_too():
    from PIL import Image

    exif = Image.Exif()
    exif[274] = 3
    assert np.array_equal(prepare(saved(PHOTO, "PNG", exif=exif), Rules()).decoded(3), PHOTO[::-1, ::-1])


@pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
def test_a_deep_check_finds_what_the_structure_does_not_show(place):
    random = np.random.RandomState(1).randint(0, 256, (96, 96, 3)).astype(np.uint8)
    data = bytearray(simplejpeg.encode_jpeg(random, 90, "RGB", "444"))
    cut = int(len(data) * place)
    data = bytes(data[:cut]) + b"\xff\xd9"  # whole by its markers, but most of its picture is missing
    assert scan_jpeg(data).fault == ""
    with pytest.raises(BadImage, match="damaged"):
        prepare(data, Rules(check="decode"))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(JPEG) - 1), st.binary(min_size=0, max_size=6))
def test_no_damage_ends_in_anything_but_a_reason(cut, noise):
    for data in (JPEG[:cut] + noise, JPEG[:cut] + noise + JPEG[cut + len(noise) :], saved(PHOTO, "PNG")[:cut] + noise):
        try:
            assert prepare(data, Rules(check="decode")).decoded(3).ndim == 3
        except BadImage as reason:
            assert str(reason)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600))
def test_reduced_size(height, width, side):
    new = reduced_size(height, width, side)
    if max(height, width) <= side:
        assert new == (height, width)
    else:
        exact = [min(height, width) * side / max(height, width)]
        assert max(new) == side and min(new) >= 1 and abs(min(new) - max(exact[0], 1)) <= 0.5
        assert reduced_size(width, height, side) == new[::-1]


def test_reduction_by_a_whole_factor_is_the_mean_of_blocks():
    random = np.random.RandomState(2).randint(0, 256, (40, 60, 3)).astype(np.uint8)
    means = random.reshape(10, 4, 15, 4, 3).mean(axis=(1, 3))
    picture = prepare(saved(random, "PNG"), Rules(max_side=15))
    assert (picture.height, picture.width) == (10, 15) and picture.own == (40, 60)
    assert np.abs(picture.decoded(3) - means).max() <= 1  # Pillow rounds once per axis
    assert np.array_equal(prepare(random, Rules(max_side=15)).decoded(3), picture.decoded(3))


def test_colour_becomes_grey_in_a_grey_collection():
    assert prepare(saved(GREY, "PNG"), Rules(channels=1)).decoded(1).tolist() == GREY[..., None].tolist()
    luma = PHOTO @ [0.299, 0.587, 0.114]
    for raw in (saved(PHOTO, "PNG"), PHOTO):
        assert np.abs(prepare(raw, Rules(channels=1)).decoded(1)[..., 0] - luma).max() <= 1


@pytest.mark.parametrize("format", ["arrays", "ffcv", "dali"])
def test_the_whole_zoo(tmp_path, zoo, format, capsys):
    arguments = ["convert", str(zoo), str(tmp_path / "data"), "--format", format, "--max-pixels", str(RULES.max_pixels), "--workers", "2"]
    bad_count = sum("huge" not in name for name in BAD)
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert f"left out {2 * bad_count} images" in err and "bad.parquet" in out
    bad = pq.read_table(tmp_path / "data" / "bad.parquet").to_pylist()
    assert len(bad) == 2 * bad_count and bad[0]["split"] == "train" and bad[0]["label"] == 0
    reasons = {row["key"].split("/")[-1]: row["reason"] for row in bad}
    assert "truncated" in reasons["cut-j.jpg"] and "empty" in reasons["empty-j.jpg"]
    rows = pq.read_table(tmp_path / "data" / "rows.parquet").to_pylist()
    train = [row for row in rows if row["split"] == "train"]
    assert len(train) == len(GOOD) + len(BAD) - bad_count and [row["row"] for row in train] == list(range(len(train)))
    images = dict(zip((row["key"].split("/")[-1] for row in train), read_all(tmp_path / "data")[0], strict=True))
    assert np.array_equal(images["plain.png"], PHOTO) and np.array_equal(images["plain.jpeg"], DECODED)
    assert verify(tmp_path / "data").problems == []


def test_strict_is_one_error_that_names_the_first_five(tmp_path, zoo, capsys):
    assert main(["convert", str(zoo), str(tmp_path / "data"), "--strict", "--max-pixels", "6000"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and error[0].count("train/animals/") == 5 and "images cannot be converted" in error[0] and "..." in error[0]
    assert not (tmp_path / "data").exists()


def test_a_split_without_a_single_good_image_is_an_error(tmp_path):
    (tmp_path / "raw" / "train" / "a").mkdir(parents=True)
    (tmp_path / "raw" / "train" / "a" / "0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="none of its 1 images"):
        convert(tmp_path / "raw", tmp_path / "data")
