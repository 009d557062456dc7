"""train() from end to end on a tiny dataset: the run folder, the metric names, evaluation, the end of a run."""

import json
import os

import pytest
import torch

from fastssl.engine import checkpoint
from fastssl.engine.evaluate import evaluate_run
from fastssl.engine.stop import Interrupted
from fastssl.engine.train import train
from fastssl.errors import CheckpointError, DataError, RecipeError
from fastssl.recipe import config_digest, load_recipe
from tests.helpers import metric_lines, tiny_recipe

TRAIN_NAMES = {
    "step", "epoch", "kind", "time/wall_s", "train/loss", "train/sup_loss", "train/lr", "time/data", "time/step", "perf/images_per_s", "perf/data_wait_share",
}  # fmt: skip
FIXMATCH_NAMES = TRAIN_NAMES | {"train/unsup_loss", "train/util_ratio", "train/pseudo_acc", "train/pseudo_acc_all", "train/confidence"}
SUMMARY_NAMES = {
    "status", "error", "recipe", "title", "method", "dataset", "split", "seed", "world", "steps", "total_steps", "num_labeled", "num_unlabeled", "eval",
    "images_per_s", "data_wait_share", "train_wall_s", "eval_wall_s", "device", "precision", "config_digest",
}  # fmt: skip


