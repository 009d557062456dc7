"""Sources with links that lead astray, destinations that must not be touched, and kills within the last renames."""

import os
import shutil
from pathlib import Path

import pytest

from data_tools import journal
from data_tools.cli import main
from data_tools.convert import convert
from data_tools.verify import verify
from fastssl.errors import DataError
from tests.data_tools.collections import photo_folders


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("target", [".", "..", "../../train"])
def test_a_link_into_its_own_path_is_an_error_and_no_copy_of_the_images(tmp_path, target):
    raw = photo_folders(tmp_path / "raw")
    (raw / "train" / "cat" / "loop").symlink_to(target)
    with pytest.raises(DataError, match="loop' is a link to a folder that it lies in"):
        convert(raw, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_links_to_other_folders_and_files_are_followed_and_one_to_nothing_is_an_error(tmp_path):
    raw = photo_folders(tmp_path / "raw")
    plain = contents(convert(raw, tmp_path / "plain"))
    shutil.move(raw / "train" / "cat", tmp_path / "elsewhere")
    (raw / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    assert contents(convert(raw, tmp_path / "linked")) == plain
    (tmp_path / "elsewhere" / "gone.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(DataError, match="gone.jpg' is a link to a file that is not there"):
        convert(raw, tmp_path / "broken")


def test_force_replaces_datasets_only(tmp_path):
    raw = photo_folders(tmp_path / "raw")
    (tmp_path / "home").mkdir()
    for place in (tmp_path / "home" / "letter", tmp_path / "file"):
        place.write_text("mine")
    for place in ("home", "file"):
        with pytest.raises(DataError, match="no dataset folder"):
            convert(raw, tmp_path / place, force=True)
    assert (tmp_path / "home" / "letter").read_text() == (tmp_path / "file").read_text() == "mine"


def test_destinations_without_a_name_or_inside_the_source(tmp_path, monkeypatch, capsys):
    raw = photo_folders(tmp_path / "raw")
    before = contents(raw)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (".", "..", "/", str(raw / "train" / "data"), "../raw/data"):
        assert main(["convert", str(raw), place]) == 2
        assert capsys.readouterr().err.count("error: ") == 1
    assert contents(raw) == before and not os.listdir(".")


@pytest.mark.parametrize("step", ["moved away", "replaced"])
def test_a_kill_within_the_last_renames_loses_nothing(tmp_path, monkeypatch, step):
    """Between moving the old dataset away and the new one in, and between that and removing what is left."""
    raw = photo_folders(tmp_path / "raw")
    data = convert(raw, tmp_path / "data", format="ffcv")
    whole = contents(data)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    real = os.replace
    with monkeypatch.context() as patch:
        if step == "replaced":
            patch.setattr(journal.shutil, "rmtree", killed)
        else:
            patch.setattr(journal.os, "replace", lambda old, new: killed() if Path(old).name == "out" else real(old, new))
        with pytest.raises(KeyboardInterrupt):
            convert(raw, data, format="ffcv", force=True)
    assert data.exists() == (step == "replaced")
    if step == "replaced":
        with pytest.raises(DataError, match="already exists"):
            convert(raw, data, format="ffcv")
    else:
        with pytest.raises(DataError, match="something else"):
            convert(raw, data, format="dali", force=True)
        assert contents(data) == whole  # it came back
    convert(raw, data, format="ffcv", force=True)
    assert contents(data) == whole and verify(data).problems == [] and sorted(os.listdir(tmp_path)) == ["data", "raw"]


def test_restart_after_such_a_kill_brings_the_old_dataset_back_first(tmp_path, monkeypatch):
    raw = photo_folders(tmp_path / "raw")
    data = convert(raw, tmp_path / "data", format="ffcv")
    whole, real = contents(data), os.replace

    def stop(old, new):
        if Path(old).name == "out":
            raise KeyboardInterrupt
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(raw, data, format="ffcv", force=True)
    shutil.rmtree(raw / "test")
    (raw / "train" / "cat" / "bad.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be converted"):
        convert(raw, data, format="ffcv", force=True, restart=True, strict=True)
    assert contents(data) == whole
