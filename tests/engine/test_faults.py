"""What goes wrong ends with one clear error, the last good checkpoint in place, and a summary that says so."""

import errno
import json
import os
import shutil
import socket

import numpy as np
import pytest
import torch

from fastssl.engine import checkpoint
from fastssl.engine.launch import check_batches
from fastssl.engine.runfolder import RunFolder, broken_disk
from fastssl.engine.step import Updater
from fastssl.engine.stop import Interrupted
from fastssl.engine.train import Trainer, train
from fastssl.errors import CheckpointError, DataError, FastSSLError, RecipeError, TrainingError
from tests.helpers import PATIENCE_S, make_dataset, metric_lines, run_python, tiny_recipe, write_recipe, write_split


def only_run(runs):
    (run,) = (runs / "tiny").iterdir()
    return run


def test_an_exploding_run_stops_and_keeps_the_last_good_checkpoint(tiny_data, tmp_path, monkeypatch):
    """The loss of update 7 is made infinite; seen at the next log line, before anything flagged is saved."""
    recipe = tiny_recipe(tiny_data, tmp_path, "log.every=3", "checkpoint.every=2")
    real = Updater.__call__

    def poisoned(self, raw, step):
        if step == 6:
            with torch.no_grad():
                self.train_module.network.classifier.weight.fill_(float("inf"))
        return real(self, raw, step)

    monkeypatch.setattr(Updater, "__call__", poisoned)
    with pytest.raises(TrainingError, match="loss of update 7 is not finite") as error:
        train(recipe)
    run = only_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "failed" and "update 7" in summary["error"]
    good = checkpoint.find(run)
    assert str(good) in str(error.value) and checkpoint.load(good).state["step"] == 6
    monkeypatch.undo()
    assert train(recipe, resume="auto") == run  # the good state is good


def test_a_huge_rate_is_noticed(tiny_data, tmp_path):
    with pytest.raises(TrainingError, match="not finite"):
        train(tiny_recipe(tiny_data, tmp_path, "optim.lr=1e30", "log.every=1"))
    assert not (only_run(tmp_path) / "checkpoints" / "last").exists()


def test_broken_weights_under_a_finite_loss_are_never_saved(tiny_data, tmp_path, monkeypatch):
    """The flag looks at losses; a state whose very last update broke the weights has none yet and must be refused all the same."""
    recipe = tiny_recipe(tiny_data, tmp_path, "checkpoint.every=2", "log.every=100")
    real = Updater.__call__

    def break_weights_after(self, raw, step):
        loss = real(self, raw, step)
        if step == 3:
            with torch.no_grad():
                next(self.train_module.network.parameters()).fill_(float("nan"))
        return loss

    monkeypatch.setattr(Updater, "__call__", break_weights_after)
    with pytest.raises(TrainingError, match=r"state after update 4 is not finite \(student: "):
        train(recipe)
    assert checkpoint.load(checkpoint.find(only_run(tmp_path))).state["step"] == 2


