"""What only the shards source does: its index, damaged and missing files, many files at once, plain image files."""

import errno
import io
import json
import os
import shutil
import threading
import warnings

import numpy as np
import psutil
import pytest
from PIL import Image, features

from data_tools.convert import convert
from fastssl.errors import DataError
from fastssl.sources import open_source
from fastssl.sources import shards as shards_module
from fastssl.sources.encoded import decode_into
from fastssl.sources.shards import SAMPLE
from fastssl.types import RawBatch
from tests.data_tools.collections import photo_folders, smooth
from tests.sources.worlds import HAS_DALI, photo_keys, photos

READERS = ["shards", "dali"] if HAS_DALI else ["shards"]
JPEG_ROW, PNG_ROW = 0, 1


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    return photo_folders(root / "raw"), convert(root / "raw", root / "data", format="dali")


@pytest.fixture
def raw(master):
    return master[0]


@pytest.fixture
def data(master, tmp_path):
    return shutil.copytree(master[1], tmp_path / "data")


def samples_of(data):
    return np.load(data / "train.samples.npy")


def overwrite(data, row, offset, content):
    """Damage: other bytes ``offset`` into the stored image of ``row``."""
    sample = samples_of(data)[row]
    with open(data / "train-000000.tar", "r+b") as handle:
        handle.seek(int(sample["offset"]) + offset)
        handle.write(content)


def forget_checksums(data):
    samples = samples_of(data)
    samples["crc"] = 0
    np.save(data / "train.samples.npy", samples)


