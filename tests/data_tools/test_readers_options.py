"""Settings of the readers, official folds, ImageNet-127, class maps, and images without labels through splits and training."""

import json

import numpy as np
import pytest

from data_tools.cli import main
from data_tools.convert import convert
from data_tools.longtail import balanced_test
from data_tools.readers import open_raw
from data_tools.readers.class_maps import class_names, superclasses
from data_tools.split import make_split
from fastssl.errors import DataError
from fastssl.sources import load_labels, load_manifest
from fastssl.sources.manifest import load_split
from tests.data_tools import layouts_arrays as arrays
from tests.data_tools import layouts_files as files
from tests.data_tools import layouts_transfer as transfer
from tests.data_tools.layouts import jpeg, pixels, put


def matches(layout, kind="auto"):
    raw = open_raw(layout.source, kind=kind, options=layout.options)
    assert raw.kind == layout.kind and raw.classes == layout.classes and set(raw.splits) == set(layout.splits)
    for name, (images, labels) in layout.splits.items():
        split = raw.splits[name]
        assert np.asarray(split.labels).tolist() == labels
        for row, image in enumerate(images):
            found = split.read(row)
            assert np.array_equal(found, image) if isinstance(image, np.ndarray) else found == image, (name, row)
    return raw


@pytest.mark.parametrize(
    "build, options",
    [
        (arrays.cifar100_binary, {"labels": "fine"}),
        (arrays.stl10, {"unlabeled": "no"}),
        (arrays.svhn, {"extra": "no"}),
        (arrays.svhn, {"extra": "train"}),
        (arrays.small_imagenet, {"names": False, "protocol": 2}),
        (transfer.dtd, {"validation": "train"}),
        (transfer.dtd, {"validation": "unlabeled"}),
        (transfer.flowers102, {"validation": "drop"}),
        (transfer.flowers102, {"validation": "train"}),
        (transfer.caltech101, {"background": "no"}),
        (files.webdataset, {"labels": "json"}),
        (files.webdataset, {"labels": "txt"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(map(str, value.values())),
)
def test_settings_choose_what_is_read(tmp_path, build, options):
    matches(build(tmp_path / "raw", **options))


def test_stl10_folds_become_label_splits(tmp_path):
    layout = arrays.stl10(tmp_path / "raw")
    manifest = load_manifest(convert(layout.source, tmp_path / "data"))
    first, second = load_split(manifest, "fold0"), load_split(manifest, "fold1")
    assert first.labeled.tolist() == list(range(10)) and second.labeled.tolist() == [11, 10, 9, 8, 7, 6, 5, 4, 2, 0]
    assert first.unlabeled.tolist() == [10, 11, *range(12, 19)] and first.law == "official"


def test_official_rows_move_with_images_that_were_left_out(tmp_path, monkeypatch):
    import data_tools.convert
    from data_tools.collection import Collection
    from data_tools.readers.class_folders import folder_split

    for i in range(5):
        put(tmp_path / "raw" / "a" / f"{i}.jpg", jpeg(i) if i != 1 else b"no image")
    split = folder_split(tmp_path / "raw", tmp_path / "raw", ("a",))
    raw = Collection("made", "made", ("a",), 3, {"train": split}, {"half": np.array([4, 1, 2])})
    monkeypatch.setattr(data_tools.convert, "open_raw", lambda source, **_: raw)
    manifest = load_manifest(convert(tmp_path / "raw", tmp_path / "data"))
    assert load_split(manifest, "half").labeled.tolist() == [3, 1]  # source rows 4 and 2; row 1 is bad


@pytest.mark.parametrize("form", ["numbers", "from 1", "names", "pairs", "json list", "json object"])
def test_imagenet127_is_made_as_published(tmp_path, form):
    layout = arrays.small_imagenet(tmp_path / "raw")
    group = np.minimum(np.arange(1000) % 127, (np.arange(1000) * 7) % 127)  # uneven
    group[:127] = np.arange(127)
    names = [f"node{i}" for i in group]
    content = {
        "numbers": "\n".join(map(str, group)),
        "from 1": "\n".join(str(i + 1) for i in group),
        "names": "\n".join(names),
        "pairs": "\n".join(f"{wnid} {i}" for wnid, i in reversed(list(zip(layout.classes, group, strict=True)))),
        "json list": json.dumps(group.tolist()),
        "json object": json.dumps(dict(zip(layout.classes, names, strict=True))),
    }[form]
    table = tmp_path / ("map.json" if "json" in form else "map.txt")
    table.write_text(content)
    raw = open_raw(layout.source, options={"class_map": str(table), "seed": "3"})
    train, val = group[layout.splits["train"][1]], group[layout.splits["test"][1]]
    labeled = np.array([round(0.1 * n) for n in np.bincount(train, minlength=127).tolist()])
    order = np.argsort(-labeled, kind="stable")  # old number of each new one
    assert np.array_equal(order[raw.splits["train"].labels], train)
    assert raw.classes == tuple((f"node{i}" if form in ("names", "json object") else f"superclass {i}") for i in order)
    rows = balanced_test(val, 127, 50, 3)
    test = raw.splits["test"]
    assert np.array_equal(order[test.labels], val[rows])
    for place in (0, 5, len(rows) - 1):
        assert np.array_equal(test.read(place), layout.splits["test"][0][rows[place]])
        assert np.array_equal(test.part(place, place + 1).read(0), test.read(place))
    whole = open_raw(layout.source, options={"class_map": str(table), "test": "all", "renumber": "no"})
    assert np.array_equal(whole.splits["train"].labels, train) and np.array_equal(whole.splits["test"].labels, val)


def test_imagenet127_goes_through_to_its_setting(tmp_path):
    layout = arrays.small_imagenet(tmp_path / "raw", batches=5)
    put(tmp_path / "map.txt", "\n".join(str(i % 127) for i in range(1000)))
    dataset = convert(layout.source, tmp_path / "data", options={"class_map": str(tmp_path / "map.txt")})
    made = make_split(dataset, "published", setting="imagenet127")
    counts = load_manifest(dataset).split("train").class_counts
    assert np.bincount(load_labels(load_manifest(dataset))[made.labeled], minlength=127).tolist() == [round(0.1 * n) for n in counts]
    assert counts[0] == max(counts)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "cat\ndog\n\nred fox\n", ("cat", "dog", "red fox")),
        ("a.txt", "cat 1\ndog 0\n", ("dog", "cat")),
        ("a.txt", "1 cat\n2 red fox\n", ("cat", "red fox")),
        ("a.csv", "cat,1\nred fox,0\n", ("red fox", "cat")),
        ("a.txt", "class 2\nclass 1\n", ("class 2", "class 1")),
        ("a.json", '["b", "a"]', ("b", "a")),
        ("a.json", '{"b": 0, "a": 1}', ("b", "a")),
        ("a.json", '{"1": "a", "0": "b"}', ("b", "a")),
    ],
)
def test_class_map_files(tmp_path, name, content, expected):
    put(tmp_path / name, content)
    assert class_names(tmp_path / name) == expected


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("a.txt", "\n", "names no class"),
        ("a.txt", "a\nb\na\n", "'a' twice"),
        ("a.json", '{"a": 0, "b": 2}', "each once"),
        ("a.json", "3", "neither"),
        ("a.json", "[", "cannot be read"),
        ("none.txt", None, "missing"),
    ],
)
def test_wrong_class_maps(tmp_path, name, content, match):
    if content is not None:
        put(tmp_path / name, content)
    with pytest.raises(DataError, match=match):
        class_names(tmp_path / name)


