"""FreeMatch: self-adaptive thresholds and the fairness term."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.types import View, Views
from tests.methods.reference import cross_entropy, softmax
from tests.methods.reference_beyond import Columns, check_round_trip, check_sixteen_bits, columns, make, normalised, one_hot, soft_cross_entropy, step

FreeMatch = methods.get("freematch")


def inverse(values):
    return np.array([1 / value if value else 0.0 for value in values])


def fairness(strong, mask, p, h):
    """(L_f, gradient at the strong logits)."""
    classes = len(p)
    answers = [softmax(row) for row in strong]
    selected, total = np.zeros(classes), np.zeros(classes)
    for m, answer in zip(mask, answers, strict=True):
        selected[answer.argmax()] += m
        total += m * answer
    grad = np.zeros_like(strong)
    if not selected.any():
        return 0.0, grad
    wanted = normalised(p * inverse(h))
    ratio = total * inverse(selected)
    share = normalised(ratio)
    outer = wanted / (share + 1e-12)
    d_total = (outer - (outer * share).sum()) / ratio.sum() * inverse(selected)
    for i, (m, answer) in enumerate(zip(mask, answers, strict=True)):
        grad[i] = m * answer * (d_total - (d_total * answer).sum())
    return float((wanted * np.log(share + 1e-12)).sum()), grad


def plain(v, labels, state, options):
    """(parts, gradients, mask, new state (tau, p, h))."""
    m, classes = options["momentum"], v["x"].shape[1]
    weak = [softmax(row) for row in v["u_w"]]
    pseudo = [int(row.argmax()) for row in weak]
    tau, p, h = state
    tau = m * tau + (1 - m) * np.mean([row.max() for row in weak])
    p = m * p + (1 - m) * np.mean(weak, 0)
    h = m * h + (1 - m) * np.array([pseudo.count(c) / len(pseudo) for c in range(classes)])
    limits = [min(max(p[c] / p.max() * tau, options["lowest"]), options["highest"]) for c in range(classes)]
    mask = [float(row.max() >= limits[c]) for row, c in zip(weak, pseudo, strict=True)]
    sup, grad_x = cross_entropy(v["x"], labels)
    unsup, grad_s = soft_cross_entropy(v["u_s"], one_hot(pseudo, classes), mask)
    fair, grad_f = fairness(v["u_s"], mask, p, h)
    parts = {"sup_loss": sup, "unsup_loss": options["unlabeled_weight"] * unsup, "fairness_loss": options["fairness_weight"] * fair}
    grads = {"x": grad_x, "u_w": np.zeros_like(v["u_w"]), "u_s": options["unlabeled_weight"] * grad_s + options["fairness_weight"] * grad_f}
    return parts, grads, mask, (tau, p, h)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 5),
    unlabeled=st.integers(1, 7),
    classes=st.integers(1, 5),
    momentum=st.sampled_from([0.0, 0.5, 0.999]),
    lowest=st.sampled_from([0.0, 0.9]),
    highest=st.sampled_from([0.95, 1.0]),
)
def test_equals_the_plain_derivation(seed, labeled, unlabeled, classes, **options):
    options |= {"unlabeled_weight": 1.5, "fairness_weight": 0.3}
    method = make("freematch", options, classes=classes, labeled=labeled, unlabeled=unlabeled)
    for buffer in (method.tau, method.prob_C, method.hist_C):
        buffer.fill_(1 / classes)
    state = (1 / classes, np.full(classes, 1 / classes), np.full(classes, 1 / classes))
    for now in range(3):
        leaves, batch = columns(method, seed + now)
        arrays = {name: leaf.detach().numpy() for name, leaf in leaves.items()}
        parts, want, mask, state = plain(arrays, batch.labeled.label_B.numpy(), state, options)
        loss, grads = step(method, leaves, batch, Columns(classes))
        assert loss.pseudo.mask_B.tolist() == mask
        assert {name: float(part) for name, part in loss.parts.items()} == pytest.approx(parts, rel=1e-9, abs=1e-11)
        assert loss.total.item() == pytest.approx(sum(parts.values()), rel=1e-9, abs=1e-11)
        for name in leaves:
            np.testing.assert_allclose(grads[name], want[name], rtol=1e-8, atol=1e-11, err_msg=name)
        for buffer, value in zip((method.tau, method.prob_C, method.hist_C), state, strict=True):
            np.testing.assert_allclose(buffer, value, rtol=1e-10)


def test_gradcheck():
    method = make("freematch", {"fairness_weight": 0.5, "momentum": 0.5})
    leaves, batch = columns(method, 2, scale=1.0)

    def total(x, u_s):
        return method(Views({"x": x, "u_w": leaves["u_w"].detach(), "u_s": u_s}), batch, Columns(4), None).total

    loss, _ = step(method, leaves, batch, Columns(4))
    assert loss.pseudo.mask_B.any() and float(loss.parts["fairness_loss"]) < 0
    assert torch.autograd.gradcheck(total, (leaves["x"], leaves["u_s"]))


def test_nothing_selected():
    method = make("freematch", {"lowest": 1.0, "fairness_weight": 1.0})
    leaves, batch = columns(method, 0)
    loss, grads = step(method, leaves, batch, Columns(4))
    assert not loss.pseudo.mask_B.any() and float(loss.parts["fairness_loss"]) == 0.0 == float(loss.parts["unsup_loss"])
    assert not grads["u_s"].any() and not grads["u_w"].any()


def test_a_confidence_on_its_threshold_passes():
    method = make("freematch", {"momentum": 1.0}, classes=2, unlabeled=3)
    leaves, batch = columns(method, 0)
    with torch.no_grad():
        leaves["u_w"].zero_()
    loss, _ = step(method, leaves, batch, Columns(2))  # tau = 1 / 2 = every confidence
    assert loss.pseudo.mask_B.tolist() == [1.0] * 3 and loss.pseudo.label_B.tolist() == [0] * 3


def test_a_class_that_is_never_predicted_keeps_everything_finite():
    method = make("freematch", {"momentum": 0.0, "fairness_weight": 1.0})
    leaves, batch = columns(method, 0)
    with torch.no_grad():
        for name in ("u_w", "u_s"):
            leaves[name][:, 3] = -1e4
    loss, grads = step(method, leaves, batch, Columns(4))
    assert float(method.hist_C[3]) == 0.0 and torch.isfinite(loss.total) and np.isfinite(grads["u_s"]).all()


def test_state_is_written_after_backward_only_and_survives_a_round_trip():
    method = make("freematch", {"momentum": 0.5})
    check_round_trip(method, Columns(4), lambda n: columns(method, n))
    assert set(method.state_dict()) == {"tau", "prob_C", "hist_C"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_read_as_float32(dtype):
    check_sixteen_bits("freematch", {"momentum": 0.5}, dtype=dtype)


def test_saturated_logits_stay_finite():
    method = make("freematch", {})
    loss, grads = step(method, *columns(method, 0, scale=1e4), Columns(4))
    assert torch.isfinite(loss.total) and all(np.isfinite(grad).all() for grad in grads.values())


def test_views_defaults_and_refusals():
    config = FreeMatch.Config()
    assert FreeMatch.views(config) == {"x": View("labeled", "weak"), "u_w": View("unlabeled", "weak"), "u_s": View("unlabeled", "strong")}
    assert (config.momentum, config.unlabeled_weight, config.fairness_weight, config.lowest, config.highest) == (0.999, 1.0, 0.01, 0.0, 1.0)
    for bad in ({"momentum": 1.1}, {"unlabeled_weight": -1.0}, {"fairness_weight": -1.0}, {"lowest": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            FreeMatch.Config(**bad)
    with pytest.raises(ValueError, match="highest"):
        FreeMatch.Config(lowest=0.9, highest=0.5)
