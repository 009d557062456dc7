"""Dash: the warm-up, the estimate of the labelled loss, the falling threshold, soft and hard labels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.types import View, Views
from tests.methods.reference import cross_entropy, softmax
from tests.methods.reference_beyond import Columns, check_round_trip, check_sixteen_bits, columns, make, one_hot, soft_cross_entropy, step

Dash = methods.get("dash")


def plain(v, labels, history, options, now):
    """(parts, gradients, mask, rho)."""
    end, classes = options["warmup_steps"], v["x"].shape[1]
    window = history[max(0, end - options["estimate_steps"]) : end]
    period = max(0, (now - end) // options["decay_steps"])
    rho = max(options["scale"] * options["gamma"] ** -period * (np.mean(window) if window else 0.0), options["lowest"])
    targets, mask = [], []
    for row in v["u_w"]:
        hard = one_hot([softmax(row).argmax()], classes)[0]
        target = softmax(row / options["temperature"]) if rho > options["lowest"] else hard
        targets.append(target)
        mask.append(float(now >= end and -(target * np.log(softmax(row))).sum() <= rho))
    sup, grad_x = cross_entropy(v["x"], labels)
    unsup, grad_s = soft_cross_entropy(v["u_s"], np.array(targets), mask)
    parts = {"sup_loss": sup, "unsup_loss": options["unlabeled_weight"] * unsup}
    return parts, {"x": grad_x, "u_w": np.zeros_like(v["u_w"]), "u_s": options["unlabeled_weight"] * grad_s}, mask, rho


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 5),
    unlabeled=st.integers(1, 6),
    classes=st.integers(1, 5),
    warmup_steps=st.integers(1, 3),
    estimate_steps=st.integers(1, 4),
    decay_steps=st.integers(1, 2),
    gamma=st.sampled_from([1.0, 1.27, 5.0]),
    lowest=st.sampled_from([0.05, 0.4]),
)
def test_equals_the_plain_derivation(seed, labeled, unlabeled, classes, **options):
    options |= {"scale": 1.0001, "temperature": 0.5, "unlabeled_weight": 1.5}
    method = make("dash", options, classes=classes, labeled=labeled, unlabeled=unlabeled)
    history = []
    for now in range(6):
        leaves, batch = columns(method, seed + now, step=now)
        arrays = {name: leaf.detach().numpy() for name, leaf in leaves.items()}
        parts, want, mask, rho = plain(arrays, batch.labeled.label_B.numpy(), history, options, now)
        if now >= options["warmup_steps"]:
            assert float(method.threshold(torch.tensor(now))) == pytest.approx(rho, rel=1e-10)
        loss, grads = step(method, leaves, batch, Columns(classes))
        history.append(parts["sup_loss"])
        assert loss.pseudo.mask_B.tolist() == mask
        assert {name: float(part) for name, part in loss.parts.items()} == pytest.approx(parts, rel=1e-9, abs=1e-11)
        assert loss.total.item() == pytest.approx(sum(parts.values()), rel=1e-9, abs=1e-11)
        for name in leaves:
            np.testing.assert_allclose(grads[name], want[name], rtol=1e-8, atol=1e-11, err_msg=name)


def test_gradcheck():
    method = make("dash", {"warmup_steps": 1})
    step(method, *columns(method, 0, step=0), Columns(4))
    leaves, batch = columns(method, 1, step=1)

    def total(x, u_s):
        return method(Views({"x": x, "u_w": leaves["u_w"].detach(), "u_s": u_s}), batch, Columns(4), None).total

    loss, _ = step(method, leaves, batch, Columns(4))
    assert 0 < float(loss.pseudo.mask_B.sum())
    assert torch.autograd.gradcheck(total, (leaves["x"], leaves["u_s"]))


def test_nothing_counts_before_the_warm_up_ends():
    method = make("dash", {"warmup_steps": 2, "lowest": 100.0})
    for now, share in ((0, 0.0), (1, 0.0), (2, 1.0)):
        loss, grads = step(method, *columns(method, now, step=now), Columns(4))
        assert float(loss.pseudo.mask_B.mean()) == share and bool(grads["u_s"].any()) == bool(share)


def test_only_the_last_updates_of_the_warm_up_make_the_estimate():
    method = make("dash", {"warmup_steps": 4, "estimate_steps": 2, "scale": 1.0})
    losses = [float(step(method, *columns(method, now, step=now), Columns(4))[0].parts["sup_loss"]) for now in range(7)]
    assert float(method.threshold(torch.tensor(7))) == pytest.approx(np.mean(losses[2:4])) and float(method.loss_count) == 2


def test_the_threshold_falls_by_gamma_each_period_to_its_floor():
    method = make("dash", {"warmup_steps": 10, "decay_steps": 5, "gamma": 2.0, "scale": 1.0, "lowest": 0.3})
    method.loss_sum.fill_(6.0)
    method.loss_count.fill_(3.0)
    assert [float(method.threshold(torch.tensor(n))) for n in (10, 14, 15, 20, 25, 10_000)] == pytest.approx([2, 2, 1, 0.5, 0.3, 0.3])


def test_with_hard_labels_the_floor_is_a_confidence():
    method = make("dash", {"warmup_steps": 1, "lowest": 0.05}, classes=2, unlabeled=2)
    leaves, batch = columns(method, 0, step=5)
    just = np.log(0.9513 / 0.0487), np.log(0.9511 / 0.0489)  # exp(-0.05) = 0.95123
    with torch.no_grad():
        leaves["u_w"].copy_(torch.tensor([[just[0], 0.0], [just[1], 0.0]]))
    assert step(method, leaves, batch, Columns(2))[0].pseudo.mask_B.tolist() == [1.0, 0.0]


def test_state_is_written_after_backward_only_and_survives_a_round_trip():
    method = make("dash", {"warmup_steps": 3})
    check_round_trip(method, Columns(4), lambda n: columns(method, n, step=n))
    assert set(method.state_dict()) == {"loss_sum", "loss_count"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_read_as_float32(dtype):
    check_sixteen_bits("dash", {"warmup_steps": 1}, dtype=dtype)


def test_saturated_logits_stay_finite():
    method = make("dash", {"warmup_steps": 1})
    for now in range(2):
        loss, grads = step(method, *columns(method, now, step=now, scale=1e4), Columns(4))
        assert torch.isfinite(loss.total) and all(np.isfinite(grad).all() for grad in grads.values())


def test_views_defaults_and_refusals():
    config = Dash.Config()
    assert Dash.views(config) == {"x": View("labeled", "weak"), "u_w": View("unlabeled", "weak"), "u_s": View("unlabeled", "strong")}
    assert (config.warmup_steps, config.estimate_steps, config.decay_steps, config.gamma, config.scale) == (2048, 64, 10240, 1.27, 1.0001)
    assert (config.lowest, config.temperature, config.unlabeled_weight) == (0.05, 0.5, 1.0)
    for bad in ({"warmup_steps": 0}, {"decay_steps": 0}, {"gamma": 0.9}, {"scale": -1.0}, {"temperature": 0.0}, {"lowest": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Dash.Config(**bad)