@pytest.mark.parametrize(
    "content, match",
    [("0\n1\n", "none for class 2"), ("0\n2\n2\n", "no class in number 1"), ("x 0\nb 1\nc 1", "'x'"), ("0\n1\n1\n1\n", "'3'")],
)
def test_wrong_superclass_maps(tmp_path, content, match):
    put(tmp_path / "map.txt", content)
    with pytest.raises(DataError, match=match):
        superclasses(tmp_path / "map.txt", ("a", "b", "c"))


def test_class_folders_follow_a_class_map_and_plain_trees_are_training_sets(tmp_path):
    layout = files.class_folders(tmp_path / "raw")
    put(tmp_path / "names.txt", "emu\nnewt\ncat\ndog\n")
    raw = open_raw(layout.source, options={"classes": str(tmp_path / "names.txt")})
    assert raw.classes == ("emu", "newt", "cat", "dog") and raw.splits["test"].labels.tolist() == [0, 0, 2, 2, 3, 3]
    put(tmp_path / "names.txt", "emu\ncat\n")
    with pytest.raises(DataError, match="lacks the class folder 'dog'"):
        open_raw(layout.source, options={"classes": str(tmp_path / "names.txt")})
    plain = open_raw(tmp_path / "raw" / "train")
    assert plain.kind == "class_tree" and set(plain.splits) == {"train"} and plain.splits["train"].labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    unlabelled = open_raw(tmp_path / "raw" / "train", kind="flat")
    assert unlabelled.classes == () and (unlabelled.splits["train"].labels == -1).all() and unlabelled.splits["train"].count == 9


