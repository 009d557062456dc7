"""verify must find every kind of damage, and the leak report every repeated image."""

import importlib.util
import io
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image

import data_tools.verify
from data_tools import ffcv_check
from data_tools.convert import convert
from data_tools.ffcv_check import compare
from data_tools.leaks import FINGERPRINT, Ledger
from data_tools.split import make_split
from data_tools.verify import verify
from fastssl.errors import DataError
from fastssl.sources.beton import MODE_JPG, MODE_RAW, open_beton
from tests.data_tools.collections import idx_bytes, idx_folder, photo_folders, smooth


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
    file = folder / "splits" / "one.txt"
    head, first, rest = file.read_text().partition("[labeled]\n")
    row, line_end, others = rest.partition("\n")
    file.write_text(f"{head}{first}{int(row) + 1}{line_end}{others}")


def edit_manifest(folder):
    content = json.loads((folder / "dataset.json").read_text())
    content["digest"] = "0" * 64
    (folder / "dataset.json").write_text(json.dumps(content))


def other_rows(folder):
    shutil.copyfile(folder.parent / "other" / "rows.parquet", folder / "rows.parquet")


@pytest.mark.parametrize(
    "name, harm, expected",
    [
        ("grey-arrays", flip_pixel, ["test: 1 images are not the bytes that were written (rows 19)"]),
        ("photo-ffcv", spoil_jpeg, ["train: 1 images are not the bytes that were written (rows 3)"]),
        ("grey-arrays", swap_labels, ["train.labels.npy has changed", "labels of train differ"]),
        ("grey-ffcv", swap_labels, ["train.labels.npy has changed", "other labels"]),
        ("grey-arrays", edit_split, ["own digest"]),
        ("grey-arrays", edit_manifest, ["checksums do not belong"]),
        ("grey-arrays", lambda folder: (folder / "train.pixels.npy").unlink(), ["train.pixels.npy is missing"]),
        ("grey-arrays", other_rows, ["rows digest", "are not the bytes"]),
    ],
)
def test_damage_is_found(pristine, tmp_path, name, harm, expected):
    shutil.copytree(pristine / name, tmp_path / name)
    convert(idx_folder(tmp_path / "raw", seed=8), tmp_path / "other")
    harm(tmp_path / name)
    problems = verify(tmp_path / name).problems
    for text in expected:
        assert any(text in problem for problem in problems), problems


@pytest.mark.parametrize("format", ["arrays", "ffcv", "dali"])
def test_a_changed_byte_is_found_in_every_file(tmp_path, format):
    """Anywhere: in an image, a header, padding between images, a table.  Only spaces and a label split's header lines may differ."""
    raw = photo_folders(tmp_path / "raw")
    (raw / "train" / "cat" / "empty.jpg").write_bytes(b"")
    dataset = convert(raw, tmp_path / "data", format=format, max_side=40)
    assert verify(dataset).problems == [] and (dataset / "bad.parquet").is_file()
    draw, unnoticed = np.random.RandomState(0), []
    for file in sorted(path for path in dataset.iterdir() if path.is_file()):
        data = file.read_bytes()
        for place in {0, 60, 100, len(data) // 2, len(data) - 1, *draw.randint(0, len(data), 3).tolist()} - {i for i in range(60, 101) if i >= len(data)}:
            if file.name == "dataset.json" and not data[place : place + 1].strip():
                continue
            file.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
            try:
                if not verify(dataset).problems:
                    unnoticed.append((file.name, place))
            except DataError:
                pass
        file.write_bytes(data)
    assert unnoticed == [] and verify(dataset).problems == []


def test_edited_facts_are_found_and_older_manifests_without_a_digest_are_not_blamed(pristine, tmp_path):
    shutil.copytree(pristine / "grey-arrays", tmp_path / "data")
    file = tmp_path / "data" / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "mean": [0.25]}))
    assert verify(tmp_path / "data").problems == ["dataset.json has changed since it was written"]
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in ("tables", "manifest_digest")}, indent=3))
    assert verify(tmp_path / "data").problems == []


