"""``fastssl views`` on a small real dataset folder: the picture exists, is repeatable, and moves with what the recipe says."""

from __future__ import annotations

import hashlib

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
