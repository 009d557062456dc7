"""Damaged and missing source files: one clear error each, and nothing is written."""

import json
import os
import pickle
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.collection import BadImage, SourceChanged
from data_tools.convert import convert
from data_tools.readers import open_raw
from fastssl.errors import DataError
from tests.data_tools import layouts_arrays as arrays
from tests.data_tools import layouts_files as files
from tests.data_tools import layouts_transfer as transfer
from tests.data_tools.layouts import jpeg, put


def cut(file, keep=-5):
    file.write_bytes(file.read_bytes()[:keep])


def lines(file, change):
    """Apply ``change`` to the list of a file's lines."""
    found = file.read_text().splitlines()
    change(found)
    file.write_text("\n".join(found) + "\n")


def second(line):
    return lambda found: found.__setitem__(1, line)


def drop(found):
    del found[-1]


def rewrite(file, change):
    content = pickle.loads(file.read_bytes())
    change(content)
    file.write_bytes(pickle.dumps(content))


# (builder, file, what happens to it, part of the message); None = it is removed
CASES = [
    (arrays.cifar_binary, "cifar-10-batches-bin/data_batch_3.bin", cut, "missing or truncated"),
    (arrays.cifar_binary, "cifar-10-batches-bin/data_batch_3.bin", None, "missing or truncated"),
    (arrays.cifar_binary, "cifar-10-batches-bin/batches.meta.txt", None, "missing or cannot be read"),
    (arrays.cifar_batches, "cifar-10-batches-py/data_batch_3", cut, "damaged"),
    (arrays.stl10, "stl10_binary/train_X.bin", cut, "no whole number of 96x96"),
    (arrays.stl10, "stl10_binary/test_y.bin", cut, "10 labels from 1 are needed"),
    (arrays.stl10, "stl10_binary/unlabeled_X.bin", None, "cannot be read"),
    (arrays.stl10, "stl10_binary/fold_indices.txt", lambda file: lines(file, second("0 12")), "fold 1 names rows outside 0..11"),
    (arrays.stl10, "stl10_binary/fold_indices.txt", lambda file: lines(file, second("0 x")), "whole number should stand"),
    (arrays.svhn, "train_32x32.mat", lambda file: cut(file, 2000), "damaged or no MATLAB file"),
    (arrays.svhn, "test_32x32.mat", None, "is missing"),
    (arrays.svhn, "extra_32x32.mat", lambda file: file.write_bytes(b"not there"), "damaged or no MATLAB file"),
    (arrays.small_imagenet, "train_data_batch_1", cut, "damaged"),
    (arrays.small_imagenet, "val_data", None, "missing"),
    (arrays.small_imagenet, "map_clsloc.txt", lambda file: lines(file, drop), "names 999 classes"),
    (arrays.small_imagenet, "train_data_batch_2", lambda file: os.rename(file, f"{file}9"), "lacks train_data_batch_2"),
    (arrays.small_imagenet, "val_data", lambda file: rewrite(file, lambda batch: batch["labels"].__setitem__(3, 0)), "labels 0..1000"),
    (arrays.small_imagenet, "val_data", lambda file: rewrite(file, lambda batch: batch["labels"].pop()), "999 labels"),
    (arrays.small_imagenet, "val_data", lambda file: file.write_bytes(pickle.dumps([1, 2])), "no batch of downsampled ImageNet"),
    (files.flat, "../raw-labels.csv", lambda file: lines(file, second("gone.jpg,no")), "1 are not below"),
    (files.flat, "../raw-labels.csv", lambda file: lines(file, second("alone")), "should be a path and a label"),
    (files.flat, "../raw-test.txt", lambda file: lines(file, second("e.jpg perhaps")), "'perhaps'"),
    (files.webdataset, "train-000001.tar", lambda file: cut(file, 3000), "is truncated"),
    (files.webdataset, "train-000001.tar", lambda file: cut(file, 512 * 9), "is truncated"),
    (files.webdataset, "train-000001.tar", lambda file: file.write_bytes(b"<html>gone</html>" * 99), "no tar archive"),
    (files.imagenet, "ILSVRC2012_img_train.tar", lambda file: cut(file, 9000), "is truncated"),
    (files.imagenet, "ILSVRC2012_img_val.tar", lambda file: cut(file, 600), "is truncated"),
    (files.imagenet, "ILSVRC2012_img_val.tar", None, "--option val=no"),
    (files.imagenet, "imagenet_2012_validation_synset_labels.txt", None, "--option val_labels=FILE"),
    (files.imagenet, "imagenet_2012_validation_synset_labels.txt", lambda file: lines(file, drop), "only 4 validation labels"),
    (files.imagenet, "imagenet_2012_validation_synset_labels.txt", lambda file: lines(file, second("n1")), "which the training images lack"),
    (files.hf_saved, "train/data-00001-of-00002.arrow", lambda file: cut(file, 900), "truncated or damaged"),
    (files.hf_saved, "train/data-00001-of-00002.arrow", None, "missing"),
    (files.hf_saved, "test/state.json", None, "missing or damaged"),
    (files.hf_saved, "test/state.json", lambda file: file.write_text('{"_data_files": []}'), "names no data files"),
    (files.hf_saved, "test/state.json", lambda file: file.write_text('{"_indices_data_files": [1]}'), "flatten_indices"),
    (files.hf_parquet, "data/train-00001-of-00002.parquet", cut, "truncated or damaged"),
    (transfer.food101, "food-101/images/beef/1004.jpg", None, "'images/beef/1004.jpg'"),
    (transfer.food101, "food-101/meta/test.txt", lambda file: lines(file, second("soup/1004")), "class 'soup'"),
    (transfer.cub200, "CUB_200_2011/images.txt", lambda file: lines(file, second("2 gone/a.jpg")), "'images/gone/a.jpg'"),
    (transfer.cub200, "CUB_200_2011/image_class_labels.txt", lambda file: lines(file, second("2 9")), "disagree at image 2"),
    (transfer.cub200, "CUB_200_2011/train_test_split.txt", lambda file: lines(file, drop), "differ in length"),
    (transfer.aircraft, "fgvc-aircraft-2013b/data/images_variant_test.txt", None, "missing or cannot be read"),
    (transfer.aircraft, "fgvc-aircraft-2013b/data/images_variant_test.txt", lambda file: lines(file, second("0000002")), "should have 2 fields"),
    (transfer.cars, "stanford_cars/cars_test_annos_withlabels.mat", None, "lacks cars_test_annos_withlabels.mat"),
    (transfer.cars, "stanford_cars/devkit/cars_meta.mat", lambda file: cut(file, 160), "damaged or no MATLAB file"),
    (transfer.sun397, "Partitions/Training_01.txt", None, "lacks the partitions"),
    (transfer.sun397, "Partitions/Testing_01.txt", lambda file: lines(file, second("/b/bar/sun_1.jpg")), "class 'b/bar'"),
    (transfer.dtd, "dtd/dtd/labels/test1.txt", None, "missing or cannot be read"),
    (transfer.pets, "oxford-iiit-pet/annotations/trainval.txt", lambda file: lines(file, second("Abyssinian_1 2 1 1")), "gives 'american_bulldog"),
    (transfer.pets, "oxford-iiit-pet/annotations/test.txt", lambda file: lines(file, second("Abyssinian_1 one 1 1")), "whole number should stand"),
    (transfer.flowers102, "flowers-102/setid.mat", lambda file: cut(file, 150), "MATLAB file|lacks the variable"),
    (transfer.flowers102, "flowers-102/jpg/image_00002.jpg", None, "'jpg/image_00002.jpg'"),
    (transfer.image_lists, "image_list/train_100.txt", lambda file: lines(file, second("images/wolf/x.jpg")), "a path, a blank and a label|whole number"),
    (transfer.image_lists, "image_list/train_100.txt", lambda file: lines(file, second("images/wolf/x.jpg -1")), "a list of their own"),
    (transfer.image_lists, "image_list/test.txt", lambda file: lines(file, second("images/wolf/x.jpg 1")), "'images/wolf/x.jpg'"),
]  # fmt: skip


