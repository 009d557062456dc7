"""The pipeline through the command line's door: one plan from teacher to fine-tuned student, skipped where done, continued where stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fastssl import cli
from fastssl.errors import FastSSLError
from fastssl.models.checkpoints import read_weights
from fastssl.recipe import load_recipe, resolve
from fastssl.recipe_list import is_plan, recipe_paths
from fastssl.selftrain import pipeline
from fastssl.selftrain.log import Log
from fastssl.selftrain.plan import load_plan
from fastssl.sources.selection import load_selection
from tests.helpers import PATIENCE_S, ROOT, make_dataset, run_python, tiny_recipe, write_recipe

PLANS = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if is_plan(path))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "data", train=96)


def make_plan(folder: Path, data: Path, **changes) -> Path:
    """A plan and the recipe of its three trainings, side by side."""
    recipe = tiny_recipe(data, folder / "unused", "train.steps=6", "train.steps_per_epoch=3", "checkpoint.every=2", method="erm")
    write_recipe(folder / "net.yaml", recipe)
    plan = {
        "name": "tiny",
        "title": "A tiny pipeline",
        "runs_dir": str(folder / "runs"),
        "teacher": {"recipe": "net", "set": {"optim.lr": 0.05}},
        "score": {"p": 3, "unit_rows": 20, "batch": 16},
        "select": {"k": 6},
        "student": {"recipe": "net", "images_seen": 32, "epochs": 2},
        "finetune": {"recipe": "net", "set": {"optim": {"lr": 0.001}, "train.steps": 4}},
        **changes,
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"selftrain": {k: v for k, v in plan.items() if v is not None}}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("pipeline")
    assert cli.main(["selftrain", str(make_plan(folder, data))]) == 0
    return folder


def test_one_plan_makes_all_of_it(finished, data):
    base = finished / "runs" / "tiny" / "seed0"
    summary = json.loads((base / "summary.json").read_text())
    assert list(summary["accuracy"]) == ["teacher", "round1/student", "round1/finetune"]
    for name, steps in (("teacher", 6), ("round1/student", 8), ("round1/finetune", 4)):
        found = json.loads((base / name / "summary.json").read_text())
        assert found["status"] == "finished" and summary["accuracy"][name] == {"top1": found["eval"]["ema"]["last"]["top1"], "step": steps}
    student, finetune = (load_recipe(base / "round1" / step / "config.yaml") for step in ("student", "finetune"))
    assert student.data.selection == str(base / "round1" / "selection") and student.train.steps_per_epoch == 4 and student.model.start == ""
    assert finetune.model.start.endswith("student/checkpoints/last/teacher.safetensors") or "step-00000008" in finetune.model.start
    assert finetune.data.selection == "" and finetune.optim.lr == 0.001
    check = json.loads((base / "round1" / "check.json").read_text())
    assert check["top1_scoring"] == pytest.approx(check["top1_evaluation"], abs=1e-9)
    selection = load_selection(base / "round1" / "selection")
    assert selection.info["per_class"] == [6] * 4 and summary["selections"]["round1"]["rows"] == 24
    assert summary["selections"]["round1"]["precision"] == pytest.approx(_precision(selection, data))
    page = (base / "report.html").read_text()
    for wanted in ("A tiny pipeline", "Selected images", "Precision of lists", "teacher", "finetune"):
        assert wanted in page or "precision against k" in page, wanted


def _precision(selection, data):
    found, truth = selection.columns(), np.load(data / "train.labels.npy")
    return 100 * (truth[found["image_id"].astype(int)] == found["cls"]).mean()


def test_fine_tuning_starts_from_the_whole_student(finished, data):
    """Its first weights are the student's averaged ones, classifier included."""
    base = finished / "runs" / "tiny" / "seed0" / "round1"
    recipe = load_recipe(base / "finetune" / "config.yaml")
    from fastssl.engine.assemble import build_network_and_method, build_task, open_data

    opened = open_data(recipe, torch.device("cpu"))
    network, _ = build_network_and_method(recipe, opened.manifest, 3, build_task(recipe, opened), 1)
    start = read_weights(base / "student" / "checkpoints" / "last" / "teacher.safetensors")
    for name, value in network.state_dict().items():
        assert torch.equal(value, start[f"network.{name}"]), name


def test_running_again_does_nothing(finished, capsys):
    base = finished / "runs"
    before = {p: p.stat().st_mtime_ns for p in base.rglob("*") if p.is_file() and p.name not in ("report.html", "summary.json")}
    assert cli.main(["selftrain", str(finished / "plan.yaml")]) == 0
    out = capsys.readouterr().out
    assert out.count("is finished already") == 3 and "top-1" in out and "train step" not in out
    assert before == {p: p.stat().st_mtime_ns for p in base.rglob("*") if p.is_file() and p.name not in ("report.html", "summary.json")}


