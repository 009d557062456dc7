"""Converting raw collections: what is written, that it repeats itself, and that failures leave nothing behind."""

import hashlib
import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image

import data_tools.convert
from data_tools.convert import convert, measure_stride
from data_tools.readers import open_raw
from data_tools.split import make_split
from fastssl.errors import DataError
from fastssl.sources import load_manifest, open_source
from fastssl.sources.beton import MODE_JPG, MODE_RAW, open_beton
from fastssl.types import RawBatch
from tests.data_tools.collections import idx_folder, photo_folders, pixels_of, sheet_folder


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
    assert labels == truth.labels.tolist() and all(np.array_equal(image, truth.read(i)) for i, image in enumerate(images))


@pytest.mark.parametrize("format, mode", [("arrays", "auto"), ("ffcv", "raw"), ("ffcv", "auto")])
def test_photos_keep_every_pixel(tmp_path, format, mode):
    raw = photo_folders(tmp_path / "raw")
    dataset = convert(raw, tmp_path / "data", format=format, mode=mode)
    truth = open_raw(raw).splits["train"]
    images, labels = read_all(dataset)
    assert load_manifest(dataset).classes == ("cat", "dog", "emu") and labels == truth.labels.tolist()
    assert all(np.array_equal(image, pixels_of(truth, i)) for i, image in enumerate(images))
    for i, key in enumerate(map(truth.key, range(truth.count))):
        with Image.open(raw / key) as image:
            pillow = np.asarray(image.convert("RGB"))
        # Pillow carries its own libjpeg, which may round differently; PNG is exact.
        assert np.abs(images[i].astype(int) - pillow).max() <= (0 if key.endswith(".png") else 2)


def test_jpeg_originals_are_kept_byte_for_byte(tmp_path):
    raw = photo_folders(tmp_path / "raw")
    beton = open_beton(convert(raw, tmp_path / "data", format="ffcv") / "train.beton")
    train = open_raw(raw).splits["train"]
    for row, key in enumerate(map(train.key, range(train.count))):
        stored = beton.data[beton.ptr_N[row] : beton.ptr_N[row] + beton.size_N[row]].tobytes()
        assert beton.mode_N[row] == (MODE_JPG if key.endswith(".jpg") else MODE_RAW)
        if key.endswith(".jpg"):
            assert stored == (raw / key).read_bytes()


def train_rows(dataset):
    return [row for row in pq.read_table(dataset / "rows.parquet").to_pylist() if row["split"] == "train"]


def stored(beton, row):
    return beton.data[beton.ptr_N[row] : beton.ptr_N[row] + beton.size_N[row]].tobytes()