@pytest.mark.parametrize("format", ["ffcv", "dali"])
def test_images_that_were_broken_from_the_start_are_found_by_decoding(tmp_path, format):
    raw = photo_folders(tmp_path / "raw")
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    data = simplejpeg.encode_jpeg(noise, 90, "RGB", "444")
    # Its markers are in order, and no test image is decoded for mean and std: conversion keeps it.
    (raw / "test" / "dog" / "0.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    dataset = convert(raw, tmp_path / "data", format=format)
    assert verify(dataset, decode=False).problems == []
    assert verify(dataset, workers=2).problems == ["test: 1 images do not decode to the recorded size (rows 2)"]
    convert(raw, tmp_path / "deep", format=format, check="decode")
    assert pq.read_table(tmp_path / "deep" / "bad.parquet")["key"].to_pylist() == ["test/dog/0.jpg"]


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no"])
def test_unreadable_row_table(pristine, tmp_path, content):
    shutil.copytree(pristine / "grey-arrays", tmp_path / "data")
    (tmp_path / "data" / "rows.parquet").unlink()
    if content is not None:
        (tmp_path / "data" / "rows.parquet").write_bytes(content)
    with pytest.raises(DataError, match="rows.parquet"):
        verify(tmp_path / "data")


def without_ffcv(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_a_missing_ffcv_package_is_a_note(pristine, monkeypatch):
    without_ffcv(monkeypatch)
    found = verify(pristine / "photo-ffcv", ffcv=True)
    assert not found.problems and any("left out" in note and "not installed" in note for note in found.notes)
    assert not any("ffcv" in note for note in verify(pristine / "photo-arrays", ffcv=True).notes + verify(pristine / "photo-ffcv").notes)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package called ffcv that only this test and its children see."""

    def _stand_in(code: str) -> None:
        (tmp_path / "ffcv").mkdir()
        (tmp_path / "ffcv" / "__init__.py").write_text(code)
        (tmp_path / "ffcv" / "loader.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return _stand_in


def test_an_ffcv_package_that_cannot_be_imported_is_a_note(pristine, stand_in):
    stand_in("raise ImportError('libopencv_core.so: cannot open shared object file')")
    found = verify(pristine / "photo-ffcv", ffcv=True)
    assert not found.problems and any("left out" in note and "libopencv_core.so" in note for note in found.notes)


def test_a_crash_of_ffcv_is_a_problem(pristine, stand_in):
    stand_in("import os, sys; print('illegal instruction', file=sys.stderr, flush=True); os._exit(132)")
    assert any("132" in text and "illegal instruction" in text for text in verify(pristine / "photo-ffcv", ffcv=True).problems)


def test_agreement_is_a_note_and_difference_a_problem(pristine, monkeypatch):
    monkeypatch.setattr(data_tools.verify, "compare", lambda folder: (60, []))
    assert "FFCV's own loader agrees on 60 images" in verify(pristine / "grey-ffcv", ffcv=True).notes
    monkeypatch.setattr(data_tools.verify, "compare", lambda folder: (60, ["train: the first is row 5"]))
    found = verify(pristine / "grey-ffcv", ffcv=True)
    assert found.problems == ["train: the first is row 5"] and not any("agrees" in note for note in found.notes)


@pytest.mark.ffcv
def test_ffcv_names_the_first_row_that_differs_and_only_where_it_differs(pristine, tmp_path):
    """In a child process; JPEG and raw images of several sizes.  FFCV shows stale pixels for a damaged JPEG without a word."""
    pytest.importorskip("ffcv", reason="the ffcv package is not installed (make ffcv)")
    shutil.copytree(pristine / "photo-ffcv", tmp_path / "data")
    spoil_jpeg(tmp_path / "data")
    count, problems = compare(tmp_path / "data")
    assert count == 18 and len(problems) == 1
    assert problems[0].startswith("train: FFCV's own loader disagrees on 1 images; the first is row 3 (its JPEG cannot be decoded")


@pytest.mark.ffcv
def test_differing_pixels_and_labels_are_both_found(pristine, monkeypatch):
    pytest.importorskip("ffcv", reason="the ffcv package is not installed (make ffcv)")
    folder, real = pristine / "photo-ffcv", ffcv_check._ffcv_batches

    def harmed(file, batch):
        for pixels, labels in real(file, batch):
            pixels, labels = pixels.copy(), labels.copy()
            pixels[4, 0, 0] ^= 0x40  # stored as a JPEG
            pixels[5, 0, 0, 1] ^= 1  # stored as raw pixels: one level is too much
            labels[7] += 1
            yield pixels, labels

    assert open_beton(folder / "train.beton").mode_N[[4, 5]].tolist() == [MODE_JPG, MODE_RAW]
    monkeypatch.setattr(ffcv_check, "_ffcv_batches", harmed)
    count, problems = ffcv_check._compare_split(folder, "train", folder / "train.beton")
    assert count == 12 and "disagrees on 3 images; the first is row 4 (pixels differ by up to" in problems[0]


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


def photo(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["arrays", "ffcv", "dali"])
def test_equal_pixels_in_different_files_are_leaks(tmp_path, format):
    raw = photo_folders(tmp_path / "raw")
    pixels = smooth(20, 30, 99)
    (raw / "train" / "cat" / "new.png").write_bytes(photo(pixels, format="PNG", compress_level=0))
    (raw / "test" / "dog" / "new.bmp").write_bytes(photo(pixels, format="BMP"))
    (raw / "test" / "emu" / "turned.png").write_bytes(photo(np.ascontiguousarray(pixels.reshape(30, 20, 3)), format="PNG"))  # equal bytes, another shape
    data = convert(raw, tmp_path / "data", format=format)
    notes = verify(data, leaks=True, workers=3).notes
    assert "leaks: 1 test images also occur in another split" in notes
    assert "  train row 4 (label 0) = test row 4 (label 1)" in notes
    assert "leaks: 0 test images also occur in another split" in verify(data, leaks=True, decode=False).notes  # the files differ


def test_rows_without_a_class_agree_with_any_label():
    with Ledger(["train", "test"]) as ledger:
        ledger.add([(b"a" * 16, "train", 5, -1), (b"a" * 16, "train", 3, 1), (b"b" * 16, "train", 1, 0), (b"b" * 16, "train", 2, 1)])
        ledger.add([(b"a" * 16, "test", 0, 1), (b"c" * 15 + b"\0", "train", 9, 0), (b"c" * 15 + b"\1", "test", 9, 0)])
        ledger.add([])
        assert ledger.report() == [
            "duplicates within test: 0 images repeat an earlier one; 0 groups disagree on the label",
            "duplicates within train: 2 images repeat an earlier one; 1 groups disagree on the label",
            "leaks: 1 test images also occur in another split",
            "  train row 3 (label 1) = train row 5 (no label) = test row 0 (label 1)",
        ]


def test_the_ledger_finds_what_a_dictionary_finds():
    random = np.random.RandomState(0)
    for size in (0, 1, 7, 3000):
        prints = [random.bytes(1) * 16 if random.rand() < 0.1 else random.bytes(16) for _ in range(size)]
        splits = random.choice(["train", "test"], size).tolist()
        expected: dict[bytes, list[int]] = {}
        for place, pixels in enumerate(prints):
            expected.setdefault(pixels, []).append(place)
        with Ledger(["train", "test"]) as ledger:
            for start in range(0, size, 100):
                ledger.add([(prints[i], splits[i], i, 0) for i in random.permutation(range(start, min(size, start + 100)))])
            found = [sorted(group["row"].tolist()) for group in ledger.groups()]
            folder = Path(ledger._folder.name)
            crossing = [group for group in expected.values() if len({splits[i] for i in group}) > 1]
            report = ledger.report()
        assert sorted(found) == sorted(group for group in expected.values() if len(group) > 1)
        assert f"leaks: {sum(splits[i] == 'test' for group in crossing for i in group)} test images also occur in another split" in report
        assert not folder.exists()
        if len(crossing) > 5:
            assert report[-1] == f"  ... and {len(crossing) - 5} more groups" and len(report) == 9
            first = min(min(i for i in group if splits[i] == "train") for group in crossing)
            assert report[3].startswith(f"  train row {first} ")


def test_a_million_images_take_little_memory():
    tracemalloc.start()
    with Ledger(["train"]) as ledger:
        table = np.zeros(50_000, FINGERPRINT)
        for part in range(20):
            ids = np.arange(50_000, dtype=np.uint64) + part * 50_000 - (part == 19)  # the last part repeats one image of the part before
            table["pixels"] = (ids * np.uint64(0x9E3779B97F4A7C15)).view("V8").astype("V16")
            table["row"] = ids
            bucket = table["pixels"].copy().view(np.uint8).reshape(-1, 16)[:, 0] % len(ledger._files)
            for number in range(len(ledger._files)):
                ledger._files[number].write(table[bucket == number].tobytes())
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        assert ledger.report()[0] == "duplicates within train: 1 images repeat an earlier one; 0 groups disagree on the label"
        peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 10e6  # all of them would be 33 MB
