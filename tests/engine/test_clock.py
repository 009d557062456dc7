"""Learning-rate laws against their formulas and against torch; the clock's two copies of time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.engine.clock import Clock, LearningRate, sigmoid_ramp
from fastssl.errors import RecipeError
from fastssl.schema import ScheduleConfig

LAWS = ("constant", "cosine_7_16", "cosine_half", "exp", "cosine_epoch", "multistep")


def law(name, lr=0.3, total=100, per_epoch=10, **options):
    return LearningRate(ScheduleConfig(name, **options), lr, total, per_epoch)


def test_each_law_at_known_points():
    assert law("constant")(99) == 0.3
    assert law("cosine_7_16")(0) == 0.3
    assert law("cosine_7_16")(100) == pytest.approx(0.3 * math.cos(7 * math.pi / 16), rel=1e-14)
    assert law("cosine_half")(50) == pytest.approx(0.15, rel=1e-14)
    assert law("exp", gamma=0.5, decay=2.0)(4) == pytest.approx(0.3 / 9, rel=1e-14)
    assert law("cosine_epoch")(59) == pytest.approx(0.15 * (1 + math.cos(math.pi * 5 / 10)), rel=1e-14)
    assert [law("multistep", gamma=0.1, milestones=[2, 4])(k) for k in (0, 19, 20, 39, 40)] == pytest.approx([0.3, 0.3, 0.03, 0.03, 0.003])


def test_default_decay_is_the_transfer_learning_one():
    assert law("exp")(50) == pytest.approx(0.3 * (1 + 4e-4 * 50) ** -0.75, rel=1e-14)


def test_warmup_in_updates_starts_at_zero_and_shifts_the_law():
    rate = law("cosine_7_16", warmup_steps=20)
    assert [rate(k) for k in (0, 1, 10)] == pytest.approx([0.0, 0.015, 0.15])
    assert rate(20) == 0.3
    assert rate(60) == pytest.approx(0.3 * math.cos(7 * math.pi / 16 * 40 / 80), rel=1e-14)
    assert law("exp", warmup_steps=20, gamma=1.0, decay=1.0)(23) == pytest.approx(0.3 / 4)


def test_warmup_in_epochs_counts_from_one_and_shifts_only_the_cosine():
    cosine, steps = law("cosine_epoch", warmup_epochs=2), law("multistep", warmup_epochs=2, gamma=0.1, milestones=[4])
    for rate in (cosine, steps):
        assert [rate(k) for k in (0, 9, 19)] == pytest.approx([0.3 / 20, 0.15, 0.3])
    assert cosine(20) == 0.3
    assert cosine(65) == pytest.approx(0.15 * (1 + math.cos(math.pi * 4 / 8)), rel=1e-14)
    assert cosine(99) > 0
    assert (steps(39), steps(40)) == pytest.approx((0.3, 0.03))


def test_a_short_last_epoch_counts_as_an_epoch():
    assert law("cosine_epoch", total=95)(94) == law("cosine_epoch", total=100)(94)


def test_multistep_equals_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 5, 8], gamma=0.2)
    rate = law("multistep", gamma=0.2, milestones=[3, 5, 8])
    for epoch in range(10):
        assert rate(epoch * 10) == rate(epoch * 10 + 9) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.sampled_from(LAWS), st.integers(1, 400), st.integers(1, 50), st.floats(1e-4, 10), st.data())
def test_rates_lie_between_zero_and_the_base_and_fall_after_warmup(name, total, per_epoch, lr, data):
    options = {"gamma": data.draw(st.floats(0.01, 0.9)), "milestones": data.draw(st.lists(st.integers(1, 20), max_size=3))}
    warmup = 0
    if name in ("cosine_epoch", "multistep") and total > per_epoch:
        options["warmup_epochs"] = data.draw(st.integers(0, (total - 1) // per_epoch))
        warmup = options["warmup_epochs"] * per_epoch
    elif name not in ("cosine_epoch", "multistep"):
        options["warmup_steps"] = warmup = data.draw(st.integers(0, total - 1))
    rate = law(name, lr, total, per_epoch, **options)
    rates = [rate(k) for k in range(total + 1)]
    assert all(0 <= r <= lr for r in rates)
    assert all(a <= b for a, b in zip(rates[:warmup], rates[1:warmup], strict=False))
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert rate(total // 2) == rate(total // 2)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"name": "cosin_half"}, "cosine_half"),
        ({"name": "exp", "warmup_epochs": 2}, "schedule.warmup_steps"),
        ({"name": "constant", "warmup_steps": 100}, "leaves none"),
        ({"name": "cosine_epoch", "warmup_epochs": 10}, "leaves none"),
    ],
)
def test_impossible_schedules_are_refused(options, what):
    with pytest.raises(RecipeError, match=what):
        law(**options)


def test_sigmoid_ramp():
    assert sigmoid_ramp(0, 10) == pytest.approx(math.exp(-5))
    assert sigmoid_ramp(5, 10) == pytest.approx(math.exp(-1.25))
    assert sigmoid_ramp(10, 10) == sigmoid_ramp(11, 10) == sigmoid_ramp(0, 0) == 1.0
    assert sigmoid_ramp(-3, 10) == sigmoid_ramp(0, 10)


def test_clock_keeps_both_copies_and_the_addresses():
    clock = Clock(3)
    addresses = clock.tensors.step.data_ptr(), clock.tensors.epoch.data_ptr()
    for k in range(8):
        assert (clock.step, clock.epoch) == (k, k // 3) == (int(clock.tensors.step), int(clock.tensors.epoch))
        clock.tick()
    clock.load(100)
    assert (clock.step, clock.epoch, int(clock.tensors.step), int(clock.tensors.epoch)) == (100, 33, 100, 33)
    clock.tick()
    assert int(clock.tensors.step) == 101
    assert clock.tensors.step.dtype == clock.tensors.epoch.dtype == torch.int64
    assert addresses == (clock.tensors.step.data_ptr(), clock.tensors.epoch.data_ptr())


def test_the_halves_of_a_tick():
    clock = Clock(2)
    clock.tick_tensors()
    assert (clock.step, int(clock.tensors.step)) == (0, 1)
    clock.tick_host()
    assert (clock.step, int(clock.tensors.step)) == (1, 1)