@pytest.mark.parametrize("mode", ["auto", "raw", "jpg", "proportion", "smart"])
def test_modes_of_ffcv_and_what_the_hashes_are_of(tmp_path, mode):
    raw = photo_folders(tmp_path / "raw")
    dataset = convert(raw, tmp_path / "data", format="ffcv", mode=mode, quality=90, proportion=0.5, smart_threshold=1850)
    beton = open_beton(dataset / "train.beton")
    modes = beton.mode_N.tolist()
    pixels = (beton.height_N * beton.width_N * 3).tolist()
    is_jpeg = [row["key"].endswith(".jpg") for row in train_rows(dataset)]
    expected = {
        "auto": [MODE_JPG if jpeg else MODE_RAW for jpeg in is_jpeg],
        "raw": [MODE_RAW] * 12,
        "jpg": [MODE_JPG] * 12,
        "smart": [MODE_JPG if size > 1850 else MODE_RAW for size in pixels],
    }
    assert modes == expected.get(mode, modes) and (mode in ("raw", "jpg") or {MODE_JPG, MODE_RAW} == set(modes))
    for i, row in enumerate(train_rows(dataset)):
        source = (raw / row["key"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(stored(beton, i)).hexdigest() and row["bytes"] == beton.size_N[i]
        assert row["source_sha256"] == hashlib.sha256(source).hexdigest()
        assert (stored(beton, i) == source) == (is_jpeg[i] and modes[i] == MODE_JPG)
        if modes[i] == MODE_JPG:
            grey = row["key"].endswith("/2.jpg")
            assert simplejpeg.decode_jpeg_header(stored(beton, i))[3] == ("Gray" if grey else "420" if is_jpeg[i] else "444")
    assert load_manifest(dataset).options["jpeg_quality"] == 90


def test_row_table_and_manifest_agree_over_formats_modes_and_sizes(tmp_path):
    raw = photo_folders(tmp_path / "raw")
    made = [
        convert(raw, tmp_path / "a"),
        convert(raw, tmp_path / "b", format="ffcv"),
        convert(raw, tmp_path / "c", format="dali"),
        convert(raw, tmp_path / "d", format="ffcv", mode="jpg", max_side=9),
    ]
    own = ["bytes", "sha256", "height", "width"]
    tables = [pq.read_table(dataset / "rows.parquet") for dataset in made]
    assert all(table.drop(own) == tables[0].drop(own) for table in tables) and tables[0]["height"] == tables[1]["height"]
    manifests = [load_manifest(dataset) for dataset in made]
    assert len({manifest.split("train").rows_digest for manifest in manifests}) == 1 and len({manifest.digest for manifest in manifests}) == 4
    assert manifests[0].mean == manifests[1].mean == manifests[2].mean


def test_mean_and_std_are_those_of_all_pixels_of_a_small_training_set(tmp_path):
    manifest = load_manifest(convert(idx_folder(tmp_path / "raw"), tmp_path / "data"))
    pixels = np.stack([open_raw(tmp_path / "raw").splits["train"].read(i) for i in range(40)]) / 255
    assert manifest.mean == pytest.approx([pixels.mean()], abs=1e-7) and manifest.std == pytest.approx([pixels.std()], abs=1e-7)
    facts = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert facts["measured"] == {"split": "train", "images": 40, "of": 40}


def test_sampled_mean_uses_the_stated_rows(tmp_path, monkeypatch):
    raw = photo_folders(tmp_path / "raw", per_class=7)
    train = open_raw(raw).splits["train"]
    for at_least, rows in ((512, range(21)), (5, range(0, 21, 4))):
        monkeypatch.setattr(data_tools.convert, "_MEASURE_AT_LEAST", at_least)
        for format in ("arrays", "ffcv"):
            dataset = convert(raw, tmp_path / f"{format}{at_least}", format=format)
            assert json.loads((dataset / "dataset.json").read_text())["measured"] == {"split": "train", "images": len(rows), "of": 21}
            pixels = np.concatenate([pixels_of(train, row).reshape(-1, 3) for row in rows]) / 255
            manifest = load_manifest(dataset)
            assert manifest.mean == pytest.approx(pixels.mean(axis=0), abs=1e-7) and manifest.std == pytest.approx(pixels.std(axis=0), abs=1e-6)
    monkeypatch.undo()
    assert [measure_stride(count) for count in (1, 1024, 2047, 2048, 10_000, 65_536, 10**9)] == [1, 2, 3, 4, 19, 64, 64]


def test_max_side_reduces_records_own_sizes_and_keeps_what_is_small_enough(tmp_path):
    raw = photo_folders(tmp_path / "raw")
    for format in ("arrays", "ffcv", "dali"):
        dataset = convert(raw, tmp_path / format, format=format, max_side=27)
        rows = train_rows(dataset)
        info = load_manifest(dataset).split("train")
        assert (info.max_height, info.max_width) == (max(r["height"] for r in rows), 27)
        sizes = np.load(dataset / info.files["sizes"])
        assert sizes.dtype == np.int32 and sizes.tolist() == [[r["source_height"], r["source_width"]] for r in rows]
        for image, row in zip(read_all(dataset)[0], rows, strict=True):
            with Image.open(raw / row["key"]) as opened:
                assert opened.size == (row["source_width"], row["source_height"])
                truth = np.asarray(opened.convert("RGB").resize((row["width"], row["height"]), Image.Resampling.BOX)).astype(int)
            assert image.shape[:2] == (row["height"], row["width"]) and max(image.shape) <= 27
            assert np.abs(image - truth).mean() < (8 if row["key"].endswith("jpg") else 0.01)
            if max(row["source_height"], row["source_width"]) <= 27 and format != "arrays" and row["key"].endswith("jpg"):
                assert row["sha256"] == row["source_sha256"]
        source = open_source(dataset, "train")
        assert source.sizes_N2.tolist() == sizes.tolist()
        source.close()
    assert "sizes" not in load_manifest(convert(raw, tmp_path / "whole")).split("train").files


def test_size_statistics_of_the_manifest(tmp_path):
    dataset = convert(photo_folders(tmp_path / "raw"), tmp_path / "data", format="ffcv")
    rows, facts = train_rows(dataset), json.loads((dataset / "dataset.json").read_text())["splits"]["train"]["sizes"]
    for side in ("height", "width"):
        values = [row[side] for row in rows]
        assert facts[side] == {"min": min(values), "mean": round(sum(values) / 12, 3), "max": max(values)}
    largest = max(rows, key=lambda row: row["height"] * row["width"])
    assert facts["largest"] == {key: largest[key] for key in ("row", "height", "width")}
    assert facts["bytes"]["total"] == sum(row["bytes"] for row in rows)


def test_unknown_labels_are_counted_and_read_back(tmp_path, monkeypatch):
    from data_tools.collection import ArraySplit, Collection

    random = np.random.RandomState(0).randint(0, 256, (9, 4, 5, 3)).astype(np.uint8)
    raw = Collection("made", "half", ("a", "b"), 3, {"train": ArraySplit(random, np.array([0, -1, 1, -1, -1, 0, 0, 1, -1]), "train")})
    monkeypatch.setattr(data_tools.convert, "open_raw", lambda source, **_: raw)
    for format in ("arrays", "ffcv", "dali"):
        dataset = convert(tmp_path / "raw", tmp_path / format, format=format)
        info = load_manifest(dataset).split("train")
        assert info.class_counts == (3, 2) and info.unlabeled == 4
        images, labels = read_all(dataset)
        assert labels == [0, -1, 1, -1, -1, 0, 0, 1, -1] and np.array_equal(images, random)


def test_existing_destination_needs_force_and_keeps_its_label_splits(tmp_path):
    raw = idx_folder(tmp_path / "raw")
    convert(raw, tmp_path / "data")
    make_split(tmp_path / "data", "two", per_class=2)
    with pytest.raises(DataError, match="--force"):
        convert(raw, tmp_path / "data")
    convert(raw, tmp_path / "data", format="ffcv", force=True)
    assert load_manifest(tmp_path / "data").format == "ffcv" and (tmp_path / "data" / "splits" / "two.txt").exists()
    convert(idx_folder(tmp_path / "raw2", seed=9), tmp_path / "data", force=True)
    assert not (tmp_path / "data" / "splits" / "two.txt").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data", "raw", "raw2"]  # nothing unfinished is left beside them


def test_unfit_photo_folders(tmp_path):
    raw = photo_folders(tmp_path / "raw")
    (raw / "test" / "yak").mkdir()
    with pytest.raises(DataError, match="yak.*class count"):
        convert(raw, tmp_path / "data")
    (raw / "test" / "yak").rmdir()
    for file in (raw / "test").rglob("*.*"):
        file.unlink()
    with pytest.raises(DataError, match="no images"):
        convert(raw, tmp_path / "data")
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


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
        ({"max_side": -1}, "--max-side"),
        ({"exif": "aply"}, "did you mean 'apply'"),
        ({"check": "al"}, "unknown check"),
        ({"kind": "idxx"}, "did you mean 'idx'"),
        ({"kind": "class_folders"}, "asked for class_folders"),
        ({"options": {"classmap": "x"}}, "no option 'classmap'"),
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
    assert [str(raw / ours.key(row)) for row in range(ours.count)] == [path for path, _ in theirs.samples]
    assert ours.labels.tolist() == theirs.targets
