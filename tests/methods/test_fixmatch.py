"""FixMatch at its public door: recorded or made-up logits in, loss, gradients and pseudo-labels out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.types import Out, View, Views
from tests.golden.identity import build_method, forward_backward, make_batch, make_task
from tests.methods.reference import fixmatch as reference

FixMatch = methods.get("fixmatch")
VIEWS = ("x", "x_s", "u_w", "u_s")


def make_logits(seed=0, labeled=4, unlabeled=7, classes=5, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = {"x": labeled, "x_s": labeled, "u_w": unlabeled, "u_s": unlabeled}
    return {name: (scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)).to(dtype) for name, n in rows.items()}


def run(logits, labels, **options):
    labeled, unlabeled, classes = len(logits["x"]), len(logits["u_w"]), logits["x"].shape[1]
    return forward_backward(build_method("fixmatch", options, make_task(classes, labeled, unlabeled)), logits, make_batch(labels, unlabeled))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 6),
    unlabeled=st.integers(1, 9),
    classes=st.integers(1, 8),
    threshold=st.floats(0, 1),
    weight=st.floats(0, 20),
    a_s=st.sampled_from([0.0, 0.1, 1.5]),
    strict=st.booleans(),
    separate=st.booleans(),
    source=st.sampled_from(["student", "teacher"]),
)
def test_equals_the_plain_derivation(seed, labeled, unlabeled, classes, threshold, weight, a_s, strict, separate, source):
    logits = make_logits(seed, labeled, unlabeled, classes)
    labels = torch.arange(labeled) % classes
    options = {"threshold": threshold, "unlabeled_weight": weight, "strong_label_weight": a_s, "strict_threshold": strict}
    loss, grads = run(logits, labels, **options, separate_forwards=separate, pseudo_labels=source)
    arrays = [logits[name].numpy() for name in VIEWS]
    want = reference(*arrays, labels.numpy(), threshold=threshold, weight=weight, a_s=a_s, strict=strict)
    np.testing.assert_array_equal(loss.pseudo.mask_B.numpy(), want["mask"])
    np.testing.assert_array_equal(loss.pseudo.label_B.numpy(), want["pseudo"])
    np.testing.assert_allclose(loss.pseudo.confidence_B.numpy(), want["confidence"], rtol=1e-12)
    got = {"sup": loss.parts["sup_loss"], "unsup": loss.parts["unsup_loss"], "total": loss.total}
    for name, value in got.items():
        assert value.item() == pytest.approx(want[name], rel=1e-11, abs=1e-13), name
    for name in VIEWS:
        np.testing.assert_allclose(grads[name].numpy(), want["grads"][name], rtol=1e-10, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_gradcheck(source):
    logits = make_logits(3, 3, 5, 4)
    method = build_method("fixmatch", {"threshold": 0.6, "strong_label_weight": 0.3, "pseudo_labels": source}, make_task(4, 3, 5))
    batch = make_batch(torch.tensor([0, 1, 3]), 5)

    def total(x, x_s, u_s):
        views = Views({"x": x, "x_s": x_s, "u_w": logits["u_w"], "u_s": u_s})

        def network(*views):
            outs = tuple(Out(view, view) for view in views)
            return outs[0] if len(outs) == 1 else outs

        return method(views, batch, network, network).total

    assert torch.autograd.gradcheck(total, tuple(logits[name].requires_grad_() for name in ("x", "x_s", "u_s")))


def test_the_weak_view_gets_no_gradient():
    for options in ({}, {"separate_forwards": True}, {"pseudo_labels": "teacher"}):
        _, grads = run(make_logits(), torch.tensor([0, 1, 2, 3]), threshold=0.0, **options)
        assert not grads["u_w"].any() and grads["u_s"].any() and grads["x"].any()


def test_nothing_passes():
    loss, grads = run(make_logits(), torch.tensor([0, 1, 2, 3]), threshold=1.01)
    assert float(loss.parts["unsup_loss"]) == 0.0 and torch.equal(loss.total.detach(), loss.parts["sup_loss"])
    assert not grads["u_s"].any() and not loss.pseudo.mask_B.any()


def test_everything_passes():
    loss, grads = run(make_logits(), torch.tensor([0, 1, 2, 3]), threshold=0.0)
    assert loss.pseudo.mask_B.all() and grads["u_s"].abs().sum(1).all()


def test_rows_below_the_threshold_stay_in_the_denominator():
    logits = make_logits(unlabeled=2)
    logits["u_w"] = torch.tensor([[20.0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0]], dtype=torch.float64)
    loss, _ = run(logits, torch.tensor([0, 1, 2, 3]))
    assert float(loss.parts["unsup_loss"]) == pytest.approx(-float(torch.log_softmax(logits["u_s"][0], 0)[0]) / 2)


@pytest.mark.parametrize(("strict", "mask"), [(False, 1.0), (True, 0.0)])
def test_a_confidence_on_the_threshold_passes_unless_strict_and_ties_go_to_the_lowest_class(strict, mask):
    logits = make_logits(classes=2, unlabeled=3) | {"u_w": torch.full((3, 2), 1.5, dtype=torch.float64)}
    loss, _ = run(logits, torch.tensor([0, 1, 0, 1]), threshold=0.5, strict_threshold=strict)
    assert loss.pseudo.confidence_B.tolist() == [0.5] * 3
    assert loss.pseudo.mask_B.tolist() == [mask] * 3 and loss.pseudo.label_B.tolist() == [0] * 3


def test_one_class():
    loss, grads = run(make_logits(classes=1), torch.zeros(4, dtype=torch.int64))
    assert loss.total.item() == 0.0 and loss.pseudo.mask_B.all()
    assert all(not grad.any() for grad in grads.values())


def test_saturated_logits_stay_finite():
    logits = {name: 1e4 * torch.eye(5)[: len(x)].repeat(2, 1)[: len(x)] for name, x in make_logits(labeled=4, unlabeled=5).items()}
    loss, grads = run(logits, torch.tensor([4, 3, 2, 1]))
    assert torch.isfinite(loss.total) and all(torch.isfinite(grad).all() for grad in grads.values())


def test_sixteen_bit_logits_are_read_as_float32():
    logits, labels = make_logits(dtype=torch.bfloat16), torch.tensor([0, 1, 2, 3])
    loss, grads = run(logits, labels, threshold=0.9)
    exact, _ = run({name: x.float() for name, x in logits.items()}, labels, threshold=0.9)
    assert torch.equal(loss.total, exact.total) and torch.equal(loss.pseudo.confidence_B, exact.pseudo.confidence_B)
    assert loss.total.dtype == torch.float32 and grads["u_s"].dtype == torch.bfloat16


def test_equal_shares_of_two_ranks_average_to_the_global_loss():
    logits, labels = make_logits(labeled=4, unlabeled=6), torch.tensor([0, 1, 2, 3])
    whole, grads = run(logits, labels, threshold=0.7)
    totals, shares = [], []
    for rank in range(2):
        part = {name: x.chunk(2)[rank] for name, x in logits.items()}
        loss, grad = run(part, labels.chunk(2)[rank], threshold=0.7)
        totals.append(loss.total.detach())
        shares.append(grad["u_s"] / 2)  # DDP's mean over ranks
    torch.testing.assert_close(torch.stack(totals).mean(), whole.total.detach())
    torch.testing.assert_close(torch.cat(shares), grads["u_s"])


def calls_of(**options):
    """What the networks are asked: (who, views by name, with gradient) in order."""
    method = build_method("fixmatch", options, make_task(5, 4, 7))
    views = Views({name: x for name, x in make_logits().items() if name in method.views(method.config)})
    named = {id(tensor): name for name, tensor in views.items()}
    calls = []

    def network(who):
        def forward(*views):
            calls.append((who, [named[id(view)] for view in views], torch.is_grad_enabled()))
            outs = tuple(Out(view, view) for view in views)
            return outs[0] if len(outs) == 1 else outs

        return forward

    method(views, make_batch(torch.tensor([0, 1, 2, 3]), 7), network("student"), network("teacher") if method.needs_teacher(method.config) else None)
    return calls


def test_forwards_are_grouped_as_published():
    assert calls_of() == [("student", ["x", "u_w", "u_s"], True)]
    assert calls_of(strong_label_weight=0.1, separate_forwards=True) == [
        ("student", ["x"], True),
        ("student", ["x_s"], True),
        ("student", ["u_w"], False),
        ("student", ["u_s"], True),
    ]
    assert calls_of(pseudo_labels="teacher") == [("teacher", ["u_w"], False), ("student", ["x", "u_s"], True)]
    assert calls_of(strong_label_weight=0.1) == [("student", ["x", "x_s", "u_w", "u_s"], True)]
    assert calls_of(pseudo_labels="teacher", separate_forwards=True) == [("teacher", ["u_w"], False), ("student", ["x"], True), ("student", ["u_s"], True)]


def test_views_that_are_forwarded_together_lie_together():
    paper, eman = FixMatch.Config(), FixMatch.Config(pseudo_labels="teacher")
    assert FixMatch.views(paper) == {"x": View("labeled", "weak"), "u_w": View("unlabeled", "weak"), "u_s": View("unlabeled", "strong")}
    assert list(FixMatch.views(paper)) == ["x", "u_w", "u_s"]
    assert list(FixMatch.views(eman)) == ["x", "u_s", "u_w"]
    assert list(FixMatch.views(FixMatch.Config(strong_label_weight=0.1))) == ["x", "x_s", "u_w", "u_s"]
    assert FixMatch.needs_teacher(eman) and not FixMatch.needs_teacher(paper) and FixMatch.needs_unlabeled


def test_the_defaults_are_the_papers():
    config = FixMatch.Config()
    assert (config.threshold, config.unlabeled_weight, config.strong_label_weight) == (0.95, 1.0, 0.0)
    assert (config.strict_threshold, config.separate_forwards, config.pseudo_labels) == (False, False, "student")


def test_a_teacher_that_is_missing_is_named():
    method = build_method("fixmatch", {"pseudo_labels": "teacher"}, make_task(5, 4, 7))
    with pytest.raises(RuntimeError, match="teacher"):
        method(Views(make_logits()), make_batch(torch.zeros(4, dtype=torch.int64), 7), lambda *v: None, None)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(1, 6), strength=st.sampled_from([0.5, 1.0, 2.0]), a_s=st.sampled_from([0.0, 0.4]))
def test_logit_adjustment_is_the_plain_loss_at_shifted_labelled_logits(seed, classes, strength, a_s):
    counts = np.random.RandomState(seed).randint(0, 9, classes) + (np.arange(classes) == 0)
    shift = torch.from_numpy(np.log((counts / counts.sum()) ** strength + 1e-12))
    logits, labels = make_logits(seed, classes=classes), torch.arange(4) % classes
    task = make_task(classes, 4, 7, labeled_class_counts=tuple(counts.tolist()))
    options = {"threshold": 0.6, "strong_label_weight": a_s}
    adjusted = build_method("fixmatch", {**options, "logit_adjustment": strength}, task)
    adjusted.double().adjustment.copy_(shift)  # made in float32
    loss, grads = forward_backward(adjusted, logits, make_batch(labels, 7))
    arrays = [(logits[name] + shift if name in ("x", "x_s") else logits[name]).numpy() for name in VIEWS]
    want = reference(*arrays, labels.numpy(), threshold=0.6, weight=1.0, a_s=a_s, strict=False)
    assert loss.total.item() == pytest.approx(want["total"], rel=1e-11) and loss.pseudo.label_B.tolist() == want["pseudo"].tolist()
    for name in VIEWS:
        np.testing.assert_allclose(grads[name].numpy(), want["grads"][name], rtol=1e-10, atol=1e-13, err_msg=name)


def test_logit_adjustment_is_known_from_the_split_and_off_by_default():
    task = make_task(3, 4, 7, labeled_class_counts=(6, 3, 1))
    method = build_method("fixmatch", {"logit_adjustment": 2.0}, task)
    np.testing.assert_allclose(method.adjustment.numpy(), 2 * np.log([0.6, 0.3, 0.1]), rtol=1e-6)
    assert method.state_dict() == {} and FixMatch.Config().logit_adjustment == 0
    assert not list(build_method("fixmatch", {}, task).buffers())


@pytest.mark.parametrize(
    "options", [{"threshold": -0.1}, {"unlabeled_weight": -1.0}, {"strong_label_weight": -1.0}, {"pseudo_labels": "ema"}, {"logit_adjustment": -1.0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FixMatch.Config(**options)
