"""recipes/tllib/noisy_student.py: four runs in one command that can be given again at any time."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastssl import cli
from fastssl.recipe import load_recipe
from tests.helpers import make_dataset

SCRIPT = Path(__file__).resolve().parent.parent / "recipes" / "tllib" / "noisy_student.py"


@pytest.fixture
def rounds(monkeypatch):
    """The script as a module, whose training runs in this process; ``rounds.calls`` are the commands."""
    spec = importlib.util.spec_from_file_location("noisy_student_rounds", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.calls = []

    def call(words):
        module.calls.append(words)
        return cli.main(words)

    monkeypatch.setattr(module, "call", call)
    return module


@pytest.fixture
def command(tmp_path):
    """Arguments that make the published recipe a matter of seconds."""
    data = make_dataset(tmp_path / "data")
    small = [
        "data.labeled_batch=4",
        "data.unlabeled_batch=4",
        "data.device_resident=no",
        "augment.size=8",
        "augment.weak=flip",
        "augment.strong=flip",
        "augment.eval=plain",
    ]
    quick = [
        "model.name=small_cnn",
        "model.options={width: 4, layers: 2}",
        "model.weights=",
        "train.steps=4",
        "train.steps_per_epoch=2",
        "log.trackers=[]",
        "train.threads=1",
    ]
    return ["cifar100_supervised", "--rounds", "2", "--runs", str(tmp_path / "runs"), f"data.path={data}", "data.split=tiny", *small, *quick]


def student(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last" / "student.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_rounds_follow_each_other_and_are_not_repeated(rounds, command, tmp_path, capsys):
    assert rounds.main(command) == 0
    runs = tmp_path / "runs" / "noisy_student_cifar100_supervised"
    assert sorted(p.name for p in runs.iterdir()) == ["round0", "round1", "round2"]
    assert [load_recipe(runs / f"round{n}" / "config.yaml").method.name for n in range(3)] == ["erm", "noisy_student", "noisy_student"]
    for n in (1, 2):
        teacher = load_file(runs / f"round{n}" / "checkpoints" / "last" / "teacher.safetensors")
        before = student(runs / f"round{n - 1}")
        shared = {name: teacher[next(t for t in teacher if t.endswith(name))] for name in before}
        assert equal(shared, before), f"round {n} learns from the student of round {n - 1}, not from that one's teacher"
        assert not equal(student(runs / f"round{n}"), before), "and does not start as its teacher"

    rounds.calls.clear()
    assert rounds.main(command) == 0 and rounds.calls == [] and "round 2 is there already" in capsys.readouterr().out


def test_what_is_missing_is_made_again_and_what_was_interrupted_goes_on(rounds, command, tmp_path):
    assert rounds.main([*command[:1], "--rounds", "0", *command[3:]]) == 0
    first = tmp_path / "runs" / "noisy_student_cifar100_supervised" / "round0"
    whole = student(first)
    summary = json.loads((first / "summary.json").read_text())
    (first / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    rounds.calls.clear()
    assert rounds.main([*command[:1], "--rounds", "0", *command[3:]]) == 0
    assert rounds.calls[0][-2:] == ["--resume", str(first)] and equal(student(first), whole)

    (first / "summary.json").unlink()
    shutil.rmtree(first / "checkpoints")
    assert rounds.main([*command[:1], "--rounds", "0", *command[3:]]) == 0
    assert rounds.calls[1][-2:] == ["--run-dir", str(first)] and (first.parent / "round0-unfinished-1").is_dir() and equal(student(first), whole)


def test_a_round_that_fails_ends_the_command(rounds, command, capsys):
    assert rounds.main([*command, "optim.lr=-1"]) == 2 and len(rounds.calls) == 1
    assert "the same command goes on from here" in capsys.readouterr().err


def test_the_script_names_recipes_that_exist(rounds):
    for variant in ("cifar100_supervised", "cifar100_moco_v2"):
        base, later = (load_recipe(rounds.recipe_of(variant, Path("runs"), n)[0]) for n in (0, 1))
        assert base.train.steps == 10_000 and later.train.steps == 20_000 and base.optim.lr == later.optim.lr and base.model == later.model