def test_another_plan_in_the_same_folder_is_refused(finished, capsys):
    assert cli.main(["selftrain", str(finished / "plan.yaml"), "select.k=7"]) == 2
    assert "begun with another plan (select differ)" in capsys.readouterr().err
    assert cli.main(["selftrain", str(finished / "plan.yaml"), "student.optim.lr=0.5"]) == 2
    assert "student differ" in capsys.readouterr().err


@pytest.mark.parametrize("until", ["teacher", "score", "select", "student", "finetune"])
def test_each_step_may_be_the_last(tmp_path, data, until, monkeypatch):
    order = ["teacher", "round1/log/header.json", "round1/selection", "round1/student", "round1/finetune"]
    steps = ["teacher", "score", "select", "student", "finetune"]
    plan = make_plan(tmp_path, data, student={"recipe": "net", "set": {"train.steps": 2}}, finetune={"recipe": "net", "set": {"train.steps": 2}})
    done = pipeline.run_plan(load_plan(plan), until=until, say=lambda text: None)
    there = [(done.folder / name).exists() for name in order]
    assert there == [steps.index(step) <= steps.index(until) for step in steps] and not done.complete
    assert not (done.folder / "summary.json").exists()


def test_a_pipeline_that_was_stopped_anywhere_ends_the_same(tmp_path, data, finished, monkeypatch):
    """Stopped in the teacher, while scoring, and in the student; each time the same command goes on."""
    plan = load_plan(make_plan(tmp_path, data))
    real_train, real_commit = pipeline.train, Log.commit

    def stopping_train(recipe, **how):
        return real_train(recipe, stop=lambda step: step == 3, **how)

    def stopping_commit(self, *args):
        if len(self.missing()) == 2:
            raise KeyboardInterrupt
        return real_commit(self, *args)

    from fastssl.engine.stop import Interrupted

    for name, what, error in (("train", stopping_train, Interrupted), ("commit", stopping_commit, KeyboardInterrupt), ("train", stopping_train, Interrupted)):
        monkeypatch.setattr(pipeline if name == "train" else Log, name, what)
        with pytest.raises(error):
            pipeline.run_plan(plan, say=lambda text: None)
        monkeypatch.setattr(pipeline, "train", real_train)
        monkeypatch.setattr(Log, "commit", real_commit)
        if name == "train":  # let the interrupted training come to its end, and go on
            step = "teacher" if not (plan.folder / "round1").exists() else "round1/student"
            assert json.loads((plan.folder / step / "summary.json").read_text())["status"] == "interrupted"
            pipeline.run_plan(plan, until=step.rpartition("/")[2], say=lambda text: None)
    done = pipeline.run_plan(plan, say=lambda text: None)
    there = finished / "runs" / "tiny" / "seed0"
    assert done.complete and done.accuracies() == json.loads((there / "summary.json").read_text())["accuracy"]
    for step in ("teacher", "round1/student", "round1/finetune"):
        one, other = (read_weights(base / step / "checkpoints" / "last") for base in (done.folder, there))
        assert all(torch.equal(one[name], other[name]) for name in one), step
    assert load_selection(done.folder / "round1/selection").info["rows_digest"] == load_selection(there / "round1/selection").info["rows_digest"]


def test_rounds_hand_on_the_last_network_and_noise_students_get_soft_labels(tmp_path, data):
    """Noisy Student: the selection is the unlabelled stream, the round's teacher answers for it, and teaches the next round."""
    noisy = {
        "recipe": "net",
        "selection_as": "unlabeled",
        "frozen_teacher": True,
        "set": {"method.name": "noisy_student", "eval.headline": "raw", "train.steps": 3, "teacher.mode": "eval"},
    }
    plan = make_plan(tmp_path, data, student=noisy, finetune=None, rounds=2, select={"k": 12, "p": 1, "min_probability": 0.1, "floor": 2, "fill": "duplicate"})
    done = pipeline.run_plan(load_plan(plan), say=lambda text: None)
    assert list(done.runs) == ["teacher", "round1/student", "round2/student"] and done.complete
    second = load_recipe(done.folder / "round2" / "student" / "config.yaml")
    assert "round1/student/checkpoints" in second.teacher.start and second.teacher.start.endswith("student.safetensors")
    teachers = [Log(done.folder / f"round{n}" / "log").identity["teacher"]["weights_sha256"] for n in (1, 2)]
    assert len(set(teachers)) == 2
    for name, path in done.selections.items():
        counts = np.bincount(load_selection(path).rows_and_labels()[1], minlength=4)
        assert set(counts.tolist()) <= {0, 12}, name