def read(source, rows):
    out = RawBatch.allocate(len(rows), *source.canvas)
    out.pixels_BHWC.fill_(9)
    source.fill(np.asarray(rows), out)
    return [pixels[:h, :w].numpy().copy() for pixels, (h, w) in zip(out.pixels_BHWC, out.extent_B2.tolist(), strict=True)]


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("row", [JPEG_ROW, PNG_ROW])
@pytest.mark.parametrize("what", ["in the middle", "header", "end", "other size"])
@pytest.mark.parametrize("known", ["checksums", "no checksums"])
def test_damaged_images_are_grey_counted_and_warned_about_once(raw, data, kind, row, what, known):
    size = int(samples_of(data)[row]["size"])
    if what == "other size":
        samples = samples_of(data)
        samples["height"][row] -= 1
        np.save(data / "train.samples.npy", samples)
    else:
        overwrite(data, row, {"in the middle": size // 2, "header": 0, "end": size - 40}[what], bytes(40))
    if known == "no checksums":
        forget_checksums(data)
    source = open_source(data, kind=kind)
    truth = photos(raw)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            got = read(source, [2, row, 3, row])
            assert np.array_equal(got[0], truth[2]) and np.array_equal(got[2], truth[3]), "neighbours are untouched"
            if known == "checksums" or what == "header" or what == "other size":
                assert (got[1] == 127).all() and (got[3] == 127).all()
            else:  # without a checksum a decoder may not notice; but what comes is never an earlier image
                assert got[1].shape == truth[row].shape and not np.array_equal(got[1], truth[2][: len(got[1])])
    if known == "checksums" or what in ("header", "other size"):
        assert source.bad_rows == 1 and source.bad_row_ids == {row}
        warned = [str(w.message) for w in caught if w.category is RuntimeWarning]
        assert len(warned) == 1 and f"row {row} cannot be decoded" in warned[0]
    assert np.array_equal(read(source, [4])[0], truth[4]), "the source still works"
    source.close()


def test_both_readers_and_the_beton_reader_apply_one_rule(raw, data, tmp_path):
    """The same JPEG, cut short in each container: grey everywhere."""
    overwrite(data, JPEG_ROW, 300, bytes(400))
    beton = convert(raw, tmp_path / "beton", format="ffcv")
    from fastssl.sources.beton import open_beton

    table = open_beton(beton / "train.beton")
    with open(beton / "train.beton", "r+b") as handle:
        handle.seek(int(table.ptr_N[JPEG_ROW]) + 300)
        handle.write(bytes(400))
    shown = []
    for path, kind in [(beton, "ffcv"), *((data, kind) for kind in READERS)]:
        source = open_source(path, kind=kind)
        with pytest.warns(RuntimeWarning, match="mid-grey"):
            shown.append(read(source, [JPEG_ROW])[0])
        assert source.bad_row_ids == {JPEG_ROW}
        source.close()
    assert all(np.array_equal(shown[0], other) and (other == 127).all() for other in shown)


@pytest.mark.parametrize("kind", READERS)
def test_a_shard_cut_short_while_in_use_gives_grey_rows(data, kind):
    source = open_source(data, kind=kind)
    read(source, [0])
    os.truncate(data / "train-000000.tar", int(samples_of(data)[5]["offset"]) + 10)
    with pytest.warns(RuntimeWarning, match="its file ends after 10 of"):
        got = read(source, [5, 0, 11])
    assert (got[0] == 127).all() and (got[2] == 127).all() and not (got[1] == 127).all() and source.bad_row_ids == {5, 11}
    source.close()


def test_unfit_files_are_refused_when_opened(data):
    whole = (data / "train-000000.tar").read_bytes()
    (data / "train-000000.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="train-000000.tar.*truncated"):
        open_source(data)
    (data / "train-000000.tar").unlink()
    with pytest.raises(DataError, match="train-000000.tar.*No such file"):
        open_source(data)
    (data / "train-000000.tar").write_bytes(whole)
    good = samples_of(data)
    for column, value, match in (
        ("shard", 1, "names shard 1"),
        ("offset", -1, "out of range"),
        ("height", 0, "out of range"),
        ("width", 9999, "out of range"),
        ("offset", 2**63 - 1, "truncated"),  # their sum with the other column does not fit 64 bits
        ("size", 2**63 - 1, "truncated"),
    ):
        bad = good.copy()
        bad[column][3] = value
        np.save(data / "train.samples.npy", bad)
        with pytest.raises(DataError, match=match):
            open_source(data)
    np.save(data / "train.samples.npy", good[:-1])
    with pytest.raises(DataError, match="train.samples.npy"):
        open_source(data)
    (data / "train.samples.npy").unlink()
    with pytest.raises(DataError, match="missing"):
        open_source(data)


@pytest.mark.parametrize("save", [{"format": "AVIF"}, {"format": "GIF"}, {"format": "PNG"}, {"format": "TIFF", "compression": "tiff_lzw"}, {"format": "WEBP"}])
def test_whatever_a_decoder_raises_for_damage_is_one_kind_of_error(save):
    """Files of an index without checksums may be of any kind that Pillow opens; its decoders raise what they like."""
    if save["format"] in ("AVIF", "WEBP") and not features.check(save["format"].lower()):
        pytest.skip(f"this Pillow knows no {save['format']}")
    buffer, random = io.BytesIO(), np.random.RandomState(0)
    Image.fromarray(smooth(24, 31, 5)).save(buffer, **save)
    whole, slot, refused = buffer.getvalue(), np.zeros((24, 31, 3), np.uint8), 0
    for trial in range(120):
        damaged = bytearray(whole[: random.randint(1, len(whole))] if trial % 3 == 0 else whole)
        place = random.randint(0, len(damaged))
        damaged[place : place + 20] = bytes(len(damaged[place : place + 20])) if trial % 3 == 1 else random.bytes(len(damaged[place : place + 20]))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                decode_into(bytes(damaged), slot, (24, 31))
        except ValueError:
            refused += 1
    assert refused > 10


def test_storage_that_fails_is_one_clear_error_at_once(data, monkeypatch):
    source = open_source(data, workers=3)

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(DataError, match="train-000000.tar.*Input/output error.*check the storage"):
        read(source, list(range(8)))
    monkeypatch.undo()
    assert len(read(source, list(range(8)))) == 8, "and it goes on when the storage does"
    source.close()


def test_more_shards_than_open_files(raw, tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.shards_writer.MB", 1)
    data = convert(raw, tmp_path / "data", format="dali", shard_mb=1)
    assert len(list(data.glob("train-*.tar"))) == 12
    monkeypatch.setattr(shards_module, "_OPEN_FILES", 3)
    truth = photos(raw)
    before = psutil.Process().num_fds()
    source = open_source(data, workers=2)
    errors = []

    def work(seed):
        random = np.random.RandomState(seed)
        try:
            for _ in range(30):
                rows = random.randint(0, 12, 6).tolist()
                assert all(np.array_equal(got, truth[row]) for got, row in zip(read(source, rows), rows, strict=True))
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and psutil.Process().num_fds() <= before + 3
    source.close()
    assert psutil.Process().num_fds() == before


def name_files(data, files, extents):
    """Make the training rows of a dataset these files, in place of its tar members."""
    samples = np.zeros(len(files), SAMPLE)
    samples["shard"] = np.arange(len(samples))
    samples["size"] = [file.stat().st_size for file in files]
    samples["height"], samples["width"] = np.transpose(extents)
    np.save(data / "train.samples.npy", samples)
    manifest = json.loads((data / "dataset.json").read_text())
    manifest["splits"]["train"]["files"]["shards"] = list(map(str, files))
    (data / "dataset.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", READERS)
def test_plain_image_files_are_shards_of_one_sample(raw, data, kind):
    """An index may name files instead of tar members; nothing is copied."""
    truth = photos(raw)
    name_files(data, [raw / key for key in photo_keys(raw)], [image.shape[:2] for image in truth])
    source = open_source(data, kind=kind)
    assert all(np.array_equal(got, true) for got, true in zip(read(source, list(range(12))), truth, strict=True))
    source.close()
