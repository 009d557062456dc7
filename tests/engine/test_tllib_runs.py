"""The Transfer-Learning-Library's methods in real runs: through the recipe, the engine and its teacher policies, on a tiny dataset."""

import json

import pytest
import torch

from fastssl.engine.launch import launch
from fastssl.engine.prepare import prepare_method
from fastssl.engine.train import Trainer, train
from tests.engine.test_step import NoReadBack, op_streams
from tests.helpers import metric_lines, tiny_recipe

OPTIONS = {
    "debiasmatch": ["method.threshold=0.3", "method.reset_each_epoch=true"],
    "dst": ["method.threshold=0.3", "method.hidden=16"],
    "flexmatch": ["method.threshold=0.3", "method.one_value=keep"],
    "mean_teacher": ["method.sum_rows=true"],
    "noisy_student": [],
    "oracle": ["method.strong_weight=0.1"],
    "pi_model": [],
    "pseudo_label": [],
    "self_tuning": ["method.queue_size=3", "method.projection_dim=8", "teacher.when=by_method", "teacher.mode=train"],
    "uda": ["method.threshold=0.3", "method.mean_over=selected", "method.signal_annealing=log"],
}


def make_trainer(data, tmp_path, *overrides, method):
    recipe = tiny_recipe(data, tmp_path / "runs", *OPTIONS.get(method, []), *overrides, method=method)
    return Trainer(recipe, launch(recipe), "digest")


def updates(trainer, steps):
    with trainer._feed() as feed:
        return [trainer.updater(feed.next(), step) for step in range(steps)]


@pytest.mark.parametrize("method", OPTIONS)
def test_an_update_reads_nothing_back_and_is_the_same_each_time(tiny_data, tmp_path, method):
    trainer = make_trainer(tiny_data, tmp_path, "train.steps_per_epoch=2", method=method)

    def unread(updater, raw, step):
        if step == 0:  # lazy set-up may look at values, and so does rendering on the CPU, which has tests of its own
            updater.update(raw)
            views = updater.renderer.buffers
            updater.renderer = lambda raw: views
        else:
            with NoReadBack():
                updater.update(raw)

    first, second, third = op_streams(trainer, 5, unread)
    assert len(first) > 100 and first == second == third


@pytest.mark.parametrize("method", OPTIONS)
def test_a_run_trains_and_evaluates(tiny_data, tmp_path, method):
    run = train(tiny_recipe(tiny_data, tmp_path / "runs", *OPTIONS[method], "train.steps=6", method=method))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 6
    assert summary["num_labeled"] == (52 if method == "oracle" else 8)  # all rows but the 12 held out
    names = {name for line in metric_lines(run) for name in line}
    assert ("train/unsup_loss" in names) == (method != "oracle")


def test_head_only_moves_nothing_of_the_backbone(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, "method.head_only=true", method="erm")
    network = trainer.updater.train_module.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    updates(trainer, 3)
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_self_tunings_teacher_moves_twice_an_update(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, method="self_tuning")
    updates(trainer, 3)
    assert int(trainer.updater.teacher.updates) == 6


def test_a_noisy_student_learns_from_the_checkpoint_of_the_round_before(tiny_data, tmp_path):
    first = train(tiny_recipe(tiny_data, tmp_path / "runs", "train.steps=4", method="erm"))
    start = f"teacher.start={first / 'checkpoints' / 'last'}"
    recipe = tiny_recipe(tiny_data, tmp_path / "runs", "train.steps=4", start, "eval.headline=raw", method="noisy_student")
    trainer = Trainer(recipe, launch(recipe), "digest")
    views = trainer.updater.renderer.buffers
    assert set(views) == {"x", "u_s"}, "the weak view is rendered for the table alone"
    second = train(recipe)
    assert json.loads((second / "summary.json").read_text())["status"] == "finished"

    assert prepare_method(trainer.updater, trainer.streams, trainer.views)
    method, teacher = trainer.updater.train_module.method, trainer.updater.teacher
    assert method.table.abs().sum(1).all() and teacher.frozen
    before = teacher.network.classifier.weight.clone()
    updates(trainer, 2)
    assert torch.equal(teacher.network.classifier.weight, before)
