"""SoftMatch: weights from a truncated Gaussian, its running mean and variance, uniform alignment."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.methods.softmatch import gaussian_weight
from fastssl.types import View, Views
from tests.methods.reference import cross_entropy, softmax
from tests.methods.reference_beyond import Columns, check_round_trip, check_sixteen_bits, columns, make, normalised, one_hot, soft_cross_entropy, step

SoftMatch = methods.get("softmatch")


def plain(v, labels, state, options):
    """(parts, gradients, weights, new state (p, mean, variance))."""
    m, classes = options["momentum"], v["x"].shape[1]
    p, mean, variance = state
    weak = [softmax(row) for row in v["u_w"]]
    p = m * p + (1 - m) * np.mean(weak, 0)
    sure = [normalised(row / p).max() if options["alignment"] == "uniform" else row.max() for row in weak]
    mean = m * mean + (1 - m) * np.mean(sure)
    variance = m * variance + (1 - m) * (np.var(sure, ddof=1) if len(sure) > 1 else 0.0)
    weights = [1.0 if s >= mean else np.exp(-((s - mean) ** 2) / (2 * variance / options["sigmas"] ** 2)) for s in sure]
    sup, grad_x = cross_entropy(v["x"], labels)
    unsup, grad_s = soft_cross_entropy(v["u_s"], one_hot([row.argmax() for row in weak], classes), weights)
    parts = {"sup_loss": sup, "unsup_loss": options["unlabeled_weight"] * unsup}
    return parts, {"x": grad_x, "u_w": np.zeros_like(v["u_w"]), "u_s": options["unlabeled_weight"] * grad_s}, weights, (p, mean, variance)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 5),
    unlabeled=st.integers(1, 7),
    classes=st.integers(2, 5),
    momentum=st.sampled_from([0.3, 0.9, 0.999]),
    sigmas=st.sampled_from([1.0, 2.0]),
    alignment=st.sampled_from(["uniform", "none"]),
)
def test_equals_the_plain_derivation(seed, labeled, unlabeled, classes, **options):
    options["unlabeled_weight"] = 1.5
    method = make("softmatch", options, classes=classes, labeled=labeled, unlabeled=unlabeled)
    method.prob_C.fill_(1 / classes)
    method.mean.fill_(1 / classes)
    state = (np.full(classes, 1 / classes), 1 / classes, 1.0)
    for now in range(3):
        leaves, batch = columns(method, seed + now)
        arrays = {name: leaf.detach().numpy() for name, leaf in leaves.items()}
        parts, want, weights, state = plain(arrays, batch.labeled.label_B.numpy(), state, options)
        loss, grads = step(method, leaves, batch, Columns(classes))
        np.testing.assert_allclose(loss.pseudo.mask_B, weights, rtol=1e-9)
        assert {name: float(part) for name, part in loss.parts.items()} == pytest.approx(parts, rel=1e-9, abs=1e-11)
        assert loss.total.item() == pytest.approx(sum(parts.values()), rel=1e-9, abs=1e-11)
        for name in leaves:
            np.testing.assert_allclose(grads[name], want[name], rtol=1e-8, atol=1e-11, err_msg=name)
        for buffer, value in zip((method.prob_C, method.mean, method.variance), state, strict=True):
            np.testing.assert_allclose(buffer, value, rtol=1e-10)


def test_gradcheck():
    method = make("softmatch", {"momentum": 0.5})
    leaves, batch = columns(method, 1)

    def total(x, u_s):
        return method(Views({"x": x, "u_w": leaves["u_w"].detach(), "u_s": u_s}), batch, Columns(4), None).total

    assert torch.autograd.gradcheck(total, (leaves["x"], leaves["u_s"]))


def test_the_weight_is_one_from_the_mean_on_and_falls_below():
    confidence = torch.tensor([0.2, 0.5, 0.7, 0.8, 1.0])
    weight = gaussian_weight(confidence, torch.tensor(0.7), torch.tensor(0.04), 2.0)
    assert weight[2:].tolist() == [1.0] * 3 and 0 < weight[0] < weight[1] < 1
    assert weight[1].item() == pytest.approx(np.exp(-(0.2**2) / (2 * 0.04 / 4)), rel=1e-5)
    assert gaussian_weight(confidence, torch.tensor(0.7), torch.tensor(0.0), 2.0).tolist() == [0, 0, 1, 1, 1]


def test_alignment_changes_weights_but_not_labels():
    losses = {}
    for alignment in ("uniform", "none"):
        method = make("softmatch", {"momentum": 0.0, "alignment": alignment}, classes=3, unlabeled=6)
        leaves, batch = columns(method, 4, scale=1.0)
        with torch.no_grad():
            leaves["u_w"][:, 0] += 2.0  # one class is favoured
        losses[alignment] = step(method, leaves, batch, Columns(3))[0].pseudo
    assert torch.equal(losses["uniform"].label_B, losses["none"].label_B)
    assert not torch.equal(losses["uniform"].mask_B, losses["none"].mask_B)


def test_one_row_and_one_class():
    for sizes in ({"labeled": 1, "unlabeled": 1}, {"classes": 1}):
        method = make("softmatch", {"momentum": 0.0}, **sizes)
        loss, grads = step(method, *columns(method, 0), Columns(method.task.num_classes))
        assert torch.isfinite(loss.total) and loss.pseudo.mask_B.eq(1).all() and np.isfinite(grads["u_s"]).all()
        assert float(method.variance) == pytest.approx(0.0, abs=1e-20)


def test_state_is_written_after_backward_only_and_survives_a_round_trip():
    method = make("softmatch", {"momentum": 0.5})
    check_round_trip(method, Columns(4), lambda n: columns(method, n))
    assert set(method.state_dict()) == {"prob_C", "mean", "variance"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_read_as_float32(dtype):
    check_sixteen_bits("softmatch", {"momentum": 0.5}, dtype=dtype)


def test_saturated_logits_stay_finite():
    method = make("softmatch", {})
    loss, grads = step(method, *columns(method, 0, scale=1e4), Columns(4))
    assert torch.isfinite(loss.total) and all(np.isfinite(grad).all() for grad in grads.values())


def test_views_defaults_and_refusals():
    config = SoftMatch.Config()
    assert SoftMatch.views(config) == {"x": View("labeled", "weak"), "u_w": View("unlabeled", "weak"), "u_s": View("unlabeled", "strong")}
    assert (config.momentum, config.unlabeled_weight, config.sigmas, config.alignment) == (0.999, 1.0, 2.0, "uniform")
    for bad in ({"momentum": 1.1}, {"unlabeled_weight": -1.0}, {"sigmas": -1.0}, {"alignment": "model"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SoftMatch.Config(**bad)
