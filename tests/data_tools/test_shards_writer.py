"""Shards: what is in them, their two indices, repeatability, and what happens on a full disk."""

import errno
import json
import tarfile

import numpy as np
import pytest
import simplejpeg

import data_tools.shards_writer
from data_tools.cli import main
from data_tools.convert import convert
from data_tools.shards_writer import ShardsWriter
from data_tools.verify import verify
from fastssl.errors import DataError
from fastssl.sources import load_manifest, open_source
from fastssl.sources.shards import SAMPLE
from fastssl.types import RawBatch
from tests.data_tools.collections import idx_folder, photo_folders
from tests.sources.worlds import greys, photo_keys, photos

LABELS = [0] * 4 + [1] * 4 + [2] * 4


@pytest.fixture
def raw(tmp_path):
    return photo_folders(tmp_path / "raw")


@pytest.fixture
def tiny_mb(monkeypatch):
    """Every sample fills a shard of 1 MB: real megabytes are too much for a test."""
    monkeypatch.setattr(data_tools.shards_writer, "MB", 1)


def read_all(data):
    source = open_source(data)
    out = RawBatch.allocate(source.num_rows, *source.canvas)
    source.fill(np.arange(source.num_rows), out)
    source.close()
    return [pixels[:h, :w].numpy().copy() for pixels, (h, w) in zip(out.pixels_BHWC, out.extent_B2.tolist(), strict=True)], source.labels_N.tolist()


def members(shard):
    with tarfile.open(shard) as archive:
        return [(m.name, m.offset_data, archive.extractfile(m).read()) for m in archive]


def test_members_are_samples_in_row_order(raw, tmp_path):
    data = convert(raw, tmp_path / "data", format="dali")
    keys, truth = photo_keys(raw), photos(raw)
    found = members(data / "train-000000.tar")
    assert [name for name, _, _ in found] == [f"{row:09d}.{ext}" for row, key in enumerate(keys) for ext in (key.rsplit(".")[-1], "cls")]
    assert [int(content) for name, _, content in found if name.endswith("cls")] == LABELS
    for (_, _, content), key in zip(found[::2], keys, strict=True):
        if key.endswith(".jpg"):
            assert content == (raw / key).read_bytes()
    samples = np.load(data / "train.samples.npy")
    assert samples.dtype == SAMPLE
    whole = (data / "train-000000.tar").read_bytes()
    assert len(whole) % 10240 == 0 and not any(whole[-1024:]), "a tar file ends with two empty blocks, filled up to a record"
    assert [(s["offset"], s["size"]) for s in samples] == [(at, len(content)) for _, at, content in found[::2]]
    assert np.array_equal(np.stack([samples["height"], samples["width"]], axis=1), [image.shape[:2] for image in truth])


def test_dalis_index_is_what_its_own_tool_writes(raw, tmp_path, tiny_mb):
    wds2idx = pytest.importorskip("wds2idx", reason="comes with the nvidia-dali package")
    data = convert(raw, tmp_path / "data", format="dali", shard_mb=1)
    for shard in sorted(data.glob("*.tar")):
        with wds2idx.IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "theirs.idx").read_text() == shard.with_suffix(".idx").read_text()


def test_dalis_index_names_every_member_where_it_is(raw, tmp_path):
    """The same without DALI: its published text format, version 1.2."""
    data = convert(raw, tmp_path / "data", format="dali")
    head, *lines = (data / "train-000000.idx").read_text().splitlines()
    found = members(data / "train-000000.tar")
    assert head == "v1.2 12"
    told = [tuple(line.split()[i : i + 4]) for line in lines for i in (0, 4)]
    assert told == [(name.split(".")[1], str(at), str(len(content)), name) for name, at, content in found]


def test_every_sample_can_have_its_own_shard(raw, tmp_path, tiny_mb):
    data = convert(raw, tmp_path / "data", format="dali", shard_mb=1)
    info = load_manifest(data).split("train")
    assert info.lists["shards"] == tuple(f"train-{i:06d}.tar" for i in range(12)) and len(info.lists["index"]) == 12
    assert set(info.content) == {*info.lists["shards"], *info.lists["index"], "train.samples.npy", "train.labels.npy"}
    images, labels = read_all(data)
    assert labels == LABELS and all(np.array_equal(image, true) for image, true in zip(images, photos(raw), strict=True))
    assert not verify(data).problems


