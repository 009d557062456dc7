"""A recipe of every family goes through the door that users take, with the smallest network and dataset that its settings bear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastssl import cli
from tests.helpers import make_dataset

SMALL = (
    "data.split=tiny", "data.device_resident=no", "augment.size=8", "augment.weak=flip", "augment.strong=flip", "augment.eval=plain",
    "model.options={width: 4, layers: 2}", "model.weights=", "train.steps=4", "train.steps_per_epoch=2", "train.threads=1", "log.trackers=[]", "eval.batch=16",
)  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("tllib/mean_teacher@cifar10_supervised", ("teacher.buffers_matching=running",)),
        ("tllib/self_tuning@pets_moco_v2", ("method.projection_dim=8",)),
        ("tllib/dst@dtd_scratch", ()),
        ("simmatch/imagenet@1p", ("schedule.warmup_epochs=1",)),
        ("simmatch/shrinkmatch_imagenet@10p_eman", ("schedule.warmup_epochs=1", "data.unlabeled_batch=16")),
        ("simmatch/fixmatch_eman_imagenet@1p", ("schedule.warmup_epochs=1",)),
        ("simmatch/shrinkmatch_cifar@cifar10_40", ("data.labeled_law=mc_cifar(epoch_length=16)", "data.unlabeled_law=mc_cifar(epoch_length=16)")),
        ("simmatch/shrinkmatch_torchssl@stl10_40", ()),
        ("simpro/cifar10@exp=2", ()),
        ("acr/imagenet127@exp=1", ("augment.extra={labeled_weak: flip}",)),
        ("acr_d/stl10@exp=0", ()),
        ("longtail/fixmatch_cifar10@exp=1_adjusted", ()),
        ("classic/flexmatch@cifar100_400", ()),
    ],
)
def test_a_recipe_of_every_family_trains(recipe, more, tmp_path):
    data, run = make_dataset(tmp_path / "data"), tmp_path / "run"
    # Names of layers in the optimiser's patterns belong to the recipe's own network.
    patterns = () if recipe.startswith("tllib") else ("optim.no_decay=[bias]",)
    words = [f"data.path={data}", "model.name=small_cnn", "data.labeled_batch=8", "data.unlabeled_batch=8", *SMALL, *patterns, *more]
    assert cli.main(["train", recipe, *words, "--run-dir", str(run)]) == 0
    summary = json.loads(Path(run, "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 4


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("acr_d/cifar10@exp=0", ("method.class_counts=[1,2]",), "class_counts has 2 numbers, the dataset has 4 classes"),
        ("simmatch/imagenet@1p", ("schedule.warmup_epochs=1", "teacher.enabled=false"), "teacher.enabled = false must be true"),
        ("tllib/fixmatch@cifar10_supervised", ("teacher.enabled=true", "teacher.when=by_method"), "never moves the teacher"),
    ],
)
def test_settings_that_do_not_fit_are_one_message(recipe, more, message, tmp_path, capsys):
    data = make_dataset(tmp_path / "data")
    patterns = () if recipe.startswith("tllib") else ("optim.no_decay=[bias]",)
    words = [f"data.path={data}", "model.name=small_cnn", "data.labeled_batch=8", "data.unlabeled_batch=8", *SMALL, *patterns, *more]
    assert cli.main(["train", recipe, *words, "--run-dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
