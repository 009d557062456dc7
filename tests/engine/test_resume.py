"""A run that was stopped or killed and resumed equals one that never was: weights, optimiser, method, teacher, metrics, bit for bit."""

import json
import multiprocessing
import os
import random
import re
import signal
from dataclasses import replace

import pytest
import torch

from fastssl.engine import checkpoint
from fastssl.engine.launch import launch
from fastssl.engine.state import restore
from fastssl.engine.stop import Interrupted
from fastssl.engine.train import Trainer, train
from fastssl.errors import CheckpointError
from tests.helpers import PATIENCE_S, metric_lines, run_python, signal_at_first_checkpoint, tiny_recipe, without_times, write_recipe


def recipe_for(data, runs, *overrides, method="fixmatch"):
    # Dropout, so that the network's own random numbers have to survive; steps per epoch 5, checkpoint every 4, log every 3: nothing coincides.
    recipe = tiny_recipe(data, runs, "train.steps=13", *overrides, method=method)
    return replace(recipe, model=replace(recipe.model, name="small_resnet", options={"width": 4, "stages": 2, "dropout": 0.3}))


def assert_same_run(left, right):
    assert without_times(metric_lines(left)) == without_times(metric_lines(right))
    a, b = (checkpoint.load(checkpoint.find(run)) for run in (left, right))
    assert a.tensors.keys() == b.tensors.keys() and {"student", "teacher", "method", "optimizer", "rank-00000"} <= a.tensors.keys()
    for group, tensors in a.tensors.items():
        assert tensors.keys() == b.tensors[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b.tensors[group][name]), f"{group}: {name}"
    assert (a.state["evals"], a.state["best"]) == (b.state["evals"], b.state["best"])
    names = [sorted(p.name for p in (run / "checkpoints").iterdir()) for run in (left, right)]
    assert names[0] == names[1]
    assert os.readlink(left / "checkpoints/best") == os.readlink(right / "checkpoints/best")


@pytest.fixture(scope="module", params=["fixmatch", "erm"])
def straight(request, tiny_data, tmp_path_factory):
    """(method, an uninterrupted run)."""
    return request.param, train(recipe_for(tiny_data, tmp_path_factory.mktemp("straight"), method=request.param))


def test_a_run_repeats_itself(straight, tiny_data, tmp_path):
    method, run = straight
    assert_same_run(run, train(recipe_for(tiny_data, tmp_path, method=method)))


@pytest.mark.parametrize("stop_at", [1, 5, 8, 12])
def test_stop_and_resume(straight, tiny_data, tmp_path, stop_at, capsys):
    method, run = straight
    recipe = recipe_for(tiny_data, tmp_path, method=method)
    with pytest.raises(Interrupted) as stopped:
        train(recipe, stop=lambda finished: finished == stop_at)
    resumed = train(recipe, resume="auto")
    assert [entry["after_step"] for entry in json.loads((resumed / "env.json").read_text())["resumed"]] == [stop_at]
    assert resumed == stopped.value.run and f"resuming {resumed}" in capsys.readouterr().out
    steps = [x["step"] for x in metric_lines(resumed)]
    assert steps == sorted(steps)
    lines = [without_times(metric_lines(r)) for r in (run, resumed)]
    assert lines[0] == lines[1]
    a, b = (checkpoint.load(checkpoint.find(r)) for r in (run, resumed))
    for group, tensors in a.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b.tensors[group][name]), f"{group}: {name}"