def test_a_shard_ends_with_the_sample_that_fills_it(tmp_path):
    writer = ShardsWriter(tmp_path, "train", 7, shard_mb=1)
    for label in range(7):
        writer.store("png", bytes(480_000), label, 400, 400)
    files = writer.finish()
    assert [len(members(tmp_path / shard)) // 2 for shard in files["shards"]] == [3, 3, 1]


@pytest.mark.parametrize("mode, suffixes", [("auto", {"jpg", "png"}), ("raw", {"png"}), ("jpg", {"jpg"})])
def test_modes(raw, tmp_path, mode, suffixes):
    data = convert(raw, tmp_path / "data", format="dali", mode=mode, quality=90)
    assert {name.split(".")[1] for name, _, _ in members(data / "train-000000.tar")} == suffixes | {"cls"}
    for image, true, key in zip(read_all(data)[0], photos(raw), photo_keys(raw), strict=True):
        exact = mode != "jpg" or key.endswith(".jpg")
        if not exact:
            true = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(true, 90, "RGB", "444"), "RGB")
        assert np.array_equal(image, true)
    assert not verify(data).problems, "rows.parquet has the hashes of what readers see"


def test_grey_images_stay_grey(tmp_path):
    for mode in ("auto", "jpg"):
        data = convert(idx_folder(tmp_path / "raw"), tmp_path / mode, format="dali", mode=mode)
        assert open_source(data).canvas == (8, 8, 1) and not verify(data).problems
    assert all(np.array_equal(image, true) for image, true in zip(read_all(tmp_path / "auto")[0], greys(tmp_path / "raw"), strict=True))


def test_same_bytes_with_any_number_of_workers(raw, tmp_path):
    first, second = (convert(raw, tmp_path / name, format="dali", workers=workers) for name, workers in (("a", 1), ("b", 3)))
    names = sorted(file.name for file in first.iterdir() if file.is_file())
    assert names == sorted(file.name for file in second.iterdir() if file.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_same_rows_as_the_other_formats(raw, tmp_path):
    shards, arrays = convert(raw, tmp_path / "a", format="dali"), convert(raw, tmp_path / "b")
    assert load_manifest(shards).split("train").rows_digest == load_manifest(arrays).split("train").rows_digest
    assert json.loads((shards / "dataset.json").read_text())["options"].items() >= {"format": "dali", "mode": "auto", "shard_mb": 256}.items()


def test_a_changed_shard_is_found(raw, tmp_path):
    data = convert(raw, tmp_path / "data", format="dali")
    sample = np.load(data / "train.samples.npy")[5]
    with open(data / "train-000000.tar", "r+b") as handle:
        handle.seek(int(sample["offset"]) + int(sample["size"]) // 2)
        handle.write(b"\1\2\3")
    problems = verify(data).problems
    assert any("train-000000.tar has changed" in line for line in problems)
    assert any("1 images" in line and "(rows 5)" in line for line in problems)


class FullDisk:
    """A file on a disk with room for 2000 bytes."""

    def __init__(self, path):
        self._handle, self._room = open(path, "wb"), 2000

    def write(self, data):
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._handle.write(data)

    def close(self):
        self._handle.close()


def test_full_disk_is_one_clear_error_and_leaves_no_dataset(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(data_tools.shards_writer, "open_output", FullDisk)
    with pytest.raises(DataError, match="disk is full"):
        convert(raw, tmp_path / "data", format="dali")
    assert not (tmp_path / "data").exists()


def test_through_the_command_line(raw, tmp_path, capsys):
    data = tmp_path / "data"
    assert main(["convert", str(raw), str(data), "--format", "dali", "--shard-mb", "1"]) == 0
    assert main(["verify", str(data)]) == 0 and "sound" in capsys.readouterr().out
    assert main(["inspect", str(data), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert main(["convert", str(raw), str(tmp_path / "other"), "--format", "dali", "--shard-mb", "0"]) == 2
    assert "--shard-mb 0" in capsys.readouterr().err
