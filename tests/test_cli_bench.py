"""``fastssl bench``: a tiny recipe is measured through the command line; the verdict follows from the numbers, case by case."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from fastssl import cli
from fastssl.engine import bench as bench_module
from fastssl.engine.advice import Facts, advise, bottleneck
from tests.helpers import make_dataset, tiny_recipe, write_recipe

GPU = Facts(
    images=512,
    read_s=0.20,
    loader_s=0.20,
    render_s=0.004,
    step_s=0.10,
    together_s=0.21,
    cuda=True,
    format="ffcv",
    reader="auto",
    on_device=False,
    workers=8,
    cores=8,
    threads=8,
    precision="bf16",
    canvas=500,
    view=224,
    padding=0.3,
    pack="auto",
    can_scale=True,
    has_dali=True,
    backend="triton",
    geometry="per_op",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    return write_recipe(root / "r.yaml", tiny_recipe(make_dataset(root / "data"), root / "runs"))


def test_a_recipe_is_measured_and_nothing_is_left_behind(recipe, capsys):
    assert cli.main(["bench", str(recipe), "--steps", "4", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert set(found["phases"]) == {"read", "loader", "render", "step", "together"}
    for phase in found["phases"].values():
        assert phase["steps"] <= 4 and phase["seconds"] > 0
        assert phase["images_per_s"] == pytest.approx(12 / phase["seconds"], rel=1e-2)
    assert found["images_per_step"] == 12 and found["batches"] == {"labeled": 4, "unlabeled": 8}
    assert found["views_per_s"] == pytest.approx((4 + 8 + 8) / found["phases"]["render"]["seconds"], rel=1e-2)
    pixels = 12 * 8 * 8 * 3
    assert pixels < found["bytes_per_step"] < 2 * pixels, "canvases and their columns"
    assert found["slot_bytes"] >= 4 * pixels, "data.ahead + 1 slots"
    assert 0 <= found["wait_share"] <= 1
    assert found["bottleneck"] in ("read", "render", "network") and found["verdict"].startswith(found["bottleneck"])
    assert not (recipe.parent / "runs").exists()


def test_people_get_a_table_and_one_sentence(recipe, capsys):
    assert cli.main(["bench", str(recipe), "--steps", "3", "train.threads=1"]) == 0
    out = capsys.readouterr().out
    for words in ("loader ceiling", "rendering all views", "step ceiling", "together", "waiting for data", "per step"):
        assert words in out
    assert re.search(r"-bound: .* images/s", out.splitlines()[-1])


def test_slow_phases_end_early(recipe, monkeypatch):
    """A step of seconds is not repeated twenty times."""
    monkeypatch.setattr(bench_module, "PHASE_S", 0.0)
    from fastssl.recipe import load_recipe

    found = bench_module.bench(load_recipe(str(recipe)), steps=50)
    assert {phase["steps"] for phase in found["phases"].values()} == {bench_module.LEAST}


def test_mistakes_are_one_line(recipe, capsys):
    for words in (["data.path=none"], ["data.split=tinny"], ["augment.strong=nothing"], ["data.labeled_batch=0"]):
        assert cli.main(["bench", str(recipe), *words]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and not said.out


def test_a_feed_slower_than_the_step_is_decode_bound_and_names_what_helps():
    limit, tries, said = advise(GPU)
    assert limit == "decode"
    assert said.startswith("decode-bound: 2 560 images/s against a step that takes 5 120; use fastssl-data convert --max-side 320, or data.scaled_decode=1")
    assert any("--format dali" in t for t in tries) and not any("workers" in t for t in tries)
    assert advise(replace(GPU, workers=2))[1][0] == "data.workers=8"
    assert not any("scaled" in t for t in advise(replace(GPU, can_scale=False))[1])
    shards = advise(replace(GPU, format="dali", can_scale=False))[1]
    assert shards[0].startswith("data.source=dali") and "make dali" not in shards[0]
    assert "make dali" in advise(replace(GPU, format="dali", has_dali=False))[1][0]
    assert not any("source=dali" in t for t in advise(replace(GPU, format="dali", reader="dali", on_device=True))[1]), "it is used already"


@pytest.mark.parametrize(
    "changed, limit, first",
    [
        ({"loader_s": 0.05, "read_s": 0.05}, "network", "a larger batch"),
        ({"loader_s": 0.05, "read_s": 0.05, "precision": "no"}, "network", "train.precision=bf16"),
        ({"loader_s": 0.05, "read_s": 0.05, "render_s": 0.02, "backend": "reference"}, "network", "augment.backend=triton"),
        ({"loader_s": 0.05, "read_s": 0.05, "render_s": 0.07, "backend": "reference"}, "render", "augment.backend=triton"),
        ({"loader_s": 0.05, "read_s": 0.05, "render_s": 0.07}, "render", "augment.geometry=composed"),
        ({"read_s": 0.05}, "transfer", "data.pack=on"),
        ({"read_s": 0.05, "pack": "off"}, "transfer", "data.pack=auto"),
        ({"read_s": 0.05, "format": "arrays"}, "transfer", "data.device_resident=yes"),
        ({"format": "arrays", "canvas": 32, "view": 32}, "read", "data.device_resident=yes"),
        ({"canvas": 64, "view": 64, "can_scale": False}, "decode", "fastssl-data convert --format arrays"),
        ({"loader_s": 0.104}, "network", "a larger batch"),
        ({"cuda": False, "format": "arrays", "loader_s": 0.01, "render_s": 0.09}, "render", "a GPU"),
        ({"cuda": False, "loader_s": 0.05, "render_s": 0.03, "threads": 1}, "network", "train.threads=8"),
        ({"cuda": False, "loader_s": 0.08, "render_s": 0.03}, "decode", "fastssl-data convert --max-side 320"),
    ],
)
def test_what_limits(changed, limit, first):
    facts = replace(GPU, **changed)
    found, tries, said = advise(facts)
    assert (found, bottleneck(facts)) == (limit, limit) and tries[0].startswith(first) and said.startswith(f"{limit}-bound")
