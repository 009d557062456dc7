"""Converting raw collections: what is written, that it repeats itself, and that failures leave nothing behind."""

import errno
import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_tools.arrays_writer
import data_tools.beton_writer
from data_tools.convert import convert
from data_tools.readers import open_raw
from data_tools.split import make_split
from fastssl.errors import DataError
from fastssl.sources import load_manifest, open_source
from fastssl.sources.beton import MODE_JPG, MODE_RAW, open_beton
from fastssl.types import RawBatch
from tests.data_tools.collections import idx_folder, photo_folders, sheet_folder


def read_all(dataset, split="train"):
    source = open_source(dataset, split)
    out = RawBatch.allocate(source.num_rows, *source.canvas)
    source.fill(np.arange(source.num_rows), out)
    images = [pixels[:height, :width].numpy().copy() for pixels, (height, width) in zip(out.pixels_BHWC, out.extent_B2.tolist(), strict=True)]
    labels = source.labels_N.tolist()
    source.close()
    return images, labels


def python_batches(root):
    """torchvision's CIFAR-10 folder with the sheet collection's pixels: planes instead of pixels, pickled."""
    sheets = sheet_folder(root / "sheets")
    batches = root / "cifar-10-batches-py"
    batches.mkdir()
    labels = json.loads((sheets / "train_lables.json").read_text())
    for i, stem in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.asarray(Image.open(sheets / f"{stem}.png")).reshape(4, 32, 32, 3)
        own = labels[4 * i : 4 * i + 4] if stem != "test_batch" else [3, 8, 8, 0]
        (batches / stem).write_bytes(pickle.dumps({b"data": pixels.transpose(0, 3, 1, 2).reshape(4, 3072), b"labels": own}, protocol=2))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (batches / "batches.meta").write_bytes(pickle.dumps({b"label_names": [name.encode() for name in names]}, protocol=2))
    return sheets, root


@pytest.mark.parametrize("format", ["arrays", "ffcv"])
def test_sheets_and_python_batches_give_the_same_dataset(tmp_path, format):
    sheets, batches = python_batches(tmp_path / "raw")
    first, second = convert(sheets, tmp_path / "a", format=format), convert(batches, tmp_path / "b", format=format)
    assert load_manifest(first).digest == load_manifest(second).digest
    assert load_manifest(first).classes[:2] == ("airplane", "automobile")
    images, labels = read_all(first)
    sheet = np.asarray(Image.open(sheets / "data_batch_2.png"))
    assert np.array_equal(images[5], sheet[1].reshape(32, 32, 3)) and labels == [i % 10 for i in range(20)]
    assert read_all(first, "test")[1] == [3, 8, 8, 0]


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    _, root = python_batches(tmp_path / "raw")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    (root / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="damaged"):
        convert(root, tmp_path / "data")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_plain_and_packed(tmp_path, packed):
    images, labels = read_all(convert(idx_folder(tmp_path / "raw", packed=packed), tmp_path / "data"))
    truth = open_raw(tmp_path / "raw").splits["train"]
    assert labels == truth.labels.tolist() and all(np.array_equal(image, truth.load(i).pixels) for i, image in enumerate(images))


@pytest.mark.parametrize("format, mode", [("arrays", "auto"), ("ffcv", "raw"), ("ffcv", "auto")])
def test_photos_keep_every_pixel(tmp_path, format, mode):
    raw = photo_folders(tmp_path / "raw")
    dataset = convert(raw, tmp_path / "data", format=format, mode=mode)
    truth = open_raw(raw).splits["train"]
    images, labels = read_all(dataset)
    assert load_manifest(dataset).classes == ("cat", "dog", "emu") and labels == truth.labels.tolist()
    assert all(np.array_equal(image, truth.load(i).pixels) for i, image in enumerate(images))
    for i, key in enumerate(truth.keys):
        with Image.open(raw / key) as image:
            pillow = np.asarray(image.convert("RGB"))
        # Pillow carries its own libjpeg, which may round differently; PNG is exact.
        assert np.abs(images[i].astype(int) - pillow).max() <= (0 if key.endswith(".png") else 2)


