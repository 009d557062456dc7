"""AdaMatch: interpolated logits, alignment with labelled answers, the relative threshold, the warm-up."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.types import View, Views
from tests.methods.reference import cross_entropy, softmax
from tests.methods.reference_beyond import Columns, check_round_trip, check_sixteen_bits, columns, make, normalised, one_hot, soft_cross_entropy, step

AdaMatch = methods.get("adamatch")
ALONE = 0.7  # the labelled forward of its own answers with 0.7 times the logits


def plain(v, labels, mix, state, options, now, total_steps):
    """(parts, gradients at the views, mask, pseudo-labels, new state)."""
    x, x_s = v["x"], v["x_s"]
    slope = np.ones((2, *x.shape))
    if options["interpolate"]:
        slope = ALONE + (1 - ALONE) * np.moveaxis(mix.reshape(len(x), 2, -1), 1, 0)
    prob_x, prob_u = ([softmax(row) for row in rows] for rows in (x * slope[0], v["u_w"]))
    a = options["alignment_momentum"]
    state = [a * old + (1 - a) * np.mean(rows, 0) for old, rows in zip(state, (prob_x, prob_u), strict=True)]
    threshold = options["threshold"] * np.mean([row.max() for row in prob_x])
    targets, mask = [], []
    for row in prob_u:
        q = normalised(row * state[0] / state[1])
        mask.append(float(q.max() >= threshold))
        targets.append(one_hot([q.argmax()], len(q))[0] if options["hard_labels"] else q)
    weight = options["unlabeled_weight"] * (0.5 - math.cos(min(math.pi, 2 * math.pi * now / total_steps)) / 2)
    sup, grad_x = cross_entropy(x * slope[0], labels)
    sup_s, grad_x_s = cross_entropy(x_s * slope[1], labels)
    unsup, grad_s = soft_cross_entropy(v["u_s"], np.array(targets), np.array(mask))
    grads = {"x": grad_x * slope[0], "x_s": grad_x_s * slope[1], "u_w": np.zeros_like(v["u_w"]), "u_s": weight * grad_s}
    return {"sup_loss": sup + sup_s, "unsup_loss": weight * unsup}, grads, mask, [int(t.argmax()) for t in targets], state


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 5),
    unlabeled=st.integers(1, 6),
    classes=st.integers(1, 5),
    threshold=st.sampled_from([0.0, 0.5, 0.9, 1.2]),
    interpolate=st.booleans(),
    alignment_momentum=st.sampled_from([0.0, 0.9]),
    hard_labels=st.booleans(),
)
def test_equals_the_plain_derivation(seed, labeled, unlabeled, classes, **options):
    options["unlabeled_weight"] = 1.5
    method = make("adamatch", options, classes=classes, labeled=labeled, unlabeled=unlabeled, total_steps=5)
    method.labeled_C.fill_(1 / classes)
    method.unlabeled_C.fill_(1 / classes)
    state = [np.full(classes, 1 / classes)] * 2
    for now in (0, 1, 4):
        leaves, batch = columns(method, seed + now, step=now)
        arrays = {name: leaf.detach().numpy() for name, leaf in leaves.items()}
        mix = batch.draws["mix"].numpy() if options["interpolate"] else None
        parts, want, mask, pseudo, state = plain(arrays, batch.labeled.label_B.numpy(), mix, state, options, now, 5)
        loss, grads = step(method, leaves, batch, Columns(classes, ALONE))
        assert {name: float(part) for name, part in loss.parts.items()} == pytest.approx(parts, rel=1e-10, abs=1e-12)
        assert loss.total.item() == pytest.approx(sum(parts.values()), rel=1e-10, abs=1e-12)
        assert loss.pseudo.mask_B.tolist() == mask and loss.pseudo.label_B.tolist() == pseudo
        for name in leaves:
            np.testing.assert_allclose(grads[name], want[name], rtol=1e-9, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(method.labeled_C, state[0], rtol=1e-10)
        np.testing.assert_allclose(method.unlabeled_C, state[1], rtol=1e-10)


def test_gradcheck():
    method = make("adamatch", {"threshold": 0.5}, total_steps=2)
    leaves, batch = columns(method, 1, step=1)

    def total(x_s, u_s):
        return method(Views({**leaves, "x": leaves["x"].detach(), "x_s": x_s, "u_w": leaves["u_w"].detach(), "u_s": u_s}), batch, Columns(4), None).total

    assert torch.autograd.gradcheck(total, (leaves["x_s"], leaves["u_s"]))


def test_forwards():
    for interpolate in (True, False):
        method = make("adamatch", {"interpolate": interpolate})
        network = Columns(4)
        step(method, *columns(method, 0), network)
        assert network.calls == [("tracked", 4, True), *([("untracked", 2, True)] if interpolate else [])]
        assert bool(method.draws(method.config, method.task)) == interpolate


def test_a_threshold_below_the_usual_confidence_follows_the_labelled_batch():
    method = make("adamatch", {"interpolate": False, "threshold": 0.9}, classes=2, labeled=2, unlabeled=4)
    leaves, batch = columns(method, 0)
    with torch.no_grad():
        leaves["x"].copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))  # confidence 0.88, so c = 0.793
        leaves["u_w"].copy_(torch.tensor([[0.7, -0.7], [-0.6, 0.6], [0.6, -0.6], [-0.7, 0.7]]))  # no class is favoured: nothing to align
    loss, _ = step(method, leaves, batch, Columns(2))
    assert loss.pseudo.confidence_B.tolist() == pytest.approx([0.802, 0.769, 0.769, 0.802], abs=1e-3)
    assert loss.pseudo.mask_B.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_the_warm_up_ends_at_half_of_training():
    weights = []
    for now in (0, 2, 4, 7):
        method = make("adamatch", {"threshold": 0.0, "interpolate": False}, total_steps=8)
        leaves, batch = columns(method, 0, step=now)
        weights.append(float(step(method, leaves, batch, Columns(4))[0].parts["unsup_loss"]))
    assert weights[0] == 0 and weights[2] == weights[3] and weights[1] == pytest.approx(weights[2] / 2)


def test_state_is_written_after_backward_only_and_survives_a_round_trip():
    method = make("adamatch", {"alignment_momentum": 0.5, "threshold": 0.5}, total_steps=8)
    check_round_trip(method, Columns(4), lambda n: columns(method, n, step=n))
    assert set(method.state_dict()) == {"labeled_C", "unlabeled_C"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_read_as_float32(dtype):
    check_sixteen_bits("adamatch", {"threshold": 0.5}, dtype=dtype)


def test_saturated_logits_stay_finite():
    method = make("adamatch", {}, total_steps=2)
    leaves, batch = columns(method, 0, step=1, scale=1e4)
    loss, grads = step(method, leaves, batch, Columns(4))
    assert torch.isfinite(loss.total) and all(np.isfinite(grad).all() for grad in grads.values())


def test_views_defaults_and_refusals():
    config = AdaMatch.Config()
    assert list(AdaMatch.views(config)) == ["x", "x_s", "u_w", "u_s"] and AdaMatch.views(config)["x_s"] == View("labeled", "strong")
    assert (config.threshold, config.unlabeled_weight, config.interpolate, config.alignment_momentum, config.hard_labels) == (0.9, 1.0, True, 0.0, False)
    for bad in ({"threshold": -1.0}, {"unlabeled_weight": -1.0}, {"alignment_momentum": 1.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AdaMatch.Config(**bad)