def test_stray_archives_and_pictures_do_not_change_what_a_folder_is(tmp_path):
    layout = files.class_folders(tmp_path / "tree")
    put(tmp_path / "tree" / "download.tar", b"rest of a download")
    put(tmp_path / "tree" / "notes.parquet", b"")
    assert open_raw(layout.source).kind == "class_folders"
    hub = files.hf_parquet(tmp_path / "hub")
    put(tmp_path / "hub" / "assets" / "banner.png", jpeg(1))
    assert open_raw(hub.source).kind == "parquet"


def test_unlabelled_folder_converts_through_the_command_line(tmp_path, capsys):
    files.flat(tmp_path / "raw")
    assert main(["convert", str(tmp_path / "raw"), str(tmp_path / "data"), "--format", "ffcv"]) == 0
    manifest = load_manifest(tmp_path / "data")
    assert manifest.num_classes == 0 and manifest.split("train").unlabeled == manifest.split("train").count == 8
    assert main(["verify", str(tmp_path / "data"), "--no-ffcv"]) == 0
    labels = f"labels={tmp_path / 'raw-labels.csv'}"
    assert main(["convert", str(tmp_path / "raw"), str(tmp_path / "some"), "--kind", "flat", "--option", labels]) == 0
    assert load_manifest(tmp_path / "some").split("train").class_counts == (2, 2)
    assert main(["convert", str(tmp_path / "raw"), str(tmp_path / "no"), "--kind", "flat", "--option", "lables=x"]) == 2
    assert "did you mean 'labels'" in capsys.readouterr().err


def test_torchvision_by_name_says_what_is_missing(tmp_path):
    for source, options, match in (
        ("torchvision:STL1", {}, "did you mean 'STL10'"),
        ("torchvision:STL10", {}, "root=FOLDER"),
        ("torchvision:STL10", {"root": str(tmp_path)}, "download=yes"),
        ("torchvision:StanfordCars", {"root": str(tmp_path), "download": "yes"}, "cannot be downloaded"),
        ("torchvision:STL10", {"root": str(tmp_path), "download": "maybe"}, "it takes no, yes"),
        ("torchvision:EuroSAT", {"root": str(tmp_path)}, "cannot be opened"),
        ("torchvision:EuroSAT", {"root": str(tmp_path), "extra": "no"}, "no option 'extra'"),
    ):
        with pytest.raises(DataError, match=match):
            open_raw(source, options=options)
    layout = arrays.stl10(tmp_path / "raw")
    with pytest.raises(DataError, match="no option 'level'"):
        open_raw("torchvision:STL10", options={"root": layout.source, "level": "family"})


def test_torchvision_pixels_where_a_class_names_no_files(tmp_path, monkeypatch):
    from PIL import Image
    from torchvision import datasets

    class Made:
        def __init__(self, root, train=True):
            self.targets, self.classes = [0, 1, 1] if train else [1], ["no", "yes"]

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, row):
            return Image.new("L", (4, 3), 10 * row + len(self)), self.targets[row]

    monkeypatch.setattr(datasets, "Made", Made, raising=False)
    raw = open_raw("torchvision:Made", options={"root": str(tmp_path)})
    assert raw.classes == ("no", "yes") and raw.channels == 1 and raw.splits["train"].labels.tolist() == [0, 1, 1]
    assert raw.splits["train"].part(1, 3).read(1).tolist() == np.full((3, 4, 1), 23).tolist() and raw.splits["train"].part(1, 3).key(1) == "train/2"
    dataset = convert("torchvision:Made", tmp_path / "data", options={"root": str(tmp_path)})
    assert load_manifest(dataset).split("test").class_counts == (0, 1)


def test_small_imagenet_pixels_stay_in_their_files(tmp_path):
    raw = matches(arrays.small_imagenet(tmp_path / "raw"))
    for piece in (*raw.splits["train"].pieces, raw.splits["test"]):
        base = piece.pixels
        while not isinstance(base, np.memmap):
            base = base.base
        assert base.filename is not None


