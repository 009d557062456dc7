"""The loader benchmark in small: its set has ImageNet's shape, its cases deliver what they say, its ratios and goals are right, absent peers are named."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass, field

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from benchmarks import loader_cases, loader_data, loader_peers, loader_table
from benchmarks.loader_table import LIMIT, goals, rows_of, show
from benchmarks.turns import Candidate, Measured, context
from tests.benchmarks import waiting
from tests.helpers import ROOT, run_python

PACKAGES = {"FFCV": "ffcv", "dali": "nvidia.dali", "DALI": "nvidia.dali"}


def photos(count=3):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((640, 430), Image.Resampling.BICUBIC) for _ in range(count)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return loader_data.build(tmp_path_factory.mktemp("loader"), photos(), 16, small=32)[0]


def installed(case):
    package = next((package for word, package in PACKAGES.items() if word in case.name), None)
    try:
        return package is None or importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def test_the_set_has_imagenets_shape():
    jpegs = loader_data.shaped(photos(), 48, mean_kb=60)
    sizes = [simplejpeg.decode_jpeg_header(jpeg)[:2] for jpeg in jpegs]
    assert set(sizes) <= set(loader_data.SIDES) and len(set(sizes)) > 4
    assert sizes.count((375, 500)) > 48 * 0.25, "most photographs are 500x375"
    assert np.mean([len(jpeg) for jpeg in jpegs]) == pytest.approx(60_000, rel=0.05)
    assert loader_data.shaped(photos(), 48, mean_kb=60) == jpegs


@pytest.mark.parametrize("case", [c for c in loader_cases.cases() if "FFCV's engine" not in c.name], ids=lambda c: f"{c.pair}-{c.name}")
def test_our_cases_run_whole_passes(case, sets, monkeypatch):
    if not installed(case):
        pytest.skip("its package is not installed")
    for name, value in (("BATCH", 8), ("SMALL_BATCH", 16), ("SMALL_UNIT", 32)):
        monkeypatch.setattr(loader_cases, name, value)
    turn = case.open(sets, 1)
    once, twice = turn.run(1), turn.run(2)
    assert once > 0 and twice == 2 * once
    if case.makes == "views":
        assert turn.facts["bytes_per_step"] > 0 and turn.facts["slot_bytes"] > 0


def test_scaled_decode_and_packing_shrink_what_travels(sets):
    whole, scaled = (loader_cases.canvas(sets, 1, kind="ffcv", scaled=s).facts for s in (0.0, loader_cases.SCALED))
    assert whole["step_of_384_packed_MB"] < whole["step_of_384_MB"] == pytest.approx(384 * np.prod(whole["canvas"]) / 1e6, abs=0.1)
    assert scaled["step_of_384_packed_MB"] < whole["step_of_384_packed_MB"]


@pytest.mark.parametrize("case", [c for c in loader_peers.cases() if c.name.startswith(("PIL", "torchvision"))], ids=lambda c: f"{c.pair}-{c.name}")
def test_peers_run_whole_passes(case, sets, monkeypatch):
    for name, value in (("BATCH", 8), ("SMALL_BATCH", 16), ("SMALL_UNIT", 32)):
        monkeypatch.setattr(loader_peers, name, value)
    assert case.open(sets, 1).run(2) == 2 * (32 if case.pair == "cifar" else 16)


def test_peers_make_both_views_at_full_size():
    image = photos(1)[0]
    for both, given in ((loader_peers._pil("imagenet"), image), (loader_peers._pil("tllib"), image), (loader_peers._v2(), torch.zeros(3, 90, 80).byte())):
        for view in both(given):
            assert view.shape == (3, 224, 224) and view.dtype == torch.float32


@pytest.mark.parametrize("name, package", [("ffcv", "ffcv.loader"), ("dali", "nvidia.dali")])
def test_a_peer_without_its_package_says_what_to_install(name, package, sets, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(loader_peers.Missing, match=f"make {name}"):
        getattr(loader_peers, name)(sets, 1)


# --- ratios and goals ----------------------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """A candidate with given turns."""

    turns: list = field(default_factory=list)
    state: str = "ready"
    said: str = ""
    facts: dict = field(default_factory=dict)


def told(*rates):
    """Turns of 100 images with these rates per processor second; on the clock they took twice as long, as on a busy machine."""
    return Told([Measured(100, 200 / rate, 100 / rate) for rate in rates])


def case(name, makes, pair="", ours=True):
    return loader_cases.Case(name, makes, pair, lambda sets, cores: None, ours)


def entries(pil=100.0):
    return [
        (case(LIMIT, "limit"), 1, told(1000, 500, 1000)),
        (case("canvas: ffcv", "canvas"), 1, told(950, 400, 940)),
        (case("canvas: ffcv, scaled_decode=0.8", "canvas"), 1, told(1100, 600, 1200)),
        (case("views: ffcv", "views", "imagenet"), 1, told(200, 100, 220)),
        (case("views: ffcv, scaled, composed", "views", "imagenet"), 1, told(300, 100, 300)),
        (case("views: ffcv", "views", "imagenet"), 2, told(200, 200, 200)),
        (case("PIL: transforms", "views", "imagenet", ours=False), 1, told(pil, 50, pil)),
        (case("DALI", "views", "imagenet", ours=False), 1, told(160, 80, 160)),
        (case("FFCV", "views", "imagenet", ours=False), 1, Told(state="missing", said="needs the ffcv package: make ffcv")),
        (case("views: arrays", "views", "cifar"), 1, told(9000, 9000, 8000)),
        (case("PIL: per-image", "views", "cifar", ours=False), 1, told(1000, 1000, 1000)),
    ]


def test_ratios_are_medians_within_rounds():
    rows = {(row["pair"], row["name"], row["cores"]): row for row in rows_of(entries())}
    assert rows["", "canvas: ffcv", 1]["of_limit"] == 0.94, "0.95, 0.8, 0.94: a slow round slows both"
    mine = rows["imagenet", "views: ffcv", 1]
    assert (mine["of_pil"], mine["of_best_peer"], mine["best_peer"]) == (2.0, 1.25, "DALI")
    assert mine["per_core_s"] == 200 and mine["images_per_s"] == 100
    assert rows["imagenet", "views: ffcv", 2]["per_core_s"] == 50, "on several cores the clock counts, shared among them"
    assert "of_pil" not in rows["imagenet", "PIL: transforms", 1]
    assert "of_limit" not in rows["cifar", "views: arrays", 1], "no JPEG is decoded there"


def test_goals_are_met_or_missed_by_their_targets(capsys):
    found = {goal["name"]: (goal["value"], goal["met"]) for goal in goals(rows_of(entries()))}
    assert found == {
        "canvas_ffcv": (0.94, True),
        "canvas_scaled": (1.2, False),
        "views_224_imagenet_parity": (2.0, True),
        "views_224_imagenet_scaled_composed": (3.0, True),
        "views_cifar10": (9.0, True),
    }
    slow = {goal["name"]: goal["met"] for goal in goals(rows_of(entries(pil=180)))}
    assert not slow["views_224_imagenet_parity"] and slow["views_224_imagenet_scaled_composed"]
    show(rows_of(entries()))
    said = capsys.readouterr().out
    assert "missing: needs the ffcv package: make ffcv" in said and "SimMatch's pair" in said


def test_the_plot_is_written(tmp_path):
    loader_table.plot(rows_of(entries()), tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.height > 200


# --- turns ---------------------------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_in_pinned_processes_of_their_own():
    made, processors = context(["torch", "psutil", "tests.benchmarks.waiting"]), sorted(os.sched_getaffinity(0))
    wanted = {"busy": (waiting.busy, (2,)), "absent": (waiting.absent, ()), "broken": (waiting.broken, ()), "later": (waiting.breaks_later, ())}
    wanted["dies"] = (waiting.dies, ())
    found = {name: Candidate(made, open, arguments, processors[:1], 0.02) for name, (open, arguments) in wanted.items()}
    for candidate in found.values():
        candidate.wait()
    for _ in range(2):
        for candidate in found.values():
            candidate.take_turn()
    for candidate in found.values():
        candidate.close()
    assert found["busy"].facts == {"processors": processors[:1], "threads": 1}
    assert len(found["busy"].turns) == 2
    for turn in found["busy"].turns:
        assert turn.images % 10 == 0 and turn.images >= 30, "passes until the turn is long enough"
        assert turn.cpu_s == pytest.approx(turn.images / 10 * 0.002, rel=0.5) and turn.wall_s > 0.5 * turn.cpu_s
    assert found["absent"].state == "missing" and found["absent"].said == "needs the wished-for package: make wish"
    assert found["broken"].state == "failed" and "ZeroDivisionError" in found["broken"].said
    assert found["later"].state == "failed" and "the disk went away" in found["later"].said and len(found["later"].turns) == 1
    assert found["dies"].state == "failed" and "ended" in found["dies"].said
    assert not any(candidate._process.is_alive() for candidate in found.values())


@pytest.mark.slow
def test_the_program_end_to_end(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, photo in enumerate(photos()):
        photo.save(folder / f"{i}.png")
    done = run_python(
        "benchmarks/bench_loader.py", "--photos", str(folder), "--only", "limit,shards", "--cifar", "none", "--images", "16", "--rounds", "2",
        "--seconds", "0.02", "--cores", "1", "--out", str(tmp_path / "r.json"), env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert done.returncode == (0 if all(goal["met"] for goal in result["goals"]) else 1)
    goal = next(goal for goal in result["goals"] if goal["name"] == "canvas_shards")
    assert f"GOAL canvas_shards {goal['value']} 0.9 {'met' if goal['met'] else 'missed'}" in done.stdout.splitlines()
    names = {row["name"] for row in result["rows"] if "per_core_s" in row}
    assert {LIMIT, "canvas: shards"} <= names and result["set"]["images"] == 16
    assert (tmp_path / "r.png").is_file()
