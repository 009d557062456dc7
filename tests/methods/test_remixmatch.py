"""ReMixMatch: alignment, anchoring, mixing, turned images, and the ring of batch means."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.functional import align_to, quarter_turns
from fastssl.types import View, Views
from tests.golden.identity import build_method, make_task
from tests.methods.reference import cross_entropy, softmax
from tests.methods.reference_beyond import Linear, check_round_trip, images, make, mixed_rows, normalised, one_hot, soft_cross_entropy

ReMixMatch = methods.get("remixmatch")


def matrix(columns, seed=0, scale=1.0):
    return (scale * torch.randn(4, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).requires_grad_()


def plain(v, labels, weights, head, ring, prior, draws, options, now):
    """(parts, gradient at the weights, at the head, batch mean)."""
    flat = {name: view.flatten(1).numpy() for name, view in v.items()}
    answers = [softmax(row @ weights) for row in flat["u_w"]]
    guesses = []
    for answer in answers:
        aligned = normalised(np.array([q * p / m for q, p, m in zip(answer, prior, np.mean(ring, 0), strict=True)]))
        guesses.append(normalised(aligned ** (1 / options["temperature"])))
    strong = [flat[f"u_s{k + 1}"] for k in range(options["strong_views"])]
    classes = weights.shape[1]
    pictures = mixed_rows([flat["x"], flat["u_w"], *strong], draws["partner"].astype(int), draws["weight"])
    targets = mixed_rows([one_hot(labels, classes), *[guesses] * (1 + len(strong))], draws["partner"].astype(int), draws["weight"])
    ramp = min(1.0, now / options["ramp_steps"]) if options["ramp_steps"] else 1.0
    parts, grad = {}, np.zeros_like(weights)

    def term(name, factor, picture, loss_grad):
        parts[name] = parts.get(name, 0.0) + factor * loss_grad[0]
        return factor * picture.T @ loss_grad[1]

    grad += term("sup_loss", 1.0, pictures[0], soft_cross_entropy(pictures[0] @ weights, targets[0]))
    for picture, target in zip(pictures[1:], targets[1:], strict=True):
        grad += term("unsup_loss", options["unlabeled_weight"] * ramp / (1 + len(strong)), picture, soft_cross_entropy(picture @ weights, target))
    grad += term("strong_loss", options["strong_weight"] * ramp, strong[0], soft_cross_entropy(strong[0] @ weights, np.array(guesses)))
    grad_head = np.zeros_like(head)
    if options["rotation_weight"]:
        turns = [int(4 * u) for u in draws["turn"]]
        turned = np.array([np.rot90(image[0], k).ravel() for image, k in zip(v["u_s1"].numpy(), turns, strict=True)])
        grad_head = term("rotation_loss", options["rotation_weight"], turned, cross_entropy(turned @ head, np.array(turns)))
    return parts, grad, grad_head, np.mean(answers, 0)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 4),
    unlabeled=st.integers(1, 5),
    classes=st.integers(1, 5),
    strong_views=st.integers(1, 3),
    temperature=st.sampled_from([0.5, 1.0]),
    rotation_weight=st.sampled_from([0.0, 0.5]),
    ramp_steps=st.sampled_from([0, 2]),
    alignment_length=st.integers(1, 3),
)
def test_equals_the_plain_derivation(seed, labeled, unlabeled, classes, strong_views, temperature, rotation_weight, ramp_steps, alignment_length):
    options = {"strong_views": strong_views, "temperature": temperature, "rotation_weight": rotation_weight, "ramp_steps": ramp_steps}
    options |= {"alignment_length": alignment_length, "unlabeled_weight": 1.5, "strong_weight": 0.7}
    counts = tuple(1 + (seed + k) % 3 for k in range(classes))
    method = make("remixmatch", options, classes=classes, labeled=labeled, unlabeled=unlabeled, labeled_class_counts=counts)
    method.prior_C.copy_(torch.tensor(counts, dtype=torch.float64) / sum(counts))  # made in float32
    ring = [np.full(classes, 1 / classes)] * alignment_length
    method.ring_LC.fill_(1 / classes)
    for now in range(4):
        views, batch = images(method, seed + now, step=now)
        weights, head = matrix(classes, seed + now), matrix(4, seed)
        loss = method(views, batch, Linear(weights, rotation=head), None)
        loss.total.backward()
        with torch.no_grad():
            method.after_backward(batch)
        draws = {name: draw.double().numpy() for name, draw in batch.draws.items()}
        prior = np.array(counts) / sum(counts)
        labels, weights_now, head_now = batch.labeled.label_B.numpy(), weights.detach().numpy(), head.detach().numpy()
        parts, grad, grad_head, mean = plain(views, labels, weights_now, head_now, ring, prior, draws, options, now)
        assert {name: float(part) for name, part in loss.parts.items()} == pytest.approx(parts, rel=1e-9, abs=1e-11)
        assert loss.total.item() == pytest.approx(sum(parts.values()), rel=1e-9, abs=1e-11)
        np.testing.assert_allclose(weights.grad.numpy(), grad, rtol=1e-8, atol=1e-10)
        if rotation_weight:
            np.testing.assert_allclose(head.grad.numpy(), grad_head, rtol=1e-8, atol=1e-10)
        ring = ring[: now % alignment_length] + [mean] + ring[now % alignment_length + 1 :]
        np.testing.assert_allclose(method.ring_LC.numpy(), np.array(ring), rtol=1e-10)


def test_gradcheck_with_the_guess_held():
    method = make("remixmatch", {"strong_views": 2})
    views, batch = images(method, 1)
    held, head = matrix(4, 9).detach(), matrix(4, 3)
    assert torch.autograd.gradcheck(lambda w, h: method(views, batch, Linear(w, untracked=held, rotation=h), None).total, (matrix(4), head))


def test_forwards():
    method = make("remixmatch", {"strong_views": 2})
    network = Linear(matrix(4), rotation=matrix(4))
    method(*images(method, 0), network, None)
    assert network.calls == [("untracked", [5], False), ("tracked", [3, 5, 5, 5, 5, 5], True)]
    without = make("remixmatch", {"strong_views": 2, "rotation_weight": 0.0})
    network = Linear(matrix(4))
    loss = without(*images(without, 0), network, None)
    assert network.calls[1] == ("tracked", [3, 5, 5, 5, 5], True) and "rotation_loss" not in loss.parts
    assert not without.heads(without.config, without.task) and method.heads(method.config, method.task)["rotation"].on_request


@pytest.mark.parametrize("turns", [[0, 1, 2, 3], [3, 3, 0, 1]])
def test_quarter_turns_are_rot90(turns):
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    got = quarter_turns(x, torch.tensor(turns))
    assert all(torch.equal(got[i], torch.rot90(x[i], k, (1, 2))) for i, k in enumerate(turns))


def test_alignment_edges():
    prob = torch.tensor([[0.5, 0.5, 0.0]])
    assert align_to(prob, torch.tensor([0.5, 0.5, 0.0]), torch.tensor([1.0, 0.0, 0.0])).tolist() == [[1.0, 0.0, 0.0]]
    assert torch.isfinite(align_to(prob, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.3, 0.3, 0.4]))).all()
    assert align_to(prob, torch.ones(3), torch.tensor([0.0, 0.0, 1.0])).tolist() == [[0.0, 0.0, 0.0]]


def test_a_class_without_labels_is_never_guessed():
    method = make("remixmatch", {"strong_views": 1}, labeled_class_counts=(2, 1, 0, 1))
    assert (method(*images(method, 0), Linear(matrix(4), rotation=matrix(4)), None).pseudo.label_B != 2).all()


def test_state_is_written_after_backward_only_and_survives_a_round_trip():
    method = make("remixmatch", {"strong_views": 2, "alignment_length": 3})
    network = Linear(matrix(4).detach().requires_grad_(), rotation=matrix(4))

    def inputs(n):
        views, batch = images(method, n, step=n)
        return dict(views), batch

    check_round_trip(method, network, inputs)
    assert set(method.state_dict()) == {"ring_LC", "ring_slot"}


def test_sixteen_bit_logits_and_saturation():
    losses = []
    for cast in (lambda z: z.bfloat16(), lambda z: z.bfloat16().float()):
        method = build_method("remixmatch", {"strong_views": 1}, make_task(4, 3, 5))
        views, batch = images(method, 0, dtype=torch.float32)
        loss = method(views, batch, Linear(matrix(4).detach().float(), cast=cast, rotation=matrix(4).detach().float()), None)
        losses.append(loss.total)
        assert loss.total.dtype == torch.float32
    assert torch.equal(*losses)
    method = make("remixmatch", {"strong_views": 1})
    weights = matrix(4, scale=1e4)
    loss = method(*images(method, 0), Linear(weights, rotation=matrix(4, scale=1e4)), None)
    loss.total.backward()
    assert torch.isfinite(loss.total) and torch.isfinite(weights.grad).all()


def test_views_defaults_and_refusals():
    config = ReMixMatch.Config()
    views = ReMixMatch.views(config)
    assert list(views)[:3] == ["u_w", "x", "u_s1"] and len(views) == 10 and views["x"] == View("labeled", "strong") and views["u_w"].policy == "weak"
    assert (config.strong_views, config.temperature, config.alpha, config.alignment_length, config.ramp_steps) == (8, 0.5, 0.75, 128, 0)
    assert (config.unlabeled_weight, config.strong_weight, config.rotation_weight) == (1.5, 0.5, 0.5)
    for bad in ({"strong_views": 0}, {"temperature": 0.0}, {"alpha": 0.0}, {"rotation_weight": -1.0}, {"alignment_length": 0}, {"ramp_steps": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ReMixMatch.Config(**bad)


def test_the_views_are_left_as_they_were():
    method = make("remixmatch", {"strong_views": 1})
    views, batch = images(method, 0)
    before = {name: view.clone() for name, view in views.items()}
    method(Views(dict(views)), batch, Linear(matrix(4), rotation=matrix(4)), None)
    assert all(torch.equal(view, before[name]) for name, view in views.items())
