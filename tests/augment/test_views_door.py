"""``fastssl views`` with the named policies, and with lists of the same laws: what a recipe may write reaches the picture."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from fastssl import cli
from fastssl.augment import POLICIES


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    from data_tools.cli import main as data

    root = tmp_path_factory.mktemp("door")
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("ant", "bee"):
            folder = root / "raw" / split / label
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    assert not data(["convert", str(root / "raw"), str(root / "set")])
    assert not data(["split", str(root / "set"), "--name", "one", "--per-class", "1"])
    return root / "set"


@pytest.fixture
def views(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(weak, strong, **keys):
        more = "".join(f", {key}: {value}" for key, value in keys.items())
        (tmp_path / "r.yaml").write_text(
            f"method: fixmatch\ndata: {{path: {dataset}, split: one}}\naugment: {{size: 16, weak: {weak}, strong: {strong}{more}}}\n"
        )
        code = cli.main(["views", "r.yaml", "--out", "a.png", "--rows", "1"])
        said = capsys.readouterr()
        if code:
            return said.err
        with Image.open("a.png") as image:
            return hashlib.sha256(image.tobytes()).hexdigest()

    return run


@pytest.mark.parametrize("weak", [name for name in POLICIES if name.endswith("_weak")])
def test_every_pair_of_named_policies_can_be_looked_at(views, weak):
    strong = weak.replace("_weak", "_strong")
    strong = strong if strong in POLICIES else "simclr"
    assert len(views(weak, strong)) == 64


def test_a_list_of_laws_is_the_policy_that_it_spells_out(views):
    named = views("imagenet_weak", "imagenet_randaugment")
    box = "{resized_crop: {scale: [0.2, 1.0]}}, flip"
    assert views("imagenet_weak", f"[{box}, {{randaugment: {{space: imagenet, p: 1}}}}]") == named != views("imagenet_weak", "imagenet_strong")


def test_geometry_reaches_the_pixels_and_its_mistakes_the_user(views):
    published = views("eman_weak", "eman_strong")
    assert views("eman_weak", "eman_strong", geometry="per_op") == published != views("eman_weak", "eman_strong", geometry="composed")
    assert "augment.geometry" in views("eman_weak", "eman_strong", geometry="once")
    said = views("imagenet_weak", "[{color_jiter: {hue: 0.1}}]")
    assert "did you mean 'color_jitter'?" in said