def test_jpeg_originals_are_kept_byte_for_byte(tmp_path):
    raw = photo_folders(tmp_path / "raw")
    beton = open_beton(convert(raw, tmp_path / "data", format="ffcv") / "train.beton")
    for row, key in enumerate(open_raw(raw).splits["train"].keys):
        stored = beton.data[beton.ptr_N[row] : beton.ptr_N[row] + beton.size_N[row]].tobytes()
        assert beton.mode_N[row] == (MODE_JPG if key.endswith(".jpg") else MODE_RAW)
        if key.endswith(".jpg"):
            assert stored == (raw / key).read_bytes()


def test_mode_jpg_encodes_the_rest_and_records_what_readers_will_see(tmp_path):
    raw = photo_folders(tmp_path / "raw")
    dataset = convert(raw, tmp_path / "data", format="ffcv", mode="jpg", quality=90)
    assert (open_beton(dataset / "train.beton").mode_N == MODE_JPG).all()
    import hashlib

    hashes = pq.read_table(dataset / "rows.parquet").filter(pq.ParquetFile(dataset / "rows.parquet").read()["split"].to_numpy(zero_copy_only=False) == "train")
    for image, digest in zip(read_all(dataset)[0], hashes["sha256"].to_pylist(), strict=True):
        assert hashlib.sha256(image.tobytes()).hexdigest() == digest


def test_row_table_and_manifest_agree_over_formats(tmp_path):
    raw = idx_folder(tmp_path / "raw")
    arrays, beton = convert(raw, tmp_path / "a"), convert(raw, tmp_path / "b", format="ffcv")
    one, two = pq.read_table(arrays / "rows.parquet"), pq.read_table(beton / "rows.parquet")
    assert one.drop(["bytes"]) == two.drop(["bytes"]) and one.num_rows == 60
    assert one["key"].to_pylist()[:2] == ["train/0", "train/1"] and one["bytes"].to_pylist()[0] == 64 and two["bytes"].to_pylist()[0] == 192
    assert load_manifest(arrays).split("train").rows_digest == load_manifest(beton).split("train").rows_digest
    assert load_manifest(arrays).mean == load_manifest(beton).mean