BREAKS = {
    "student: backbone.*running_var": lambda updater: next(b for n, b in updater.train_module.network.named_buffers() if n.endswith("running_var")),
    "teacher: network.*running_mean": lambda updater: next(b for n, b in updater.teacher.network.named_buffers() if n.endswith("running_mean")),
    "teacher: network.*weight": lambda updater: next(updater.teacher.network.parameters()),
    "method: prior": lambda updater: updater.train_module.method.prior,
    "optimizer: momentum_buffer/": lambda updater: next(iter(updater.optimizer.state.values()))["momentum_buffer"],
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nothing_broken_is_scored_or_saved(tiny_data, tmp_path, monkeypatch, name, value):
    """One broken number anywhere in what a checkpoint holds, with finite losses: no eval line, no checkpoint, and the tensor's name."""
    recipe = tiny_recipe(tiny_data, tmp_path, "train.steps=4", "checkpoint.every=2", "eval.every=3", "log.every=100")
    real_init, real_call = Trainer.__init__, Updater.__call__

    def with_prior(self, *args):
        real_init(self, *args)
        self.updater.train_module.method.register_buffer("prior", torch.ones(4))

    def break_after(self, raw, step):
        loss = real_call(self, raw, step)
        if step == 2:
            with torch.no_grad():
                broken = BREAKS[name](self)
                broken[(-1,) * broken.ndim] = value
        return loss

    monkeypatch.setattr(Trainer, "__init__", with_prior)
    monkeypatch.setattr(Updater, "__call__", break_after)
    with pytest.raises(TrainingError, match=rf"state after update 3 is not finite \({name}.*last good checkpoint is"):
        train(recipe)
    run = only_run(tmp_path)
    assert checkpoint.load(checkpoint.find(run)).state["step"] == 2
    assert not (run / "metrics.jsonl").exists() or "eval" not in {line["kind"] for line in metric_lines(run)}


def test_a_full_disk_while_saving(tiny_data, tmp_path, monkeypatch):
    recipe = tiny_recipe(tiny_data, tmp_path)
    real, writes = checkpoint.write_synced, []

    def refuse(path, content):
        writes.append(path)
        if "step-00000008" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_synced", refuse)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(recipe)
    run = only_run(tmp_path)
    assert checkpoint.load(checkpoint.find(run)).state["step"] == 5  # saved after the first evaluation, which was the best
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    assert train(recipe, resume="auto") == run
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_a_full_disk_while_logging(tiny_data, tmp_path, monkeypatch):
    def refuse(self, line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunFolder, "add_metrics", refuse)
    with pytest.raises(FastSSLError, match="No space left on device"):
        train(tiny_recipe(tiny_data, tmp_path))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
def test_only_a_full_disk_is_told_to_free_space(tiny_data, tmp_path, monkeypatch, code):
    def refuse(path, content):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(checkpoint, "write_synced", refuse)
    with pytest.raises(CheckpointError, match=f"{os.strerror(code)}: .*student.safetensors") as error:
        train(tiny_recipe(tiny_data, tmp_path))
    assert ("free space" in str(error.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert ("free space" in str(broken_disk(tmp_path, OSError(code, os.strerror(code))))) == (code in (errno.ENOSPC, errno.EDQUOT))


def test_a_run_folder_that_disappears(tiny_data, tmp_path):
    with pytest.raises(CheckpointError, match="cannot write .*No such file or directory"):
        train(tiny_recipe(tiny_data, tmp_path, "log.every=1"), stop=lambda finished: finished == 2 and shutil.rmtree(only_run(tmp_path)))


@pytest.mark.parametrize(("where", "words"), [("/proc/x", "No such file or directory"), ("file", "Not a directory"), ("file/below", "Not a directory")])
@pytest.mark.parametrize("resume", [None, "auto"])
def test_an_unusable_runs_dir_is_one_error(tiny_data, tmp_path, where, words, resume):
    (tmp_path / "file").write_text("a regular file")
    with pytest.raises(CheckpointError, match=f"cannot write .*({words}|File exists).*choose another runs_dir"):
        train(tiny_recipe(tiny_data, tmp_path / where), resume=resume)


def test_an_unusable_runs_dir_ends_every_rank(tiny_data, tmp_path):
    """Two ranks without a launcher, so that nobody ends the one for the other: each says it and ends with status 2; none waits."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_recipe(tiny_data, tmp_path / "r.yaml" / "runs", method="erm"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [run_python("-m", "fastssl", "train", str(recipe), env={**world, "RANK": r, "LOCAL_RANK": r}, wait=False) for r in "01"]
    try:
        outputs = [rank.communicate(timeout=PATIENCE_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    assert "error: cannot write" in outputs[0] and not any("Traceback" in output for output in outputs)


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_a_damaged_checkpoint_is_an_error_and_never_a_fresh_start(tiny_data, tmp_path, resume):
    recipe = tiny_recipe(tiny_data, tmp_path)
    with pytest.raises(Interrupted) as stopped:
        train(recipe, stop=lambda finished: finished == 6)
    run = stopped.value.run
    file = run / "checkpoints" / "last" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 0xFF
    file.write_bytes(bytes(content))
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="optimizer.safetensors is not what was written"):
        train(recipe, resume="auto" if resume == "auto" else str(run))
    assert only_run(tmp_path) == run and (run / "metrics.jsonl").read_bytes() == before
    # The error names the checkpoint beside it, from which one may go on.
    assert train(recipe, resume=str(run / "checkpoints" / "step-00000005")) == run


def test_a_broken_image_file_names_itself(tmp_path):
    data = make_dataset(tmp_path / "data")
    pixels = data / "train.pixels.npy"
    pixels.write_bytes(pixels.read_bytes()[:-100])
    with pytest.raises(DataError, match="train.pixels.npy"):
        train(tiny_recipe(data, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_source_that_fails_in_mid_run(tiny_data, tmp_path, monkeypatch):
    real = Trainer._feed

    def failing(self):
        fill, calls = self.data.source.fill, []

        def broken(rows, out):
            calls.append(rows)
            if len(calls) > 12:
                raise OSError(errno.EIO, "Input/output error")
            fill(rows, out)

        monkeypatch.setattr(self.data.source, "fill", broken)
        return real(self)

    monkeypatch.setattr(Trainer, "_feed", failing)
    with pytest.raises(TrainingError, match="step 6.*Input/output error"):
        train(tiny_recipe(tiny_data, tmp_path))
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["steps"] == 6 and "Input/output error" in summary["error"]


def test_empty_splits(tmp_path):
    data = make_dataset(tmp_path / "data")
    write_split(data, "all_labeled", np.arange(64), [], [])
    with pytest.raises(DataError, match="no unlabeled rows"):
        train(tiny_recipe(data, tmp_path / "runs", "data.split=all_labeled", "data.include_labeled=false"))
    with pytest.raises(DataError, match="no validation rows"):
        train(tiny_recipe(data, tmp_path / "runs", "data.split=all_labeled", "data.eval_on=validation"))
    write_split(data, "nothing", [], np.arange(64), [])
    with pytest.raises(DataError, match="no label"):
        train(tiny_recipe(data, tmp_path / "runs", "data.split=nothing"))
    assert not (tmp_path / "runs").exists()


def test_a_world_that_does_not_divide_the_batches(tiny_data, tmp_path):
    recipe = tiny_recipe(tiny_data, tmp_path, "data.labeled_batch=6", "data.unlabeled_batch=9")
    for world in (1, 3):
        check_batches(recipe, world)
    with pytest.raises(RecipeError, match=r"2 processes do not divide.*labeled_batch = 6.*unlabeled_batch = 9.*\[1, 3\]"):
        check_batches(recipe, 2)
    check_batches(recipe, 2, unlabeled=False)  # methods without unlabelled images do not care


def test_data_that_changed_under_a_checkpoint(tmp_path):
    data = make_dataset(tmp_path / "data")
    recipe = tiny_recipe(data, tmp_path / "runs")
    with pytest.raises(Interrupted):
        train(recipe, stop=lambda finished: finished == 6)
    write_split(data, "tiny", np.arange(1, 9), np.arange(9, 52), np.arange(52, 64))
    with pytest.raises(CheckpointError, match="changed since the checkpoint"):
        train(recipe, resume="auto")