def test_labels_by_folder_in_archives(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for i, name in enumerate(("dog/a.jpg", "cat/b.jpg", "dog/c.jpg", "cat/.hidden.jpg", "notes.txt")):
            files.add(archive, name, jpeg(i))
    raw = open_raw(tmp_path / "all.tar", options={"label": "folder"})
    assert raw.classes == ("cat", "dog") and raw.splits["train"].labels.tolist() == [1, 0, 1]
    assert np.array_equal(pixels(raw.splits["train"].read(1)), pixels(jpeg(1))) and raw.splits["train"].key(0) == "all.tar/dog/a.jpg"
    assert open_raw(tmp_path / "all.tar", options={"label": "none"}).splits["train"].labels.tolist() == [-1] * 3
    put(tmp_path / "names.txt", "dog\nemu\ncat\n")
    mapped = open_raw(tmp_path / "all.tar", options={"label": "folder", "classes": str(tmp_path / "names.txt")})
    assert mapped.classes == ("dog", "emu", "cat") and mapped.splits["train"].labels.tolist() == [0, 2, 0]


@pytest.mark.parametrize("form", ["devkit", "packed devkit", "solution csv", "pairs", "val folder", "val tree"])
def test_imagenet_validation_labels_in_every_published_form(tmp_path, form):
    import io
    import tarfile

    from scipy.io import savemat

    layout, root = files.imagenet(tmp_path / "raw"), tmp_path / "raw"
    wnids, truth = layout.classes, [1, 0, 2, 0, 1]
    listed = root / "imagenet_2012_validation_synset_labels.txt"
    if "devkit" in form:
        listed.unlink()
        own = {wnids[0]: 3, wnids[1]: 1, wnids[2]: 2}  # the devkit numbers classes its own way, and numbers their parents too
        synsets = np.empty((4, 1), [(name, object) for name in ("ILSVRC2012_ID", "WNID", "num_children")])
        for i, (number, wnid, children) in enumerate([*((number, wnid, 0) for wnid, number in own.items()), (4, "n00001740", 3)]):
            synsets[i, 0]["ILSVRC2012_ID"], synsets[i, 0]["WNID"], synsets[i, 0]["num_children"] = number, wnid, children
        buffer = io.BytesIO()
        savemat(buffer, {"synsets": synsets})
        text = "".join(f"{own[wnids[label]]}\n" for label in truth).encode()
        inside = {"meta.mat": buffer.getvalue(), "ILSVRC2012_validation_ground_truth.txt": text}
        if form == "devkit":
            for name, data in inside.items():
                put(root / "ILSVRC2012_devkit_t12" / "data" / name, data)
        else:
            with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
                for name, data in inside.items():
                    files.add(archive, f"ILSVRC2012_devkit_t12/data/{name}", data)
    elif form == "solution csv":
        listed.unlink()
        lines = [f"ILSVRC2012_val_{i:08d},{wnids[label]} 1 2 3 4" for i, label in enumerate(truth, 1)]
        put(root / "LOC_val_solution.csv", "ImageId,PredictionString\n" + "\n".join(lines[::-1]) + "\n")
    elif form == "pairs":
        listed.write_text("".join(f"ILSVRC2012_val_{i:08d}.JPEG {wnids[label]}\n" for i, label in enumerate(truth, 1)))
    elif form.startswith("val"):
        (root / "ILSVRC2012_img_val.tar").unlink()
        for i, label in enumerate(truth, 1):
            put(root / "val" / (wnids[label] if form == "val tree" else "") / f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(50 + i))
    matches(layout)


def test_imagenet_unpacked_with_a_flat_validation_folder(tmp_path):
    layout, root = files.imagenet(tmp_path / "raw"), tmp_path / "raw"
    (root / "ILSVRC2012_img_train.tar").unlink()
    (root / "ILSVRC2012_img_val.tar").unlink()
    for i in range(9):
        put(root / "train" / layout.classes[i // 3] / f"{layout.classes[i // 3]}_{i % 3}.JPEG", layout.splits["train"][0][i])
    for i in range(1, 6):
        put(root / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(50 + i))
    matches(layout)


def test_splits_of_a_table_are_chosen_by_name(tmp_path):
    layout = files.hf_saved(tmp_path / "raw")
    raw = open_raw(layout.source, options={"train": "test", "test": "train", "unlabeled": "unsupervised"})
    assert raw.splits["train"].labels.tolist() == [2, 1, 0, -1, -1] and raw.splits["test"].count == 9
    with pytest.raises(DataError, match="did you mean 'train'"):
        open_raw(layout.source, options={"train": "trian"})
    hidden = open_raw(files.hf_parquet(tmp_path / "hub").source, options={"label": "none"})
    assert (hidden.splits["train"].labels == -1).all() and hidden.classes == ()