@pytest.mark.parametrize("format", ["arrays", "ffcv"])
def test_same_input_gives_same_bytes_with_any_number_of_workers(tmp_path, format):
    raw = photo_folders(tmp_path / "raw")
    first, second = convert(raw, tmp_path / "a", format=format, workers=1), convert(raw, tmp_path / "b", format=format, workers=3)
    names = sorted(file.name for file in first.iterdir() if file.is_file())
    assert names == sorted(file.name for file in second.iterdir() if file.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_existing_destination_needs_force_and_keeps_its_label_splits(tmp_path):
    raw = idx_folder(tmp_path / "raw")
    convert(raw, tmp_path / "data")
    make_split(tmp_path / "data", "two", per_class=2)
    with pytest.raises(DataError, match="--force"):
        convert(raw, tmp_path / "data")
    convert(raw, tmp_path / "data", format="ffcv", force=True)
    assert load_manifest(tmp_path / "data").format == "ffcv" and (tmp_path / "data" / "splits" / "two.json").exists()
    convert(idx_folder(tmp_path / "raw2", seed=9), tmp_path / "data", force=True)
    assert not (tmp_path / "data" / "splits" / "two.json").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data", "raw", "raw2"]


class FullDisk:
    """A file on a disk with room for 100 bytes."""

    def __init__(self, path):
        self._handle, self._room = open(path, "wb"), 100

    def write(self, data):
        self._room -= memoryview(data).nbytes
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._handle.write(data)

    def __getattr__(self, name):
        return getattr(self._handle, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.close()


@pytest.mark.parametrize("format", ["arrays", "ffcv"])
@pytest.mark.parametrize("exists", [False, True])
def test_full_disk_is_one_clear_error_and_leaves_nothing_half_written(tmp_path, monkeypatch, format, exists):
    raw = idx_folder(tmp_path / "raw")
    if exists:
        convert(raw, tmp_path / "data")
        before = load_manifest(tmp_path / "data")
    monkeypatch.setattr(data_tools.arrays_writer, "open_output", FullDisk)
    monkeypatch.setattr(data_tools.beton_writer, "open_output", FullDisk)
    with pytest.raises(DataError, match="disk is full"):
        convert(raw, tmp_path / "data", format=format, force=exists)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == (["data", "raw"] if exists else ["raw"])
    if exists:
        assert load_manifest(tmp_path / "data") == before


def test_too_small_a_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(10, 9, 1))
    with pytest.raises(DataError, match="too small"):
        convert(idx_folder(tmp_path / "raw"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_no_permission_is_one_clear_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(data_tools.arrays_writer, "open_output", refuse)
    with pytest.raises(DataError, match="no permission"):
        convert(idx_folder(tmp_path / "raw"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(data_tools.arrays_writer.ArraysWriter, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(idx_folder(tmp_path / "raw"), tmp_path / "data")
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def damage(what):
    def apply(root):
        if what == "no image":
            (root / "train" / "cat" / "0.jpg").write_bytes(b"no image at all")
        elif what == "cut image":
            file = root / "train" / "cat" / "1.png"
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif what == "extra test class":
            (root / "test" / "yak").mkdir()
        elif what == "no test images":
            for file in (root / "test").rglob("*.*"):
                file.unlink()

    return apply


@pytest.mark.parametrize(
    "what, match",
    [("no image", "0.jpg.*readable"), ("cut image", "1.png.*readable"), ("extra test class", "yak.*class count"), ("no test images", "no images")],
)
def test_unfit_photo_folders(tmp_path, what, match):
    raw = photo_folders(tmp_path / "raw")
    damage(what)(raw)
    with pytest.raises(DataError, match=match):
        convert(raw, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_unfit_idx_folders(tmp_path):
    raw = idx_folder(tmp_path / "raw")
    labels = raw / "train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    for content, match in (
        (whole[:-1], "truncated"),
        (b"\1\2\3\4" + whole[4:], "IDX header"),
        (b"\0\0\x08\1\0\0\0\1\0", "40 images but 1 labels"),
        (whole[:-1] + bytes([11]), "wrong class count"),
    ):
        labels.write_bytes(content)
        with pytest.raises(DataError, match=match):
            convert(raw, tmp_path / "data")
    labels.unlink()
    with pytest.raises(DataError, match="lacks train-labels"):
        convert(raw, tmp_path / "data")


def test_unknown_things_are_named(tmp_path):
    raw = idx_folder(tmp_path / "raw")
    (tmp_path / "empty").mkdir()
    for arguments, match in (
        ({"source": tmp_path / "none"}, "does not exist"),
        ({"source": tmp_path / "empty"}, "no known kind"),
        ({"source": raw / "train-labels-idx1-ubyte"}, "not a folder"),
        ({"dest": raw}, "same folder"),
        ({"format": "array"}, "did you mean 'arrays'"),
        ({"format": "ffcv", "mode": "rwa"}, "did you mean 'raw'"),
        ({"quality": 0}, "1..100"),
    ):
        with pytest.raises(DataError, match=match):
            convert(**{"source": raw, "dest": tmp_path / "data", **arguments})


def test_row_order_is_that_of_torchvisions_image_folder(tmp_path):
    from torchvision.datasets import ImageFolder

    raw = photo_folders(tmp_path / "raw", per_class=5)
    for nested in ("cat/b/7.jpg", "cat/b-a/1.jpg", "cat/0/9.jpg", "dog/Z.jpg"):
        file = raw / "train" / nested
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((raw / "train" / "cat" / "0.jpg").read_bytes())
    theirs = ImageFolder(str(raw / "train"))
    ours = open_raw(raw).splits["train"]
    assert [str(raw / key) for key in ours.keys] == [path for path, _ in theirs.samples]
    assert ours.labels.tolist() == theirs.targets