def _killed(recipe, kill_step, kill_write):
    """In a process of its own: train, and die without a word after an update or in the middle of writing a checkpoint file."""
    torch.set_num_threads(1)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    if kill_write:
        real, writes = checkpoint.write_synced, []

        def write(path, content):
            writes.append(path)
            real(path, content[: len(content) // 2] if len(writes) == kill_write else content)
            if len(writes) == kill_write:
                die()

        checkpoint.write_synced = write
    train(recipe, stop=lambda finished: die() if finished == kill_step else False)


@pytest.fixture(scope="module")
def fresh_processes():
    """Processes that have imported everything and done nothing. A fork of this one will not do: autograd refuses to work in it once it has threads here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@pytest.mark.parametrize("case", range(4))
def test_kill_and_resume(straight, fresh_processes, tiny_data, tmp_path, case):
    """SIGKILL at a random update (even cases) or inside the writing of a later checkpoint (odd cases)."""
    method, run = straight
    rng = random.Random(f"{method} {case}")
    recipe = recipe_for(tiny_data, tmp_path, method=method)
    kill_step, kill_write = (rng.randint(5, 12), 0) if case % 2 == 0 else (0, rng.randint(7, 18))
    process = fresh_processes.Process(target=_killed, args=(recipe, kill_step, kill_write))
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL
    resumed = train(recipe, resume="auto")
    assert len(list((tmp_path / "tiny").iterdir())) == 1
    assert_same_run(run, resumed)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_signals_through_the_command_line(tiny_data, tmp_path, signum, code):
    steps = 20000  # far more than can be done before the signal
    lengths = (f"train.steps={steps}", "train.steps_per_epoch=4000", "checkpoint.every=10", "log.every=7", "eval.every=1000")
    recipe = tiny_recipe(tiny_data, tmp_path / "runs", *lengths, "model.options.width=48")  # wide enough that updates take their time
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    process = run_python("-m", "fastssl", "train", str(path), wait=False)
    run, output = signal_at_first_checkpoint(process, tmp_path / "runs", signum)
    assert process.returncode == code, output
    step = checkpoint.load_state(checkpoint.find(run))["step"]
    assert 10 <= step < steps
    if signum == signal.SIGKILL:
        assert not (run / "summary.json").exists() and step % 10 == 0
    else:
        assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    # A straight run to 5 updates further and the resumed one agree there.
    goal = step + 5

    def until(finished):
        return finished == goal

    with pytest.raises(Interrupted):
        train(recipe, resume="auto", stop=until)
    with pytest.raises(Interrupted) as straight:
        train(replace(recipe, runs_dir=str(tmp_path / "straight")), stop=until)
    a, b = (checkpoint.load(checkpoint.find(r)) for r in (run, straight.value.run))
    assert a.state["step"] == b.state["step"] == goal
    for group, tensors in a.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b.tensors[group][name]), f"{group}: {name}"
    assert without_times(metric_lines(run)) == without_times(metric_lines(straight.value.run))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_update_and_leaves_the_handlers_as_they_were(tiny_data, tmp_path, signum, code):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as stopped:
        train(tiny_recipe(tiny_data, tmp_path), stop=lambda finished: finished == 7 and bool(os.kill(os.getpid(), signum)))
    assert stopped.value.exit_code == code and stopped.value.step == 7
    assert checkpoint.load_state(checkpoint.find(stopped.value.run))["step"] == 7
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_clock_goes_on(tiny_data, tmp_path):
    recipe = tiny_recipe(tiny_data, tmp_path)
    with pytest.raises(Interrupted) as stopped:
        train(recipe, stop=lambda finished: finished == 11)
    trainer = Trainer(recipe, launch(recipe), "digest")
    assert restore(trainer.updater, checkpoint.load(checkpoint.find(stopped.value.run)))
    clock = trainer.updater.clock
    assert (clock.step, int(clock.tensors.step), int(clock.tensors.epoch)) == (11, 11, 2)


def test_auto_with_nothing_to_resume_starts_fresh_and_says_so(tiny_data, tmp_path, capsys):
    recipe = tiny_recipe(tiny_data, tmp_path, "train.steps=2")
    first = train(recipe, resume="auto")
    assert "starting fresh: no unfinished run" in capsys.readouterr().out
    assert train(recipe, resume="auto") != first  # the first one is finished


def test_auto_ignores_other_configurations(tiny_data, tmp_path):
    with pytest.raises(Interrupted) as stopped:
        train(tiny_recipe(tiny_data, tmp_path), stop=lambda finished: finished == 5)
    assert train(tiny_recipe(tiny_data, tmp_path, "seed=1"), resume="auto") != stopped.value.run
    with pytest.raises(CheckpointError, match="another configuration"):
        train(tiny_recipe(tiny_data, tmp_path, "seed=2"), resume=str(stopped.value.run))
    assert train(tiny_recipe(tiny_data, tmp_path), resume=str(stopped.value.run)) == stopped.value.run


def test_resume_from_an_older_checkpoint_by_path(tiny_data, tmp_path):
    recipe = tiny_recipe(tiny_data, tmp_path, "checkpoint.keep=9")
    with pytest.raises(Interrupted) as stopped:
        train(recipe, stop=lambda finished: finished == 9)
    run = stopped.value.run
    assert train(recipe, resume=str(run / "checkpoints" / "step-00000004")) == run
    straight = train(tiny_recipe(tiny_data, tmp_path / "other", "checkpoint.keep=9"))
    assert_same_run(straight, run)


@pytest.mark.parametrize("where", ["", "checkpoints", "nowhere"])
def test_resume_path_without_a_checkpoint_is_an_error(tiny_data, tmp_path, where):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "empty" / where).rstrip("/"))):
        train(tiny_recipe(tiny_data, tmp_path / "runs"), resume=str(tmp_path / "empty" / where))
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_has_nothing_to_go_on_with(tiny_data, tmp_path):
    recipe = tiny_recipe(tiny_data, tmp_path, "train.steps=2")
    run = train(recipe)
    with pytest.raises(CheckpointError, match="finished run"):
        train(recipe, resume=str(run))
