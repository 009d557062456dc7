"""verify must find every kind of damage, and the leak report every repeated image."""

import json
import shutil

import numpy as np
import pytest

from data_tools.convert import convert
from data_tools.split import make_split
from data_tools.verify import verify
from fastssl.errors import DataError
from fastssl.sources.beton import open_beton
from tests.data_tools.collections import idx_bytes, idx_folder, photo_folders


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    for name, raw in (("grey", idx_folder(root / "raw-grey")), ("photo", photo_folders(root / "raw-photo"))):
        for format in ("arrays", "ffcv"):
            convert(raw, root / f"{name}-{format}", format=format)
            make_split(root / f"{name}-{format}", "one", per_class=1)
    return root


@pytest.mark.parametrize("name", ["grey-arrays", "grey-ffcv", "photo-arrays", "photo-ffcv"])
def test_fresh_datasets_are_sound(pristine, name):
    found = verify(pristine / name, leaks=True, workers=2)
    assert found.problems == [] and "leaks: 0 test images also occur in another split" in found.notes


def flip_pixel(folder):
    file = folder / "test.pixels.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def spoil_jpeg(folder):
    beton = open_beton(folder / "train.beton")
    data = bytearray((folder / "train.beton").read_bytes())
    data[int(beton.ptr_N[3]) : int(beton.ptr_N[3]) + 8] = bytes(8)
    (folder / "train.beton").write_bytes(data)


def swap_labels(folder):
    labels = np.load(folder / "train.labels.npy")
    labels[[0, -1]] = labels[[-1, 0]]
    np.save(folder / "train.labels.npy", labels)


def edit_split(folder):
    content = json.loads((folder / "splits" / "one.json").read_text())
    content["labeled"][0] += 1
    (folder / "splits" / "one.json").write_text(json.dumps(content))


def edit_manifest(folder):
    content = json.loads((folder / "dataset.json").read_text())
    content["digest"] = "0" * 64
    (folder / "dataset.json").write_text(json.dumps(content))


def other_rows(folder):
    shutil.copyfile(folder.parent / "other" / "rows.parquet", folder / "rows.parquet")


@pytest.mark.parametrize(
    "name, harm, expected",
    [
        ("grey-arrays", flip_pixel, ["test.pixels.npy has changed", "test: 1 images do not decode to the recorded pixels (rows 19)"]),
        ("photo-ffcv", spoil_jpeg, ["train.beton has changed", "train: 1 images do not decode to the recorded pixels (rows 3)"]),
        ("grey-arrays", swap_labels, ["train.labels.npy has changed", "labels of train differ"]),
        ("grey-ffcv", swap_labels, ["train.labels.npy has changed", "other labels"]),
        ("grey-arrays", edit_split, ["own digest"]),
        ("grey-arrays", edit_manifest, ["checksums do not belong"]),
        ("grey-arrays", lambda folder: (folder / "train.pixels.npy").unlink(), ["train.pixels.npy is missing"]),
        ("grey-arrays", other_rows, ["rows digest", "do not decode"]),
    ],
)
def test_damage_is_found(pristine, tmp_path, name, harm, expected):
    shutil.copytree(pristine / name, tmp_path / name)
    convert(idx_folder(tmp_path / "raw", seed=8), tmp_path / "other")
    harm(tmp_path / name)
    problems = verify(tmp_path / name).problems
    for text in expected:
        assert any(text in problem for problem in problems), problems


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no"])
def test_unreadable_row_table(pristine, tmp_path, content):
    shutil.copytree(pristine / "grey-arrays", tmp_path / "data")
    (tmp_path / "data" / "rows.parquet").unlink()
    if content is not None:
        (tmp_path / "data" / "rows.parquet").write_bytes(content)
    with pytest.raises(DataError, match="rows.parquet"):
        verify(tmp_path / "data")


def test_leak_report_counts_repeats(tmp_path):
    raw = idx_folder(tmp_path / "raw")
    train = np.arange(40 * 64, dtype=np.int64).reshape(40, 8, 8) % 251
    test = (train[:20] + 1) % 251
    test[7] = train[9]  # a leak: label 7 in test, 9 in train
    test[8] = train[9]  # the same image once more
    train[5] = train[4]  # a repeat within train with another label
    (raw / "train-images-idx3-ubyte").write_bytes(idx_bytes(train))
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(test))
    notes = verify(convert(raw, tmp_path / "data"), leaks=True).notes
    assert "leaks: 2 test images also occur in another split" in notes
    assert "duplicates within train: 1 images repeat an earlier one; 1 groups disagree on the label" in notes
    assert "duplicates within test: 1 images repeat an earlier one; 1 groups disagree on the label" in notes
    assert any("train row 9 (label 9) = test row 7 (label 7) = test row 8 (label 8)" in note for note in notes)
