"""The .beton layout: files of our writer and files put together by hand here, whole and damaged."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.beton_writer import page_size
from fastssl.errors import DataError
from fastssl.sources import open_source
from fastssl.sources.beton import ALLOCATION, FIELD, HEADER, MODE_JPG, MODE_RAW, open_beton, record_dtype
from fastssl.types import RawBatch
from tests.data_tools.collections import write_beton
from tests.sources.engines import ENGINES


def handmade(path, images, labels=None, *, fields=((2, b"image"), (1, b"label")), version=2, start=1 << 21):
    """A beton with raw images packed from ``start`` on (foreign writers may order allocations and fields as they like).

    The first image field, or the one named "image", shows the images; others show them in reverse.
    """
    record = record_dtype([type_id for type_id, _ in fields])
    images_at = [place for place, (type_id, _) in enumerate(fields) if type_id == 2]
    shown = next((place for place in images_at if fields[place][1] == b"image"), images_at[0] if images_at else None)
    header, table = np.zeros(1, HEADER), np.zeros(len(fields), FIELD)
    records, allocations = np.zeros(len(images), record), np.zeros(len(images), ALLOCATION)
    for entry, (type_id, name) in zip(table, fields, strict=True):
        entry["type_id"] = type_id
        entry["name"][: len(name)] = list(name)
    blob = b""
    for i, image in enumerate(images):
        address = start + len(blob)
        for place, (type_id, name) in enumerate(fields):
            if type_id == 2:
                records[f"f{place}"][i if place == shown else -1 - i] = (MODE_RAW, image.shape[1], image.shape[0], address)
            elif name == b"label":
                records[f"f{place}"][i] = labels[i]
        allocations[i] = (i, address, image.nbytes)
        blob += image.tobytes()
    header[0] = (version, len(fields), 1 << 21, len(images), start + len(blob))
    head = header.tobytes() + table.tobytes() + records.tobytes()
    with open(path, "wb") as file:
        file.write(head)
        file.seek(start)  # a hole: a huge file takes no space
        file.write(blob + allocations[::-1].tobytes())
    return path


IMAGES = [np.full((2, 3, 3), i, np.uint8) for i in range(5)]


def test_sizes_of_the_layout_are_ffcvs():
    assert (HEADER.itemsize, FIELD.itemsize, ALLOCATION.itemsize) == (24, 1041, 24)
    assert record_dtype([2, 1]).itemsize == 24 and record_dtype([2, 1]).fields["f1"][1] == 16


def test_reads_a_foreign_file(tmp_path):
    beton = open_beton(handmade(tmp_path / "a.beton", IMAGES, [4, 3, 2, 1, 0]))
    assert beton.num_rows == 5 and beton.field_names == ("image", "label")
    assert beton.labels_N.tolist() == [4, 3, 2, 1, 0]
    assert beton.size_N.tolist() == [18] * 5
    assert all((beton.data[p : p + s] == i).all() for i, (p, s) in enumerate(zip(beton.ptr_N, beton.size_N, strict=True)))


def test_label_field_is_found_by_name_among_other_fields(tmp_path):
    fields = ((0, b"weight"), (1, b"index"), (2, b"photo"), (3, b"note"), (1, b"label"))
    beton = open_beton(handmade(tmp_path / "a.beton", IMAGES, [1, 1, 0, 2, 2], fields=fields))
    assert beton.labels_N.tolist() == [1, 1, 0, 2, 2]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "fields",
    [
        ((2, b"image"),),
        ((1, b"class"), (2, b"photo")),
        ((2, b"thumb"), (1, b"label"), (2, b"image")),
        ((2, b"photo"), (2, b"mask"), (3, b"note"), (4, b"box"), (5, b"facts"), (6, b"points"), (0, b"weight")),
    ],
)
def test_engines_read_foreign_files(tmp_path, engine, fields):
    file = handmade(tmp_path / "a.beton", IMAGES, [4, 3, 2, 1, 0], fields=fields)
    source = open_source(file, engine=engine)
    out = RawBatch.allocate(5, *source.canvas)
    source.fill(np.asarray([4, 0, 2, 2, 1]), out)
    assert out.pixels_BHWC[:, 0, 0, 0].tolist() == [4, 0, 2, 2, 1] and (out.extent_B2 == torch.tensor([2, 3])).all()
    expected = {b"label": [4, 3, 2, 1, 0], b"class": [0] * 5}  # handmade() fills only a field of that name
    assert source.labels_N.tolist() == expected.get(dict(fields).get(1), [-1] * 5)
    source.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_addresses_beyond_4_gib(tmp_path, engine):
    file = handmade(tmp_path / "huge.beton", IMAGES, [0, 1, 2, 3, 4], start=(1 << 32) + (1 << 21))
    assert file.stat().st_size > 1 << 32 and file.stat().st_blocks < 1 << 15
    source = open_source(file, engine=engine)
    out = RawBatch.allocate(5, *source.canvas)
    source.fill(np.asarray([4, 3, 2, 1, 0]), out)
    assert out.pixels_BHWC[:, 1, 2, 2].tolist() == [4, 3, 2, 1, 0]
    source.close()


def test_file_without_labels(tmp_path):
    assert open_beton(handmade(tmp_path / "a.beton", IMAGES, fields=((2, b"image"),))).labels_N is None


def test_file_without_images_and_file_with_a_custom_field(tmp_path):
    with pytest.raises(DataError, match="image field"):
        open_beton(handmade(tmp_path / "a.beton", IMAGES, [0] * 5, fields=((1, b"label"),)))
    data = bytearray(handmade(tmp_path / "b.beton", IMAGES, [0] * 5).read_bytes())
    data[HEADER.itemsize + FIELD.itemsize] = 255  # FFCV's number for a field type that only its author can read
    (tmp_path / "b.beton").write_bytes(data)
    with pytest.raises(DataError, match="'label': 255"):
        open_beton(tmp_path / "b.beton")


def test_other_version_missing_file_and_empty_file(tmp_path):
    with pytest.raises(DataError, match="version 3"):
        open_beton(handmade(tmp_path / "a.beton", IMAGES, [0] * 5, version=3))
    with pytest.raises(DataError, match="cannot be opened"):
        open_beton(tmp_path / "none.beton")
    (tmp_path / "empty.beton").write_bytes(b"")
    with pytest.raises(DataError, match="too short"):
        open_beton(tmp_path / "empty.beton")


def test_noise_is_not_a_beton(tmp_path):
    (tmp_path / "noise.beton").write_bytes(np.random.RandomState(0).bytes(5000))
    with pytest.raises(DataError, match="not a .beton"):
        open_beton(tmp_path / "noise.beton")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return handmade(tmp_path_factory.mktemp("beton") / "a.beton", IMAGES, [0] * 5)


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 0.999999))
def test_every_truncation_is_noticed(whole, share):
    data = whole.read_bytes()
    cut = whole.with_name("cut.beton")
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError):
        open_beton(cut)


@pytest.mark.parametrize("field, value, match", [("mode", 7, "row 2"), ("height", 0, "row 2"), ("width", 9, "row 2"), ("data_ptr", 5, "row 2 points")])
def test_damaged_record_is_located(whole, field, value, match):
    data = bytearray(whole.read_bytes())
    record = record_dtype([2, 1])
    records = np.frombuffer(data, record, count=5, offset=HEADER.itemsize + 2 * FIELD.itemsize)
    records["f0"][field][2] = value
    damaged = whole.with_name("damaged.beton")
    damaged.write_bytes(data)
    with pytest.raises(DataError, match=match):
        open_beton(damaged)


@pytest.mark.parametrize("size", [2**63 - 1, 2**63, 2**64 - 1])
def test_a_size_that_does_not_fit_the_numbers_is_damage(tmp_path, size):
    """Of a JPEG, whose size nothing else says; added to its address it would wrap around."""
    data = bytearray(handmade(tmp_path / "a.beton", IMAGES, [0] * 5).read_bytes())
    np.frombuffer(data, record_dtype([2, 1]), count=5, offset=HEADER.itemsize + 2 * FIELD.itemsize)["f0"]["mode"][:] = MODE_JPG
    allocations = np.frombuffer(data, ALLOCATION, offset=int(np.frombuffer(data, HEADER, count=1)[0]["alloc_table_ptr"]))
    allocations["size"][allocations["sample_id"] == 2] = size
    (tmp_path / "damaged.beton").write_bytes(data)
    with pytest.raises(DataError, match="record of row 2 is damaged"):
        open_beton(tmp_path / "damaged.beton")


def test_writer_starts_a_new_page_when_an_image_does_not_fit(tmp_path):
    side = 800  # 1.92 MB: one image fills most of a 2 MiB page
    random = np.random.RandomState(0)
    images = [random.randint(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(3)]
    beton = open_beton(write_beton(tmp_path, images))
    first, last = beton.ptr_N // beton.page_size, (beton.ptr_N + beton.size_N - 1) // beton.page_size
    assert (first == last).all() and len(set(first.tolist())) == 3
    for image, start, size in zip(images, beton.ptr_N, beton.size_N, strict=True):
        assert beton.data[start : start + size].tobytes() == image.tobytes()


def test_writer_takes_larger_pages_for_larger_images_and_refuses_impossible_ones(tmp_path):
    assert open_beton(write_beton(tmp_path, [np.zeros((1000, 1000, 3), np.uint8)])).page_size == 1 << 22
    with pytest.raises(DataError, match="page"):
        page_size(60000 * 60000 * 3)