@pytest.mark.parametrize("build, name, damage, match", CASES, ids=[f"{case[0].__name__}-{i}" for i, case in enumerate(CASES)])
def test_one_clear_error(tmp_path, build, name, damage, match):
    layout = build(tmp_path / "raw")
    file = (tmp_path / "raw" / name).resolve()
    assert file.is_file()
    before = {entry.name for entry in tmp_path.iterdir()}
    if damage is None:
        file.unlink()
    else:
        damage(file)
    with pytest.raises(DataError, match=match) as found:
        convert(layout.source, tmp_path / "data", options=layout.options)
    assert "\n" not in str(found.value) and len(str(found.value)) < 600
    assert {entry.name for entry in tmp_path.iterdir()} - before == set()


def test_without_scipy_the_message_names_it(tmp_path, monkeypatch):
    layout = arrays.svhn(tmp_path / "raw")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match="pip install scipy"):
        open_raw(layout.source)


@pytest.mark.parametrize("ending", ["tar.gz", "tar.xz", "tgz"])
def test_compressed_archives_are_named(tmp_path, ending):
    file = tmp_path / f"train.{ending}"
    with tarfile.open(file, "w:xz" if ending.endswith("xz") else "w:gz") as archive:
        files.add(archive, "a.jpg", jpeg(1))
    with pytest.raises(DataError, match="decompress it"):
        open_raw(file)
    file.rename(tmp_path / "train.tar")
    with pytest.raises(DataError, match="compressed"):
        open_raw(tmp_path / "train.tar")


