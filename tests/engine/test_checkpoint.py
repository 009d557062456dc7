"""Checkpoints on disk: complete or absent, verified when read, links that always point at something whole."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from fastssl.engine import checkpoint
from fastssl.engine.checkpoint import Snapshot
from fastssl.errors import CheckpointError


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return Snapshot(
        {
            "student": {"conv.weight": weights, "count": torch.tensor(step), "half": weights[0].bfloat16()},
            "method": {},
            "rank-00000": {"rng/cpu": torch.get_rng_state()},
        },
        {"config_digest": "abc", "best": {"step": step, "top1": 0.1 + 0.2}, "none": None},
    )


def save(folder: Path, step: int, *, best: bool = False, keep: int = 2) -> Path:
    return checkpoint.save(folder, snapshot(step), step=step, best=best, keep=keep)


def test_round_trip_is_exact(tmp_path):
    path = save(tmp_path, 7)
    loaded = checkpoint.load(path)
    assert loaded.state["step"] == 7 and loaded.state["best"] == {"step": 7, "top1": 0.1 + 0.2} and loaded.state["none"] is None
    for group, tensors in snapshot(7).tensors.items():
        assert loaded.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded.tensors[group][name].dtype == tensor.dtype and torch.equal(loaded.tensors[group][name], tensor)


def test_links_and_pruning(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, best=step == 2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000004", "step-00000005"]
    assert os.readlink(tmp_path / "last") == "step-00000005" and os.readlink(tmp_path / "best") == "step-00000002"
    assert checkpoint.find(tmp_path, "best").name == "step-00000002"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["student.safetensors", "rank-00000.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_found(tmp_path, name, how):
    save(tmp_path, 3)
    path = save(tmp_path, 6)
    file = path / name
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    elif how == "cut":
        file.write_bytes(bytes(content[:-9]))
    else:
        file.unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)
    assert how == "remove" and name == "state.json" or "step-00000003" in str(error.value)  # names the other one to go on from


def test_a_changed_figure_in_the_state_is_found(tmp_path):
    path = save(tmp_path, 3)
    sealed = json.loads((path / "state.json").read_text())
    sealed["state"]["step"] = 2
    (path / "state.json").write_text(json.dumps(sealed))
    with pytest.raises(CheckpointError, match="state.json is not what was written"):
        checkpoint.load(path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such"):
        checkpoint.find(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no loadable"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("call", range(4))
def test_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, call):
    """Whichever file the disk refuses: one error that names the last good one, which still loads, and no rubbish."""
    good = save(tmp_path, 1)
    real, calls = checkpoint.write_synced, []

    def refuse(path, content):
        calls.append(path)
        if len(calls) > call:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_synced", refuse)
    with pytest.raises(CheckpointError, match="No space left on device") as error:
        save(tmp_path, 2, best=True)
    assert str(good) in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["last", "step-00000001"]
    assert checkpoint.load(checkpoint.find(tmp_path)).state["step"] == 1


def test_leftovers_of_a_kill_are_removed_and_never_read(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / f"{checkpoint.TEMPORARY}step-00000002"
    half.mkdir()
    (half / "student.safetensors").write_bytes(b"half")
    assert checkpoint.find(tmp_path).name == "step-00000001"
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["last", "step-00000001", "step-00000002"]


def test_rewind_drops_the_future(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, best=True, keep=9)
    assert checkpoint.rewind(tmp_path, 2, best_step=1) == ["step-00000003"]
    assert os.readlink(tmp_path / "last") == "step-00000002" and os.readlink(tmp_path / "best") == "step-00000001"
    save(tmp_path, 3, best=True)
    assert checkpoint.rewind(tmp_path, 2, best_step=None) == ["step-00000003"]
    assert not (tmp_path / "best").is_symlink()


def test_saving_over_a_step_that_exists(tmp_path):
    save(tmp_path, 2)
    path = save(tmp_path, 2, best=True)
    assert checkpoint.load(path).state["step"] == 2 and sorted(os.listdir(tmp_path))[:2] == ["best", "last"]
