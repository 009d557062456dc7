"""The command line: the whole path from raw images to a sheet, exit codes, one-line errors, help with examples."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import build_parser, main
from tests.data_tools.collections import idx_folder, photo_folders

VERBS = ["fetch", "convert", "split", "verify", "inspect", "list"]


def test_whole_path(tmp_path, capsys):
    raw, data, sheet = photo_folders(tmp_path / "photos"), str(tmp_path / "data"), tmp_path / "out" / "sheet.png"
    assert main(["convert", str(raw), data, "--format", "ffcv", "--name", "pets"]) == 0
    assert main(["split", data, "--name", "six", "--law", "balanced", "--per-class", "2", "--seed", "1", "--validation", "3"]) == 0
    assert main(["verify", data, "--leaks", "--no-ffcv"]) == 0
    assert main(["inspect", data, "--sheet", str(sheet), "--per-class", "3"]) == 0
    assert main(["list", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "pets, ffcv, 12 train, 6 test, 3 classes" in text and "6 labelled, 3 unlabelled, 3 validation" in text
    assert "sound" in text and "4..4 per class" in text and f"{data}: pets, ffcv, 12 training images" in text and "label splits: six" in text
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (3 * 66, 120 + 3 * 66, 3) and (pixels != 255).any()


def test_sheet_of_labelled_rows_of_a_grey_dataset(tmp_path, capsys):
    data = str(tmp_path / "data")
    assert main(["convert", str(idx_folder(tmp_path / "raw")), data]) == 0
    assert main(["split", data, "--name", "a", "--per-class", "1"]) == 0
    assert main(["inspect", data, "--sheet", str(tmp_path / "s.png"), "--labels", "a", "--per-class", "4"]) == 0
    pixels = np.asarray(Image.open(tmp_path / "s.png"))
    assert (pixels[:, 120:184] != 255).any() and (pixels[:, 120 + 66 :] == 255).all()  # one labelled image per class, the other places stay white


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["fetch", "cifar", "x"], "did you mean 'cifar10'"),
        (["convert", "none", "x"], "does not exist"),
        (["convert", "{raw}", "{data}"], "already exists"),
        (["convert", "{raw}", "x", "--workers", "-1"], "outside 0"),
        (["convert", "{raw}", "x", "--format", "zip"], "unknown format"),
        (["split", "{data}", "--name", "a", "--per-class", "500"], "only 4 images"),
        (["split", "{data}", "--name", "a", "--per-class", "0"], "empty split"),
        (["split", "{data}", "--name", "a", "--law", "x", "--per-class", "1"], "unknown split law"),
        (["split", "none", "--name", "a", "--per-class", "1"], "does not exist"),
        (["verify", "{raw}"], "not a converted dataset"),
        (["inspect", "{data}", "--sheet", "s.png", "--per-class", "0"], "at least 1"),
        (["inspect", "{data}", "--sheet", "s.png", "--split", "trian"], "did you mean 'train'"),
        (["list", "none"], "not a folder"),
    ],
)
def test_errors_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys, arguments, match):
    monkeypatch.chdir(tmp_path)
    raw, data = idx_folder(tmp_path / "raw"), tmp_path / "data"
    assert main(["convert", str(raw), str(data)]) == 0
    capsys.readouterr()
    assert main([text.format(raw=raw, data=data) for text in arguments]) == 2
    error = capsys.readouterr().err
    last = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(last) == 1 and match in last[0] and "Traceback" not in error
    assert not (tmp_path / "x").exists()


def test_verify_of_a_damaged_dataset_exits_2_and_lists_the_problem(tmp_path, capsys):
    data = tmp_path / "data"
    assert main(["convert", str(idx_folder(tmp_path / "raw")), str(data)]) == 0
    (data / "train.labels.npy").unlink()
    assert main(["verify", str(data)]) == 2
    out, err = capsys.readouterr()
    assert "PROBLEM: train.labels.npy is missing" in out and "problem(s)" in err


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([verb, "--help"])
    assert stop.value.code == 0
    assert f"fastssl-data {verb} " in capsys.readouterr().out.split("example", 1)[1]


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "data_tools", "--help"], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and all(verb in done.stdout for verb in VERBS)


def test_usage_errors_exit_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert"])
    assert stop.value.code == 2


def test_damaged_datasets_do_not_stop_the_list(tmp_path, capsys):
    assert main(["convert", str(idx_folder(tmp_path / "raw")), str(tmp_path / "data")]) == 0
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "dataset.json").write_text("{}")
    assert main(["list", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "bad: unusable" in out and "data: raw, arrays" in out