def test_a_teacher_that_exists_already(finished, tmp_path, data):
    run = finished / "runs" / "tiny" / "seed0" / "teacher"
    plan = load_plan(make_plan(tmp_path, data, teacher={"run": str(run), "checkpoint": "best"}))
    done = pipeline.run_plan(plan, until="select", say=lambda text: None)
    assert done.runs["teacher"] == run and (done.folder / "round1" / "selection").exists()


def test_a_teacher_that_sees_other_pixels_is_stopped(finished, tmp_path, data, monkeypatch):
    from fastssl.selftrain.teacher import Scorer

    logits = Scorer.logits
    monkeypatch.setattr(Scorer, "logits", lambda self, x: logits(self, x).roll(1, dims=1))
    run = finished / "runs" / "tiny" / "seed0" / "teacher"
    plan = load_plan(make_plan(tmp_path, data, teacher={"run": str(run)}))
    with pytest.raises(FastSSLError, match="the two see different pixels"):
        pipeline.run_plan(plan, say=lambda text: None)
    assert not (plan.folder / "round1" / "selection").exists()


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("select.kk=3", "did you mean 'k'"),
        ("score.p=many", "must be of type int"),
        ("student.optim.lrr=1", "did you mean 'optim.lr'"),
        ("rounds=0", "at least 1"),
        ("poool.rows=all", "neither a key of the plan"),
        ("finetune.run=x", "only the teacher"),
        ("teacher.run=x", "one of the two"),
    ],
)
def test_plans_that_mean_nothing(tmp_path, data, override, why):
    with pytest.raises(FastSSLError, match=why):
        load_plan(make_plan(tmp_path, data), [override])


def test_overrides_go_where_they_belong(tmp_path, data):
    plan = load_plan(
        make_plan(tmp_path, data), ["seed=3", "select.k=9", "select.caps.class1=2", "student.optim.lr=0.2", "train.threads=1", "log.every=7", "name=other"]
    )
    assert plan.folder == tmp_path / "runs" / "other" / "seed3" and plan.select.k == 9 and plan.select.caps == {"class1": 2} and plan.select.seed == 3
    assert [plan.recipe(step).optim.lr for step in ("teacher", "student", "finetune")] == [0.05, 0.2, 0.001]
    assert {plan.recipe(step).log.every for step in ("teacher", "student", "finetune")} == {7} and plan.recipe("student").seed == 3


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_plans_that_ship_mean_something(path):
    plan = load_plan(path)
    assert plan.title and plan.student.recipe and path.read_text().startswith("# ")
    for entry in recipe_paths(ROOT / "recipes"):
        assert entry.path != path, "a plan is not listed as a recipe"
    with pytest.raises(FastSSLError):
        resolve(str(path))


@pytest.mark.slow
def test_two_workers_on_the_command_line_one_is_killed(finished, tmp_path):
    """Real processes, SIGKILL while one of them holds a unit: the other one scores the rest, and every row is there once."""
    run, log = finished / "runs" / "tiny" / "seed0" / "teacher", tmp_path / "log"
    words = ["-m", "fastssl", "select", "score", str(run), "--log", str(log), "--p", "3", "--unit", "1", "--batch", "2"]
    workers = [run_python(*words, wait=False) for _ in range(2)]
    deadline = time.monotonic() + PATIENCE_S
    while len(list(log.glob("units/*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
    output = workers[1].communicate(timeout=PATIENCE_S)[0]
    workers[0].communicate()
    assert workers[1].returncode == 0, output
    found = Log(log)
    assert found.missing() == [] and re.search(r"complete, 76 of 76 images scored, 0 bad", output)
    assert np.sort(np.concatenate([part.id_N for part in found.parts()])).tolist() == list(range(8, 84))
    assert cli.main(["select", "topk", str(log), "--out", str(tmp_path / "sel"), "--k", "6", "--check"]) == 0
    assert cli.main(["select", "report", str(tmp_path / "sel"), "--log", str(log), "--out", str(tmp_path / "page.html")]) == 0
    ours, theirs = load_selection(tmp_path / "sel"), load_selection(finished / "runs" / "tiny" / "seed0" / "round1" / "selection")
    assert ours.info["per_class"] == theirs.info["per_class"]


def test_doors_that_say_what_is_wrong(tmp_path, capsys):
    assert cli.main(["select"]) == 0 and "score" in capsys.readouterr().out
    for words, why in (
        (["select", "topk", str(tmp_path), "--out", str(tmp_path / "o")], "no scoring log"),
        (["select", "topk", str(tmp_path), "--out", "o", "--cap", "cat"], "CLASS=K"),
        (["select", "report", str(tmp_path)], "no selection"),
        (["select", "score", str(tmp_path), "--log", "x"], "no run folder"),
        (["selftrain", "nowhere"], "no recipe 'nowhere'"),
    ):
        assert cli.main(words) == 2
        assert re.search(why, capsys.readouterr().err), why
