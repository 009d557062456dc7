"""``list``: what is known, and what is already there."""

from data_tools.cli import main
from data_tools.convert import convert
from data_tools.known import KNOWN
from data_tools.split import make_split
from fastssl.sources import load_manifest
from tests.data_tools.collections import idx_folder, photo_folders


def test_every_known_dataset_with_its_home_terms_and_way(tmp_path, capsys):
    assert main(["list", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for known in KNOWN.values():
        assert f"  {known.name}: {known.title}\n" in out and known.licence in out
        assert (f"fastssl-data fetch {known.name} DEST" in out) == known.fetchable
        assert known.home in out
    assert "none; make one with" in out and "converted:" not in out


def test_what_is_converted_is_shown_with_format_digest_and_splits(tmp_path, capsys):
    raw = photo_folders(tmp_path / "raw")
    folders = {form: convert(raw, tmp_path / "deep" / "er" / form, format=form, name="pets" if form == "dali" else "x") for form in ("arrays", "ffcv", "dali")}
    make_split(folders["ffcv"], "b", law="balanced", per_class=1)
    (folders["ffcv"] / "splits" / "a.json").write_text("{}")
    convert(idx_folder(tmp_path / "idx"), tmp_path / "unfinished.tmp-x")
    assert main(["list", str(tmp_path), str(tmp_path / "deep")]) == 0
    out = capsys.readouterr().out
    for form, folder in folders.items():
        line = next(line for line in out.splitlines() if line.startswith(f"  {folder}: "))
        assert f", {form}, 12 training images, 6 test images, digest {load_manifest(folder).digest[:16]}" in line
        assert line.endswith("label splits: a, b" if form == "ffcv" else "label splits: none")
    assert out.count(f"  {folders['arrays']}: ") == 1 and "tmp-x" not in out
    assert f"converted: {folders['dali']}\n" in out and out.count("converted:") == 1


def test_damaged_folders_do_not_stop_the_list(tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "dataset.json").write_text("{}")
    assert main(["list", str(tmp_path)]) == 0
    assert "bad: unusable" in capsys.readouterr().out
    assert main(["list", str(tmp_path / "none")]) == 2
    assert "not a folder" in capsys.readouterr().err
