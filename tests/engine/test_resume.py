"""A run that was stopped or killed and resumed equals one that never was: weights, optimiser, method, teacher, metrics, bit for bit."""

import ctypes
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch

from fastssl.engine import checkpoint, runlock
from fastssl.engine.launch import launch
from fastssl.engine.runfolder import begin
from fastssl.engine.runlock import RunLock
from fastssl.engine.state import restore
from fastssl.engine.stop import Interrupted, stop_with_parent
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


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _killed(recipe, how, step, write):
    """In a process of its own: train and die without a word.

    ``how``: "update" = after update ``step``, before its log line; "saved" = as soon as the checkpoint of ``step`` is complete; "writing" = in the
    middle of the ``write``-th file of that checkpoint; "renamed" = between the checkpoint's rename and its links.
    """
    torch.set_num_threads(1)
    name = checkpoint.step_name(step)
    save, write_synced, point, files = checkpoint.save, checkpoint.write_synced, checkpoint.point, []

    def dying_save(*args, **options):
        path = save(*args, **options)
        if path.name == name:
            _die()

    def dying_write(path, content):
        files.extend([path] if path.parent.name.endswith(name) else [])
        write_synced(path, content[: len(content) // 2] if len(files) == write else content)
        if len(files) == write:
            _die()

    def dying_point(folder, link, target):
        if target == name:
            _die()
        point(folder, link, target)

    if how == "saved":
        checkpoint.save = dying_save
    elif how == "writing":
        checkpoint.write_synced = dying_write
    elif how == "renamed":
        checkpoint.point = dying_point
    train(recipe, resume="auto", stop=lambda finished: _die() if how == "update" and finished == step else False)


@pytest.fixture(scope="module")
def fresh_processes():
    """Processes that have imported everything and done nothing. A fork of this one will not do: autograd refuses to work in it once it has threads here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


LEGS = (([6, 7], 8), ([9, 11], 12), ([13], 13))  # of a run of 13: updates inside an epoch of 5, and a checkpoint that comes after them
HOWS = ("update", "saved", "writing", "renamed")


def kill_points(seed):
    """Three kills in ascending order, of three different kinds: [(how, step, file)]."""
    rng = random.Random(seed)
    return [(how, rng.choice(mid) if how == "update" else saved, rng.randint(1, 6)) for how, (mid, saved) in zip(rng.sample(HOWS, 3), LEGS, strict=True)]


def test_the_kill_points_cover_every_kind():
    points = [point for method in ("fixmatch", "erm") for case in range(3) for point in kill_points(f"{method} {case}")]
    assert {how for how, _, _ in points} == set(HOWS) and len({step for how, step, _ in points if how == "update"}) > 1
    assert len({file for how, _, file in points if how == "writing"}) > 1
    assert ("saved", 13) in {(how, step) for how, step, _ in points}, "none between the last checkpoint and the summary"


@pytest.mark.parametrize("case", range(3))
def test_kill_and_resume(straight, fresh_processes, tiny_data, tmp_path, case):
    """SIGKILL three times in one run: in an epoch, after a checkpoint, inside the writing of one."""
    method, run = straight
    recipe = recipe_for(tiny_data, tmp_path, method=method)
    for how, step, file in kill_points(f"{method} {case}"):
        process = fresh_processes.Process(target=_killed, args=(recipe, how, step, file))
        process.start()
        process.join(PATIENCE_S)
        assert process.exitcode == -signal.SIGKILL, (how, step, file)
    resumed = train(recipe, resume="auto")
    assert len(list((tmp_path / "tiny").iterdir())) == 1
    assert len(json.loads((resumed / "env.json").read_text())["resumed"]) == 3
    assert json.loads((resumed / "summary.json").read_text())["status"] == "finished"
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


@pytest.mark.parametrize("to", ["launcher", "group"])
def test_accelerate_launch_takes_its_training_along(tiny_data, tmp_path, to):
    """SIGTERM to the launcher alone, or SIGINT to its whole group (Ctrl-C): the training checkpoints and ends; no orphan goes on."""
    lengths = ("train.steps=200000", "train.steps_per_epoch=200000", "checkpoint.every=10", "log.every=50", "model.options.width=48")
    path = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tiny_data, tmp_path / "runs", *lengths))
    command = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "fastssl", "train", str(path))
    launcher = run_python(*command, wait=False, own_group=True)
    children = []
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not list((tmp_path / "runs").glob("*/*/checkpoints/last")) and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        children = psutil.Process(launcher.pid).children()
        assert len(children) == 1
        if to == "launcher":
            launcher.send_signal(signal.SIGTERM)
        else:
            os.killpg(launcher.pid, signal.SIGINT)
        gone, alive = psutil.wait_procs(children, timeout=60)
        assert not alive, "the training went on without its launcher"
    finally:
        for process in (*children, launcher):
            if isinstance(process, subprocess.Popen) or process.is_running():
                process.kill()
        output, _ = launcher.communicate(timeout=PATIENCE_S)
    (run,) = (tmp_path / "runs" / "tiny").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    name = "SIGTERM" if to == "launcher" else "SIGINT"
    assert summary["status"] == "interrupted" and f"stopped by {name}" in summary["error"], output
    assert checkpoint.load_state(checkpoint.find(run))["step"] == summary["steps"] >= 10


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_update_and_leaves_the_handlers_as_they_were(tiny_data, tmp_path, signum, code):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as stopped:
        train(tiny_recipe(tiny_data, tmp_path), stop=lambda finished: finished == 7 and bool(os.kill(os.getpid(), signum)))
    assert stopped.value.exit_code == code and stopped.value.step == 7
    assert checkpoint.load_state(checkpoint.find(stopped.value.run))["step"] == 7
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has this signal")
def test_after_a_first_signal_the_launchers_end_is_no_second_one(tiny_data, tmp_path):
    """Ctrl-C reaches launcher and training alike; the launcher's end, which follows, must not cut off the checkpoint."""

    def at_parents_end():
        value = ctypes.c_int(-1)
        assert ctypes.CDLL(None).prctl(2, ctypes.byref(value)) == 0  # PR_GET_PDEATHSIG
        return value.value

    seen = []

    def interrupt(finished):
        seen.append(at_parents_end())
        if finished == 7:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        stop_with_parent(os.getppid())
        with pytest.raises(Interrupted):
            train(tiny_recipe(tiny_data, tmp_path), stop=interrupt)
        assert seen == [signal.SIGTERM] * 7 and at_parents_end() == 0
    finally:
        ctypes.CDLL(None).prctl(1, 0)


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


def _held(recipe, ready, go):
    """In a process of its own: a run that has a checkpoint and waits, alive, before its 7th update ends."""
    torch.set_num_threads(1)

    def wait(finished):
        if finished == 7:
            ready.set()
            go.wait(PATIENCE_S)
        return False

    train(recipe, stop=wait)


@pytest.fixture
def living(fresh_processes, tiny_data, tmp_path):
    """(recipe, its run that another process trains, that process, the event that lets it go on)."""
    recipe, (ready, go) = recipe_for(tiny_data, tmp_path), (fresh_processes.Event(), fresh_processes.Event())
    process = fresh_processes.Process(target=_held, args=(recipe, ready, go))
    process.start()
    try:
        assert ready.wait(PATIENCE_S)
        (run,) = (tmp_path / "tiny").iterdir()
        yield recipe, run, process, go
    finally:
        process.kill()
        process.join()


def test_a_living_run_is_left_alone(living, capsys):
    recipe, run, process, go = living
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "last" not in p.parts and "best" not in p.parts}
    for path in (run, run / "checkpoints" / "last"):
        with pytest.raises(CheckpointError, match=f"{re.escape(str(run))} is being trained right now by process {process.pid} on .*stop that process"):
            train(recipe, resume=str(path))
    other = train(recipe, resume="auto")
    said = capsys.readouterr().out
    assert other != run and f"starting fresh: {run} is being trained right now by process {process.pid}" in said
    assert {p: p.read_bytes() for p in before} == before
    go.set()
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    assert_same_run(other, run)


def test_auto_goes_on_with_an_older_run_beside_a_living_one_and_a_killed_one_is_free_at_once(living, capsys):
    recipe, run, process, _ = living
    older = run.with_name("20000101-000000-aaaaaa")
    shutil.copytree(run, older, symlinks=True)
    assert train(recipe, resume="auto") == older
    assert f"resuming {older}" in (said := capsys.readouterr().out) and f"{run} is being trained right now" in said
    process.kill()
    process.join()
    assert train(recipe, resume="auto") == run


def test_two_starts_into_one_folder(living):
    recipe, run, _, _ = living
    (run / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="taken by another run"), RunLock() as lock:
        begin(run, lock)
    with pytest.raises(CheckpointError, match="never overwritten"):
        train(recipe, run_dir=run)


def test_a_child_that_outlives_the_run_does_not_hold_its_folder(tmp_path):
    lock, (ready, done) = RunLock(), os.pipe()
    assert lock.take(tmp_path) and not RunLock().take(tmp_path)
    child = os.fork()
    if child == 0:
        os.write(done, b"x")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(ready, 1)
        assert not RunLock().take(tmp_path), "a child let go of what its parent holds"
        os.close(lock._handle)  # what the end of the process does
        with RunLock() as other:
            assert other.take(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        runlock._held.discard(lock._handle)
        os.close(ready)
        os.close(done)


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
