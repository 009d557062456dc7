"""Lists of others: every form in, every form out, and which published list is which."""

import hashlib

import numpy as np
import pytest

import data_tools.split_lists
from data_tools.cli import main
from data_tools.convert import convert
from data_tools.split import import_split, make_split
from data_tools.split_lists import NAMED, Listed, NamedList, check_named, read_list, recognise
from data_tools.split_rows import export_rows, source_places
from fastssl.errors import DataError
from fastssl.sources import load_labels, load_manifest, load_split
from tests.data_tools.collections import photo_folders


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Keys train/cat/cat_3.png ...; the third image of the source is no image and is left out."""
    root = tmp_path_factory.mktemp("lists")
    raw = photo_folders(root / "raw")
    for file in sorted(raw.rglob("*.*")):
        file.rename(file.with_name(f"{file.parent.name}_{file.name}"))
    (raw / "train" / "cat" / "cat_2.jpg").write_bytes(b"no image")
    return convert(raw, root / "data", format="ffcv")


@pytest.fixture
def dataset(pristine):
    yield pristine
    for file in (pristine / "splits").iterdir():
        file.unlink()


NAMES = ["emu_3.jpg", "cat_0.jpg", "dog_1.png"]  # rows 10, 0, 4
ROWS = [10, 0, 4]
PLACES = [11, 0, 5]  # in the source, where the bad image is the third


def written(tmp_path, form):
    file = tmp_path / f"list{ {'csv': '.csv', 'npy': '.npy'}.get(form, '.txt') }"
    if form == "npy":
        np.save(file, np.array(PLACES))
    else:
        text = {
            "names": "\n".join(NAMES),
            "windows": "\ufeff" + "\r\n".join(NAMES) + "\r\n\r\n",
            "folders": "emu/emu_3.jpg\n./train/cat/cat_0.jpg\ndog\\dog_1.png\n",
            "paths": "emu/emu_3.jpg 2\ncat/cat_0.jpg 0\ndog/dog_1.png 1\n",
            "tabs": "emu_3.jpg\t2\ncat_0.jpg\t0\ndog_1.png\t1\n",
            "csv": "Class,Index\n2,11\n0,0\n1,5\n",
            "index": "11\n0\n5\n",
        }[form]
        file.write_bytes(text.encode())
    return file


@pytest.mark.parametrize("form", ["names", "windows", "folders", "paths", "tabs", "csv", "npy", "index"])
def test_every_form_gives_the_same_rows_in_the_lists_order(dataset, tmp_path, form):
    made, remarks = import_split(dataset, written(tmp_path, form), name="a")
    assert made.labeled.tolist() == ROWS and remarks == []
    assert made.unlabeled.tolist() == sorted(set(range(11)) - set(ROWS)) and made.law == "list"
    assert import_split(dataset, written(tmp_path, form), name="b", sort=True)[0].labeled.tolist() == sorted(ROWS)


def test_names_as_an_array(dataset, tmp_path):
    for array in (np.array(NAMES), np.array([name.encode() for name in NAMES])):
        np.save(tmp_path / "a.npy", array)
        assert import_split(dataset, tmp_path / "a.npy", name="a", force=True)[0].labeled.tolist() == ROWS


@pytest.mark.parametrize("form", ["names", "paths", "csv", "npy", "index"])
@pytest.mark.parametrize("side", ["labeled", "unlabeled", "validation"])
def test_what_is_exported_is_imported_again(dataset, tmp_path, form, side):
    made = make_split(dataset, "a", law="balanced", per_class=1, seed=3, validation=3)
    out = tmp_path / f"out{ {'csv': '.csv', 'npy': '.npy'}.get(form, '.txt') }"
    assert main(["split", "export", str(dataset), "a", str(out), "--form", form, "--side", side]) == 0
    again, _ = import_split(dataset, out, name="b")
    assert np.array_equal(again.labeled, getattr(made, side))


def test_exports_are_what_other_code_reads(dataset, tmp_path):
    import_split(dataset, written(tmp_path, "names"), name="a")
    split, manifest = load_split(load_manifest(dataset), "a"), load_manifest(dataset)
    wanted = {
        "names": "emu_3.jpg\ncat_0.jpg\ndog_1.png\n",
        "paths": "train/emu/emu_3.jpg 2\ntrain/cat/cat_0.jpg 0\ntrain/dog/dog_1.png 1\n",
        "csv": "Index\n11\n0\n5\n",
        "index": "11\n0\n5\n",
    }
    for form, text in wanted.items():
        assert export_rows(manifest, split, tmp_path / form, form=form) == 3 and (tmp_path / form).read_text() == text
    export_rows(manifest, split, tmp_path / "npy", form="npy")
    assert np.load(tmp_path / "npy").tolist() == PLACES and np.load(tmp_path / "npy").dtype == np.int64


def test_places_count_the_images_that_were_left_out(dataset):
    manifest = load_manifest(dataset)
    assert source_places(manifest, "train").tolist() == [0, 1, *range(3, 12)]
    assert source_places(manifest, "test").tolist() == list(range(6))


@pytest.mark.parametrize(
    "text, options, match",
    [
        ("emu_3.jpg\nwolf.jpg\n", {}, "1 of 2 images that train of .* does not have .'wolf.jpg'"),
        ("cat_2.jpg\n", {}, "bad.parquet"),
        ("wolf.jpg\n", {"skip_missing": True}, "does not have"),
        ("2\n", {}, "does not have .2"),
        ("12\n", {}, "does not have"),
        ("emu_3.jpg\nemu_3.jpg\n", {}, "only 1 different"),
        ("5\n5\n", {}, "only 1 different"),
        ("emu_3.jpg 1\n", {}, "label 1, the dataset says 2 .emu., 1 differ"),
        ("dog/emu_3.jpg\n", {}, "does not have"),
        ("", {}, "is empty"),
        ("emu_3.jpg\n", {"form": "csv"}, "Index"),
        ("emu_3.jpg\n", {"form": "npy"}, "cannot be read as npy"),
        ("emu_3.jpg\n", {"form": "index"}, "cannot be read as index"),
        ("emu_3.jpg\n", {"form": "xls"}, "unknown form"),
        ("emu_3.jpg\n", {"known_as": "simclr-1pct"}, "1000 classes, the dataset has 3"),
        ("emu_3.jpg\n", {"known_as": "simclr-1pct", "skip_missing": True}, "another list"),
        ("emu_3.jpg\n", {"known_as": "simclr"}, "did you mean 'simclr-1pct'"),
    ],
)
def test_wrong_lists_leave_no_split(dataset, tmp_path, text, options, match):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=match):
        import_split(dataset, tmp_path / "a.txt", name="a", **options)
    assert not list((dataset / "splits").iterdir())


def test_a_missing_file_and_a_pickle_are_refused(dataset, tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_list(tmp_path / "none.txt")
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as npy"):
        read_list(tmp_path / "a.npy")


def test_base_names_that_occur_twice_need_their_folder(tmp_path):
    data = convert(photo_folders(tmp_path / "raw"), tmp_path / "data", format="ffcv")  # 0.jpg in every class
    (tmp_path / "a.txt").write_text("0.jpg\n")
    with pytest.raises(DataError, match="fits several images .*folders"):
        import_split(data, tmp_path / "a.txt", name="a")
    (tmp_path / "a.txt").write_text("dog/0.jpg\n")
    assert import_split(data, tmp_path / "a.txt", name="a")[0].labeled.tolist() == [4]
    with pytest.raises(DataError, match="--form paths"):
        export_rows(load_manifest(data), load_split(load_manifest(data), "a"), tmp_path / "out", form="names")


def test_skipping_what_is_missing_is_said(dataset, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("emu_3.jpg\nwolf.jpg\n")
    assert main(["split", "import", str(dataset), str(tmp_path / "a.txt"), "--name", "a", "--skip-missing"]) == 0
    assert "skipped 1 images" in capsys.readouterr().out and load_split(load_manifest(dataset), "a").labeled.tolist() == [10]


def test_validation_is_held_out_of_the_rest(dataset, tmp_path):
    made, _ = import_split(dataset, written(tmp_path, "names"), name="a", validation=3, seed=2)
    assert len(made.validation) == 3 and not set(made.validation.tolist()) & set(ROWS)
    assert np.bincount(load_labels(load_manifest(dataset))[made.validation]).tolist() == [1, 1, 1]


@pytest.fixture
def small_lists(monkeypatch):
    """Published lists of a world with three classes: ``one`` has a published digest, ``two`` and ``three`` are of one size."""
    text = "\n".join(NAMES) + "\n"
    lists = {
        "one": NamedList(3, (1, 1), "One's list", hashlib.sha256(text.encode()).hexdigest(), classes=3),
        "two": NamedList(3, (1, 1), "Two's list", classes=3),
        "three": NamedList(3, (1, 1), "Three's list", classes=3),
        "six": NamedList(6, (2, 2), "Six's list", classes=3),
    }
    monkeypatch.setattr(data_tools.split_lists, "NAMED", lists)
    monkeypatch.setattr("data_tools.split.NAMED", lists)


@pytest.mark.parametrize("form", ["names", "paths"])
def test_a_published_digest_decides_whatever_the_form(dataset, tmp_path, small_lists, form):
    _, remarks = import_split(dataset, written(tmp_path, form), name="a")
    assert remarks == ["this is one (One's list)"]
    made, remarks = import_split(dataset, written(tmp_path, form), known_as="one")
    assert remarks == [] and made.name == "one" and (dataset / "splits" / "one.txt").read_text().count('"list": "one"') == 1


def test_other_images_of_the_right_number_are_not_the_published_list(dataset, tmp_path, small_lists):
    file = tmp_path / "other.txt"
    file.write_text("emu_2.jpg\ncat_0.jpg\ndog_1.png\n")
    with pytest.raises(DataError, match="not one .One's list.: its names are not those of the published file.*may be two or three"):
        import_split(dataset, file, known_as="one")
    with pytest.raises(DataError, match="not six .*3 images, that list has 6"):
        import_split(dataset, file, known_as="six")
    _, remarks = import_split(dataset, file, known_as="two")
    assert "no digest of that list is published" in remarks[0]
    _, remarks = import_split(dataset, file, name="a")
    assert remarks == ["by number and classes this may be two (Two's list) or three (Three's list)"]


def spread(total):
    """Images per class of a balanced list of 1000 classes."""
    return total // 1000 + (np.arange(1000) < total % 1000)


def listed(total):
    return Listed("x", "index", None, np.arange(total), None, "0")


@pytest.mark.parametrize("name", sorted(NAMED))
def test_the_published_imagenet_lists_are_told_apart_by_size(name):
    known = NAMED[name]
    like_it = [other for other in NAMED if NAMED[other].count == known.count and not NAMED[other].sha256]
    assert recognise(listed(known.count), spread(known.count)) == like_it
    if known.sha256:
        with pytest.raises(DataError, match="sha256"):
            check_named(name, listed(known.count), spread(known.count))
    else:
        check_named(name, listed(known.count), spread(known.count))


def test_a_list_of_another_size_or_balance_is_refused_and_its_name_offered():
    with pytest.raises(DataError, match="12811 images, that list has 13000; it may be simmatchv2-1pct"):
        check_named("simmatch-1pct", listed(12811), spread(12811))
    lopsided = spread(13000)
    lopsided[:100], lopsided[100:200] = 26, 0
    with pytest.raises(DataError, match=r"0\.\.26 images per class, that list has 13\.\.13; no list known"):
        check_named("simmatch-1pct", listed(13000), lopsided)
    assert recognise(listed(13000), spread(13000)[:10]) == []


def test_import_needs_some_name(dataset, tmp_path, capsys):
    assert main(["split", "import", str(dataset), str(written(tmp_path, "names"))]) == 2
    assert "--name" in capsys.readouterr().err
