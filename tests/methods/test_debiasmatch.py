"""DebiasMatch: the running mean of the network's answers, and both places where it enters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.types import Out, Views
from tests.golden.identity import build_method, forward_backward, make_batch, make_task
from tests.methods import reference_tllib as reference
from tests.methods.reference import erm, softmax

DebiasMatch = methods.get("debiasmatch")
VIEWS = ("x", "x_s", "u_w", "u_s")


def make(classes=4, labeled=3, unlabeled=5, **options):
    return build_method("debiasmatch", options, make_task(classes, labeled, unlabeled)).double()


def make_logits(seed, classes=4, labeled=3, unlabeled=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = zip(VIEWS, (labeled, labeled, unlabeled, unlabeled), strict=True)
    return {name: (3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)).to(dtype) for name, n in rows}


def step(method, logits, labels=None):
    labels = torch.arange(len(logits["x"])) % method.task.num_classes if labels is None else labels
    batch = make_batch(labels, len(logits["u_w"]))
    loss, grads = forward_backward(method, logits, batch)
    method.after_backward(batch)
    return loss, grads


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(1, 5),
    unlabeled=st.integers(1, 7),
    threshold=st.sampled_from([0.0, 0.5, 0.8, 1.5]),
    debias=st.sampled_from([0.0, 0.5, 3.0]),
    momentum=st.sampled_from([0.0, 0.6, 0.999]),
    prior=st.sampled_from(["before", "updated"]),
    reset=st.booleans(),
    a_s=st.sampled_from([0.0, 0.1]),
    strict=st.booleans(),
    separate=st.booleans(),
)
def test_equals_the_plain_derivation(seed, classes, unlabeled, threshold, debias, momentum, prior, reset, a_s, strict, separate):
    options = {"threshold": threshold, "unlabeled_weight": 1.4, "debias": debias, "momentum": momentum, "pseudo_prior": prior}
    options |= {"reset_each_epoch": reset, "strong_label_weight": a_s, "strict_threshold": strict, "separate_forwards": separate}
    method, q = make(classes, 3, unlabeled, **options), np.full(classes, float(np.float32(1 / classes)))
    for k in range(4):
        if k % 2 == 0:  # epochs of two steps
            method.on_epoch_start(k // 2)
            q = np.full(classes, 1 / classes) if reset else q
        logits = make_logits(seed + k, classes, 3, unlabeled)
        arrays = {name: x.numpy() for name, x in logits.items()}
        updated = momentum * q + (1 - momentum) * np.mean([softmax(row) for row in arrays["u_w"]], axis=0)
        labels = torch.arange(3) % classes
        sup, grads_want = erm(arrays["x"], arrays["x_s"], labels.numpy(), a_s)
        shifts = {"shift_weak": debias * np.log(updated if prior == "updated" else q), "shift_strong": debias * np.log(updated)}
        unsup, grad, mask, pseudo, _ = reference.hard_rows(arrays["u_w"], arrays["u_s"], thresholds=[threshold] * classes, weight=1.4, strict=strict, **shifts)
        q = updated
        loss, grads = step(method, logits, labels)
        assert loss.total.item() == pytest.approx(sup + unsup, rel=1e-10, abs=1e-12)
        np.testing.assert_array_equal(loss.pseudo.mask_B.numpy(), mask)
        np.testing.assert_array_equal(loss.pseudo.label_B.numpy(), pseudo)
        for name, want in (grads_want | {"u_w": np.zeros_like(arrays["u_w"]), "u_s": grad}).items():
            np.testing.assert_allclose(grads[name].numpy(), want, rtol=1e-9, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(method.q.numpy(), q, rtol=1e-12)


def test_gradcheck():
    method = make(threshold=0.4, strong_label_weight=0.3)
    logits = make_logits(4)
    step(method, logits)

    def network(*views):
        outs = tuple(Out(view, view) for view in views)
        return outs[0] if len(outs) == 1 else outs

    def total(x, x_s, u_s):
        views = Views({"x": x, "x_s": x_s, "u_w": logits["u_w"], "u_s": u_s})
        return method(views, make_batch(torch.tensor([0, 1, 2]), 5), network, None).total

    assert torch.autograd.gradcheck(total, tuple(logits[name].requires_grad_() for name in ("x", "x_s", "u_s")))


def test_a_favoured_class_has_to_be_surer():
    method = make(classes=2, threshold=0.0, momentum=0.5, debias=1.0)
    logits = make_logits(0, classes=2) | {"u_w": torch.tensor([[1.0, 0.0]] * 5, dtype=torch.float64)}
    labels = torch.tensor([0, 1, 0])
    for _ in range(30):
        loss, _ = step(method, logits, labels)
    torch.testing.assert_close(method.q, torch.softmax(torch.tensor([1.0, 0.0], dtype=torch.float64), 0), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.pseudo.confidence_B, torch.full((5,), 0.5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_prior_is_carried_over_epochs_unless_reset():
    for reset in (False, True):
        method = make(reset_each_epoch=reset, momentum=0.5)
        step(method, make_logits(1))
        moved = method.q.clone()
        method.on_epoch_end(0)
        method.on_epoch_start(1)
        assert torch.equal(method.q, torch.full_like(moved, 0.25) if reset else moved)


def test_which_prior_the_pseudo_labels_are_freed_of_matters():
    labels = {}
    for prior in ("before", "updated"):
        method = make(classes=2, threshold=0.0, momentum=0.0, debias=1.0, pseudo_prior=prior)
        weak = torch.tensor([[3.0, 0.0]] * 4 + [[0.1, 0.0]], dtype=torch.float64)
        labels[prior] = step(method, make_logits(0, classes=2) | {"u_w": weak}, torch.tensor([0, 1, 0]))[0].pseudo.label_B.tolist()
    assert labels == {"before": [0, 0, 0, 0, 0], "updated": [0, 0, 0, 0, 1]}


def test_a_class_that_is_never_predicted_stays_finite():
    method = make(classes=3, momentum=0.0, threshold=0.0).float()
    far = torch.tensor([[0.0, 0.0, -1000.0]]).repeat(5, 1)
    logits = {name: x.float() for name, x in make_logits(2, classes=3).items()} | {"u_w": far}
    for _ in range(2):
        loss, grads = step(method, logits)
    assert method.q[2] == 0 and torch.isfinite(loss.total) and all(torch.isfinite(grad).all() for grad in grads.values())


def test_state_is_written_after_backward_only_and_survives_a_round_trip():
    method, copy = make(momentum=0.5), make(momentum=0.5)
    before = method.q.clone()
    forward_backward(method, make_logits(0), make_batch(torch.tensor([0, 1, 2]), 5))
    assert torch.equal(method.q, before) and set(method.state_dict()) == {"q"}
    step(method, make_logits(0))
    assert not torch.equal(method.q, before)
    copy.load_state_dict(method.state_dict())
    assert torch.equal(step(method, make_logits(1))[0].total, step(copy, make_logits(1))[0].total) and torch.equal(method.q, copy.q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_read_as_float32(dtype):
    low = make_logits(3, dtype=dtype)
    results = []
    for logits in (low, {name: x.float() for name, x in low.items()}):
        method = make(threshold=0.5, momentum=0.5).float()
        results.append((step(method, logits)[0].total, method.q))
    assert results[0][0].dtype == torch.float32 and torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_the_defaults_and_impossible_options():
    config = DebiasMatch.Config()
    assert (config.threshold, config.debias, config.momentum, config.pseudo_prior) == (0.95, 1.0, 0.999, "before")
    assert (config.reset_each_epoch, config.strict_threshold, config.strong_label_weight, config.separate_forwards) == (False, False, 0.0, False)
    for bad in ({"threshold": -1.0}, {"momentum": 1.1}, {"debias": -1.0}, {"pseudo_prior": "after"}, {"unlabeled_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DebiasMatch.Config(**bad)
