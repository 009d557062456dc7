"""Two gloo processes against one: the same rows, draws and views exactly; loss, gradients and state to rounding.

Rounding: in float32, gradients of one update within 1e-5 and the losses of eight updates within 1e-5; in float64 everything within 1e-10.
On plain backgrounds the weight gradients of convolutions are small differences of large sums: there 1e-4, whatever BatchNorm does.
That can only hold while no pseudo-label is decided by rounding, which the margins below make sure of.
"""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from fastssl.engine import checkpoint
from fastssl.engine.stop import Interrupted
from fastssl.engine.train import train
from tests.engine import distributed_worker
from tests.helpers import metric_lines, run_python, signal_at_first_checkpoint, tiny_recipe, write_recipe

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")


@pytest.fixture(scope="module")
def both(tiny_data, tmp_path_factory):
    """(results of one process, results of two)."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    distributed_worker.main(tiny_data, one)
    done = run_python(*TORCHRUN, "tests.engine.distributed_worker", str(tiny_data), str(two))
    assert done.returncode == 0, done.stdout + done.stderr
    left, right = (torch.load(folder / "results.pt", weights_only=False) for folder in (one, two))
    assert (left["world"], right["world"]) == (1, 2)
    return left["results"], right["results"]


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_samples_and_views_are_equal(both, case):
    for one, two in zip(both[0][case]["steps"], both[1][case]["steps"], strict=True):
        assert one["seen"] == two["seen"]


def relative(one, two):
    """Distance of two gradients over all parameters, relative to the first."""
    a, b = (torch.cat([g.flatten().double() for g in gradients.values()]) for gradients in (one, two))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("case", [case for case in distributed_worker.CASES if "fixmatch" in case])
def test_no_pseudo_label_is_decided_by_rounding(both, case):
    for results in both:
        for step in results[case]["steps"]:
            assert all(margin > 1e-4 for of_rank in step["margins"] for margin in of_rank.values()), step["margins"]


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_gradients_at_equal_weights_are_equal(both, case):
    limit = 1e-12 if case.endswith(distributed_worker.DOUBLE) else 1e-4 if case.endswith(distributed_worker.PLAIN) else 1e-5
    assert relative(both[0][case]["steps"][0]["gradients"], both[1][case]["steps"][0]["gradients"]) < limit


@pytest.mark.parametrize("case", [case for case in distributed_worker.CASES if case.endswith(distributed_worker.DOUBLE)])
def test_in_float64_every_update_is_equal(both, case):
    for one, two in zip(both[0][case]["steps"], both[1][case]["steps"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-12)
        assert relative(one["gradients"], two["gradients"]) < 1e-10
    for name, tensor in both[0][case]["state"].items():
        torch.testing.assert_close(both[1][case]["state"][name], tensor, atol=1e-11, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_losses_gradients_and_meters_agree(both, case):
    atol = 1e-4 if case.endswith(distributed_worker.PLAIN) else 1e-5
    for step, (one, two) in enumerate(zip(both[0][case]["steps"], both[1][case]["steps"], strict=True)):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5), step
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(two["gradients"][name], gradient, atol=atol, rtol=1e-4, msg=lambda m, s=step, n=name: f"step {s}, {n}: {m}")
        assert one["line"].keys() == two["line"].keys()
        for name, value in one["line"].items():
            assert two["line"][name] == (value if value is None else pytest.approx(value, abs=1e-5)), (step, name)


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_states_agree_and_ranks_are_equal(both, case):
    one, two = both[0][case], both[1][case]
    assert two["hashes"][0] == two["hashes"][1], "the ranks' parameters or buffers differ"
    assert one["state"].keys() == two["state"].keys()
    for name, tensor in one["state"].items():
        torch.testing.assert_close(two["state"][name], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_evaluation_counts_every_image_once(both, case):
    one, two = both[0][case]["eval"], both[1][case]["eval"]
    assert one["eval/num_images"] == two["eval/num_images"] == 22  # odd for two ranks with batches of ten: padding must not count
    assert one["eval/loss"] == pytest.approx(two["eval/loss"], abs=1e-5)


def test_the_case_is_not_trivial(both):
    """Gradients are alive, groups matter, and pseudo-labels were used: otherwise the agreements above would say little."""
    steps = both[0]["fixmatch-groups"]["steps"]
    assert any(step["line"]["train/util_ratio"] > 0 for step in steps)
    assert max(float(g.abs().max()) for g in steps[-1]["gradients"].values()) > 1e-3
    other = both[0]["fixmatch-global"]["steps"]
    assert max(float((g - other[0]["gradients"][name]).abs().max()) for name, g in steps[0]["gradients"].items()) > 1e-3


def test_a_world_that_does_not_divide_the_batches_is_refused(both):
    assert both[0]["refused"] is None
    assert "2 processes do not divide" in both[1]["refused"] and "unlabeled_batch = 9" in both[1]["refused"] and "[1]" in both[1]["refused"]


def test_train_on_two_processes_stops_together_and_goes_on_with_one(tiny_data, tmp_path):
    """torchrun and SIGTERM to both; the checkpoint then resumes on one process to the result of one straight process (to rounding)."""
    lengths = ("train.steps=3000", "train.steps_per_epoch=3000", "checkpoint.every=16", "log.every=16", "eval.every=3000", "batchnorm.groups=2")
    recipe = tiny_recipe(tiny_data, tmp_path / "runs", *lengths, "model.options.width=48", "optim.lr=0.001", method="erm")
    process = run_python(*TORCHRUN, "fastssl", "train", str(write_recipe(tmp_path / "r.yaml", recipe)), wait=False)
    run, output = signal_at_first_checkpoint(process, tmp_path / "runs", signal.SIGTERM)  # torchrun passes it on
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["world"] == 2, output
    state = checkpoint.load_state(checkpoint.find(run))
    assert state["step"] == summary["steps"] and {"rank-00000.safetensors", "rank-00001.safetensors"} <= set(os.listdir(checkpoint.find(run)))
    goal = (state["step"] // 16 + 1) * 16
    with pytest.raises(Interrupted):
        train(recipe, resume="auto", stop=lambda finished: finished == goal)
    with pytest.raises(Interrupted) as straight:
        train(replace(recipe, runs_dir=str(tmp_path / "straight")), stop=lambda finished: finished == goal)
    a, b = metric_lines(run), metric_lines(straight.value.run)
    assert [x["step"] for x in a] == [x["step"] for x in b] == list(range(16, goal + 1, 16))
    for one, other in zip(a, b, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-5), one["step"]