@pytest.fixture(scope="module")
def fixmatch_run(tiny_data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("train") / "runs"
    recipe = tiny_recipe(tiny_data, runs, "train.steps=40", "train.steps_per_epoch=10", "log.every=4", "optim.lr=0.1", "log.trackers=[tensorboard]")
    return recipe, train(recipe)


def test_run_folder(fixmatch_run):
    recipe, run = fixmatch_run
    assert run.parent.name == "tiny"
    assert {"config.yaml", "env.json", "metrics.jsonl", "summary.json", "train.log", "checkpoints", "tb", "views.png"} <= set(os.listdir(run))
    assert config_digest(load_recipe(run / "config.yaml")) == config_digest(recipe)
    env = json.loads((run / "env.json").read_text())
    assert env["world"] == 1 and env["torch"] == torch.__version__ and env["config_digest"] == config_digest(recipe)
    assert list((run / "tb").rglob("events.out.tfevents*"))
    assert "eager" in (run / "train.log").read_text()


def test_metric_names_and_steps(fixmatch_run):
    _, run = fixmatch_run
    lines = metric_lines(run)
    trains, evals = [x for x in lines if x["kind"] == "train"], [x for x in lines if x["kind"] == "eval"]
    assert [x["step"] for x in trains] == list(range(4, 41, 4)) and [x["step"] for x in evals] == [10, 20, 30, 40]
    assert [x["epoch"] for x in evals] == [1, 2, 3, 4]
    assert all(set(x) == FIXMATCH_NAMES for x in trains)
    for x in trains:
        assert 0 <= x["train/util_ratio"] <= 1 and 0 <= x["train/confidence"] <= 1 and 0 <= x["perf/data_wait_share"] <= 1
        assert 0 <= x["train/pseudo_acc_all"] <= 100 and x["perf/images_per_s"] > 0
    names = {"top1", "top5", "balanced_acc", "loss"}
    for x in evals:
        assert {f"eval/{n}" for n in names} | {"eval/num_images"} <= set(x)
        assert {f"eval/{w}/{n}" for w in ("raw", "ema") for n in (*names, "per_class")} <= set(x)
        assert x["eval/top1"] == x["eval/ema/top1"] and x["eval/num_images"] == 22 and len(x["eval/raw/per_class"]) == 4
    walls = [x["time/wall_s"] for x in lines]
    assert walls == sorted(walls) and walls[0] > 0


def test_it_learns(fixmatch_run):
    _, run = fixmatch_run
    lines = metric_lines(run)
    assert max(x["eval/raw/top1"] for x in lines if x["kind"] == "eval") > 60  # four classes: chance is 25
    losses = [x["train/sup_loss"] for x in lines if x["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


def test_summary_and_links(fixmatch_run):
    recipe, run = fixmatch_run
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == SUMMARY_NAMES
    assert (summary["status"], summary["error"], summary["steps"], summary["num_labeled"], summary["num_unlabeled"]) == ("finished", None, 40, 8, 52)
    evals = [x for x in metric_lines(run) if x["kind"] == "eval"]
    for which in ("raw", "ema"):
        assert summary["eval"][which]["best"]["top1"] == max(x[f"eval/{which}/top1"] for x in evals)
        assert summary["eval"][which]["last"]["top1"] == evals[-1][f"eval/{which}/top1"] and summary["eval"][which]["last"]["step"] == 40
    assert checkpoint.load(checkpoint.find(run, "last")).state["step"] == 40
    best = checkpoint.load_state(checkpoint.find(run, "best"))
    assert best["step"] == summary["eval"]["ema"]["best"]["step"]


@pytest.mark.parametrize("which", ["last", "best"])
def test_evaluating_a_run_again_gives_its_own_figures(fixmatch_run, which):
    _, run = fixmatch_run
    result = evaluate_run(run, which)
    line = next(x for x in metric_lines(run) if x["kind"] == "eval" and x["step"] == result["step"])
    assert {k: v for k, v in result.items() if k.startswith("eval/")} == {k: v for k, v in line.items() if k.startswith("eval/")}
    assert evaluate_run(run, which, split="validation")["eval/num_images"] == 12


def test_evaluating_does_not_depend_on_the_batch(fixmatch_run, tmp_path):
    recipe, run = fixmatch_run
    from fastssl.engine.assemble import build_evaluator, build_network_and_method, build_task, open_data
    from fastssl.engine.launch import launch

    accelerator = launch(recipe)
    data = open_data(recipe, accelerator.device)
    network, _ = build_network_and_method(recipe, data.manifest, 3, build_task(recipe, data), 1)
    evaluator = build_evaluator(recipe, data.manifest, data.split, "test", 3, accelerator.device)
    results = []
    for batch in (1, 7, 22, 500):
        evaluator.batch = batch
        results.append(evaluator({"raw": network}, accelerator)["raw"])
        assert network.training
    for result in results[1:]:
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
        assert {k: v for k, v in result.items() if k != "loss"} == {k: v for k, v in results[0].items() if k != "loss"}


def test_supervised_run_without_a_teacher(tiny_data, tmp_path):
    recipe = tiny_recipe(tiny_data, tmp_path / "runs", "teacher.enabled=false", "eval.headline=raw", "data.eval_on=validation", method="erm")
    run = train(recipe, run_dir=tmp_path / "here")
    assert run == tmp_path / "here"
    trains = [x for x in metric_lines(run) if x["kind"] == "train"]
    assert all(set(x) == TRAIN_NAMES for x in trains) and [x["step"] for x in trains] == [3, 6, 9, 12]
    last = metric_lines(run)[-1]
    assert last["eval/num_images"] == 12 and "eval/ema/top1" not in last and last["eval/top1"] == last["eval/raw/top1"]
    with pytest.raises(CheckpointError, match="never overwritten"):
        train(recipe, run_dir=run)


def test_bf16_trains(tiny_data, tmp_path):
    run = train(tiny_recipe(tiny_data, tmp_path / "runs", "train.precision=bf16", "train.steps=4"))
    assert json.loads((run / "summary.json").read_text())["precision"] == "bf16"


def test_stopping_checkpoints_the_current_update(tiny_data, tmp_path):
    recipe = tiny_recipe(tiny_data, tmp_path / "runs")
    with pytest.raises(Interrupted) as stopped:
        train(recipe, stop=lambda finished: finished == 7)
    assert stopped.value.exit_code == 143
    run = stopped.value.run
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["steps"] == 7
    assert checkpoint.load_state(checkpoint.find(run))["step"] == 7


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("train.capture=on", RecipeError, "CUDA graphs need a CUDA device"),
        ("train.precision=fp16", RecipeError, "needs a CUDA device"),
        ("data.split=tinny", DataError, "tiny"),
        ("data.path=/nowhere", DataError, "does not exist"),
        ("augment.mean=[0.5]", RecipeError, "3 channel"),
    ],
)
def test_what_cannot_be_trained_leaves_no_run_folder(tiny_data, tmp_path, override, error, words):
    if torch.cuda.is_available() and "fp16" in override:
        pytest.skip("a CUDA device has fp16")
    with pytest.raises(error, match=words):
        train(tiny_recipe(tiny_data, tmp_path / "runs", override))
    assert not (tmp_path / "runs").exists()


def test_missing_tracker_package_is_said(tiny_data, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr("fastssl.engine.trackers.importlib.util.find_spec", lambda name, *a: None if name == "wandb" else real(name, *a))
    with pytest.raises(RecipeError, match="wandb.*not installed"):
        train(tiny_recipe(tiny_data, tmp_path / "runs", "log.trackers=[wandb]"))
