"""Meters: means over updates, hidden truth, the sticky non-finite flag; timing rules."""

import pytest
import torch

from fastssl.engine import timing
from fastssl.engine.meters import Meters
from fastssl.engine.timing import WARMUP_STEPS, Stopwatch
from fastssl.types import Loss, PseudoLabels

CPU = torch.device("cpu")


def loss_of(value: float, *, label=(0, 1, 2, 3), mask=(1.0, 0.0, 1.0, 1.0), confidence=(0.5, 0.5, 1.0, 1.0), **parts: float) -> Loss:
    pseudo = PseudoLabels(torch.tensor(label), torch.tensor(mask), torch.tensor(confidence))
    return Loss(torch.tensor(value), {name: torch.tensor(v) for name, v in parts.items()}, pseudo)


def test_means_and_pseudo_label_figures():
    meters = Meters(CPU)
    truth = torch.tensor([0, 1, 0, -1])  # the last one is unknown: in no accuracy, but in the ratio
    meters.add(loss_of(1.0, sup_loss=0.5), truth, torch.tensor(0))
    meters.add(loss_of(3.0, sup_loss=1.5), truth, torch.tensor(1))
    line = meters.read()
    assert line["train/loss"] == 2.0 and line["train/sup_loss"] == 1.0
    assert line["train/util_ratio"] == 0.75 and line["train/confidence"] == 0.75
    assert line["train/pseudo_acc"] == 50.0  # selected with truth: rows 0 (right) and 2 (wrong)
    assert line["train/pseudo_acc_all"] == pytest.approx(200 / 3)


def test_reading_starts_again_and_nothing_selected_is_none():
    meters = Meters(CPU)
    meters.add(loss_of(1.0), torch.zeros(4, dtype=torch.int64), torch.tensor(0))
    meters.read()
    meters.add(loss_of(5.0, mask=(0.0,) * 4), torch.zeros(4, dtype=torch.int64), torch.tensor(1))
    line = meters.read()
    assert line["train/loss"] == 5.0 and line["train/util_ratio"] == 0.0 and line["train/pseudo_acc"] is None and line["train/pseudo_acc_all"] == 25.0


def test_sums_survive_a_checkpoint():
    one, two = Meters(CPU), Meters(CPU)
    one.add(loss_of(0.1, sup_loss=0.3), None, torch.tensor(0))
    two.load_tensors(one.tensors())
    for meters in (one, two):
        meters.add(loss_of(0.7, sup_loss=0.2), None, torch.tensor(1))
    assert one.read() == two.read()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_flag_keeps_the_first_bad_step(value):
    meters = Meters(CPU)
    meters.add(loss_of(1.0), None, torch.tensor(3))
    assert meters.bad_step() is None
    meters.add(loss_of(value), None, torch.tensor(4))
    meters.add(loss_of(1.0), None, torch.tensor(5))
    meters.add(loss_of(value), None, torch.tensor(6))
    assert meters.bad_step() == 4


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves by hand: ``clock(seconds)``."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


def test_speed_leaves_out_warm_up_and_evaluation(clock):
    watch = Stopwatch(images_per_step=10)
    watch.run()
    for step in range(WARMUP_STEPS + 4):
        clock(3.0 if step < WARMUP_STEPS else 0.5)
        watch.lap(waited_s=0.125)
        if step == WARMUP_STEPS + 1:
            clock(0.25)  # the device finishes what was queued: training time
            watch.settle()
            clock(60.0)  # an evaluation
            watch.run()
    images_per_s, wait_share = watch.overall()
    assert watch.totals.timed_steps == 4 and watch.totals.timed_s == pytest.approx(2.25)
    assert images_per_s == pytest.approx(40 / 2.25) and wait_share == pytest.approx(0.5 / 2.25)
    assert watch.totals.train_s == pytest.approx(3.0 * WARMUP_STEPS + 2.25)
    assert watch.wall_s() == pytest.approx(3.0 * WARMUP_STEPS + 62.25)
    window = watch.window()
    assert window.step_s == pytest.approx((3.0 * WARMUP_STEPS + 2.25) / (WARMUP_STEPS + 4)) and window.wait_s == pytest.approx(0.125)
    assert watch.window().images_per_s >= 0  # an empty window is no division by zero


def test_a_run_shorter_than_warm_up_still_has_a_speed(clock):
    watch = Stopwatch(images_per_step=10)
    watch.run()
    clock(2.0)
    watch.lap(0.5)
    assert watch.overall() == (pytest.approx(5.0), pytest.approx(0.25))
    clock(1.0)
    resumed = Stopwatch(10, watch.state())
    clock(4.0)
    assert resumed.overall() == watch.overall() and resumed.wall_s() == pytest.approx(7.0)
