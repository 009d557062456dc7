"""``fastssl views`` on a small real dataset folder: the picture exists, is repeatable, and moves with what the recipe says."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
from PIL import Image

from fastssl import cli


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    from data_tools.cli import main as data

    root = tmp_path_factory.mktemp("views")
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("ant", "bee", "cat"):
            folder = root / "raw" / split / label
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    assert not data(["convert", str(root / "raw"), str(root / "set")])
    assert not data(["split", str(root / "set"), "--name", "six", "--per-class", "2"])
    return root / "set"


def test_views_writes_a_repeatable_picture(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(f"method: fixmatch\ndata: {{path: {dataset}, split: six}}\naugment: {{size: 16}}\n")

    def sheet(name, *words):
        assert cli.main(["views", "r.yaml", "--out", name, *words]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out == f"{name}\n"
        with Image.open(name) as image:
            assert image.format == "PNG"
            return image.size, hashlib.sha256(image.tobytes()).hexdigest()

    first = sheet("a.png", "--rows", "3")
    assert sheet("deep/b.png", "--rows", "3") == first
    assert sheet("c.png", "seed=1", "--rows", "3")[1] != first[1]
    assert sheet("d.png", "--rows", "1")[0][1] < first[0][1]
    assert sheet("e.png", "--rows", "50")[0][1] > first[0][1], "more rows than labelled images shows all of them"
    for words in (["x.jpg"], ["x.png", "augment.strong=nothing_like_it"], ["x.png", "data.path="], ["x.png", "data.path=none"], ["x.png", "data.split=sixx"]):
        assert cli.main(["views", "r.yaml", "--out", *words]) == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """The same JPEG photographs in every format, converted from one tree; and other images."""
    from data_tools.cli import main as data

    root = tmp_path_factory.mktemp("formats")
    random = np.random.default_rng(0)
    for tree in ("raw", "foreign"):
        for split, count in (("train", 4), ("test", 1)):
            for label in ("ant", "bee"):
                folder = root / tree / split / label
                folder.mkdir(parents=True)
                for i in range(count + (tree == "foreign")):
                    coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
                    coarse.resize((24, 20), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=95)
    for tree, format in (("raw", "arrays"), ("raw", "ffcv"), ("raw", "dali"), ("foreign", "ffcv")):
        name = format if tree == "raw" else "others"
        assert not data(["convert", str(root / tree), str(root / name), "--format", format, "--name", "set"])
        assert not data(["split", str(root / name), "--name", "four", "--per-class", "2"])
    return root


@pytest.fixture
def diff(formats, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        f"method: fixmatch\ndata: {{path: {formats / 'ffcv'}, split: four}}\naugment: {{size: 16, weak: imagenet_weak, strong: fixmatch_strong}}\n"
    )

    def run(spec, *words):
        code = cli.main(["views", "r.yaml", "--rows", "2", "--tile", "64", "--out", "d.png", "--diff", spec, *words])
        said = capsys.readouterr()
        return code, said.out.splitlines() if code == 0 else said.err

    return run


def test_readers_of_one_collection_agree(diff, formats):
    """Same bytes, same decoder: no level differs, in canvases and views."""
    code, lines = diff(f"ffcv,shards={formats / 'dali'},arrays={formats / 'arrays'}")
    assert code == 0, lines
    apart = [line for line in lines if " against ffcv: " in line]
    assert len(apart) == 2 * 4, "two others; canvas and three views"
    assert all("mean 0.0000 levels, most 0, 0.00%" in line for line in apart)
    with Image.open("d.png") as sheet:
        assert sheet.width > 5 * 64 and sheet.height > 2 * 4 * 64
        assert lines[-1] == "d.png"


def test_renderers_are_compared_and_one_alone_with_the_recipe(diff):
    code, lines = diff("reference")
    assert code == 0, lines
    assert any(line.startswith("canvas: reference against recipe: mean 0.0000") for line in lines)
    weak = next(line for line in lines if line.startswith("x: reference against recipe"))
    assert "most 1" in weak, "torch's resize is a level off here and there"
    code, lines = diff("reference,triton")
    assert code == 0, lines
    apart = [line for line in lines if line.startswith(("x:", "u_w:", "u_s:"))]
    assert all("most 0" in line for line in apart), f"the two are equal to the last bit: {apart}"


def test_a_difference_shows(diff, formats, tmp_path):
    """A dataset whose pixels differ is not called equal: its sheet and its numbers say so."""
    from data_tools.cli import main as data

    assert not data(["convert", str(formats / "raw"), str(tmp_path / "small"), "--format", "ffcv", "--max-side", "12", "--name", "set"])
    code, lines = diff(f"ffcv,ffcv={tmp_path / 'small'}")
    assert code == 0, lines
    assert "canvas: ffcv=small against ffcv: other sizes" in lines
    assert float(next(line for line in lines if line.startswith("x:")).split("mean ")[1].split()[0]) > 0.5


def test_who_cannot_work_here_is_left_out_with_the_reason(diff, formats, monkeypatch):
    code, lines = diff(f"ffcv,arrays,shards={formats / 'dali'}")
    assert code == 0 and lines[0].startswith("arrays: left out: ") and "format 'ffcv'" in lines[0], lines
    code, said = diff(f"ffcv,ffcv={formats / 'others'}")
    assert code == 2 and "holds other images" in said
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    code, said = diff(f"ffcv,dali={formats / 'dali'}")
    assert code == 2 and "fewer than two can work here" in said and "make dali" in said
    for spec, words in (("fcv,dali", "did you mean 'ffcv'"), (",", "name one or more"), ("ffcv,ffcv", "each once"), ("ffcv,triton=x", "reads no folder")):
        code, said = diff(spec)
        assert code == 2 and words in said, said


def test_more_draws_make_a_wider_sheet(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(f"method: fixmatch\ndata: {{path: {dataset}, split: six}}\naugment: {{size: 16}}\n")
    widths = []
    for words in (["--draws", "1"], ["--draws", "4"], ["--draws", "4", "--tile", "64"]):
        assert cli.main(["views", "r.yaml", "--rows", "1", "--out", "w.png", *words]) == 0
        with Image.open("w.png") as sheet:
            widths.append(sheet.width)
    assert widths[0] < widths[2] < widths[1]


def test_a_sheet_of_reduced_canvases_draws_the_boxes_of_training(formats, tmp_path, monkeypatch):
    """Canvases reduced at conversion: crop boxes are drawn on the images' own sizes, as the feed gives them."""
    from data_tools.cli import main as data
    from fastssl.engine.sheet import read_rows
    from fastssl.sources import open_source

    assert not data(["convert", str(formats / "raw"), str(tmp_path / "small"), "--format", "ffcv", "--max-side", "12"])
    source = open_source(tmp_path / "small")
    raw = read_rows(source, np.arange(3))
    assert raw.extent_B2.tolist() == [[10, 12]] * 3 and raw.size_B2.tolist() == [[20, 24]] * 3
    source.close()