@pytest.mark.parametrize(
    "members, options, match",
    [
        ({"a.jpg": b"", "b.jpg": b""}, {}, "neither .cls nor .json"),
        ({"a.jpg": b"", "a.txt": b"cat"}, {}, "label=txt"),
        ({"a.jpg": b"", "a.png": b"", "a.cls": b"0"}, {}, "has 2 images"),
        ({"a.cls": b"0"}, {}, "has 0 images"),
        ({"readme.md": b"hello"}, {}, "holds no images"),
        ({"a.jpg": b"", "a.json": b"{"}, {}, "cannot be read as a label"),
        ({"a.jpg": b"", "a.json": b'{"caption": 1}'}, {}, "has no field label or cls"),
        ({"a.jpg": b"", "a.json": b'{"caption": 1}'}, {"label": "json:species"}, "has no field species"),
        ({"a.jpg": b"", "a.cls": b"cat"}, {"label": "clss"}, "did you mean 'cls'"),
        ({"a.jpg": b"", "a.cls": b"cat", "b.jpg": b"", "b.cls": b"3"}, {}, "some labels are names and some are numbers"),
    ],
)
def test_shards_that_leave_questions(tmp_path, members, options, match):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, data in members.items():
            files.add(archive, name, data)
    with pytest.raises(DataError, match=match):
        open_raw(tmp_path / "train.tar", options=options)


def test_class_map_of_an_archive_must_fit(tmp_path):
    layout = files.webdataset(tmp_path / "raw", labels="txt")
    put(tmp_path / "names.txt", "cat\ndog\n")
    with pytest.raises(DataError, match="'emu', which the class map lacks"):
        open_raw(layout.source, options={**layout.options, "classes": str(tmp_path / "names.txt")})
    numbered = files.webdataset(tmp_path / "numbers")
    with pytest.raises(DataError, match="wrong class count"):
        convert(numbered.source, tmp_path / "data", options={**numbered.options, "classes": str(tmp_path / "names.txt")})


def test_a_source_that_goes_away_stops_and_a_bad_row_does_not(tmp_path):
    layout = files.webdataset(tmp_path / "raw")
    split = open_raw(layout.source, options=layout.options).splits["train"]
    cut(tmp_path / "raw" / "train-000001.tar", 700)
    with pytest.raises(SourceChanged, match="shorter"):
        split.read(split.count - 1)
    (tmp_path / "raw" / "train-000001.tar").unlink()
    with pytest.raises(SourceChanged, match="cannot be read any more"):
        split.read(split.count - 1)

    schema = pa.schema([("image", files.IMAGE), ("label", pa.int64())])
    values = [{"bytes": jpeg(1), "path": None}, {"bytes": None, "path": "a.jpg"}, None]
    pq.write_table(pa.table({"image": pa.array(values, files.IMAGE), "label": [0, 1, None]}, schema=schema), tmp_path / "train.parquet")
    split = open_raw(tmp_path / "train.parquet").splits["train"]
    assert split.labels.tolist() == [0, 1, -1] and split.read(0) == jpeg(1)
    for row, match in ((1, "only a path"), (2, "null")):
        with pytest.raises(BadImage, match=match):
            split.read(row)


def test_a_table_that_goes_away_stops(tmp_path):
    split = open_raw(files.hf_parquet(tmp_path / "raw").source).splits["train"]
    assert split.read(0) == jpeg(20)
    (tmp_path / "raw" / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(SourceChanged, match="cannot be read any more"):
        split.read(5)


@pytest.mark.parametrize(
    "columns, options, match",
    [
        ({"a": pa.array([b"1"]), "b": pa.array([b"2"]), "label": pa.array([1])}, {}, "which column holds the images"),
        ({"image": pa.array([b"1"]), "kind": pa.array([1])}, {}, "which column holds the labels"),
        ({"image": pa.array([b"1"]), "kind": pa.array([1])}, {"label": "kinds"}, "did you mean 'kind'"),
        ({"image": pa.array([b"1"]), "label": pa.array([1.5])}, {}, "not whole numbers or strings"),
        ({"image": pa.array([b"1"]), "label": pa.array([1])}, {"image": "imagee"}, "did you mean 'image'"),
    ],
)
def test_tables_that_leave_questions(tmp_path, columns, options, match):
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=match):
        open_raw(tmp_path, options=options)


def test_a_converted_dataset_is_no_source(tmp_path):
    dataset = convert(arrays.idx(tmp_path / "raw").source, tmp_path / "data")
    with pytest.raises(DataError, match="no known kind"):
        open_raw(dataset)


def test_row_groups_beyond_memory_are_refused(tmp_path, monkeypatch):
    from data_tools.readers import columns

    layout = files.hf_parquet(tmp_path / "raw")
    monkeypatch.setattr(columns, "_LARGEST_GROUP", 500)
    with pytest.raises(DataError, match="fewer rows per row group"):
        open_raw(layout.source)


def test_pickles_that_run_code_are_refused(tmp_path):
    layout = arrays.small_imagenet(tmp_path / "raw")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    (tmp_path / "raw" / "val_data").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(DataError, match="damaged"):
        open_raw(layout.source)
    assert not (tmp_path / "harm").exists()


def test_json_of_a_saved_dataset_must_be_an_object(tmp_path):
    layout = files.hf_saved(tmp_path / "raw")
    (tmp_path / "raw" / "train" / "state.json").write_text(json.dumps([1]))
    with pytest.raises(DataError, match="JSON object"):
        open_raw(layout.source)
