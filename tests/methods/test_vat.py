"""Virtual adversarial training: the direction, its length, constants, and which forwards move running statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastssl import methods
from fastssl.methods.vat import _unit_images
from fastssl.models.joint import NetworkForward
from fastssl.models.network import Network
from fastssl.types import View
from tests.golden.identity import build_method, make_task
from tests.methods.reference import cross_entropy, softmax
from tests.methods.reference_beyond import Linear, images, make

VAT = methods.get("vat")


def matrix(classes, seed=0, scale=1.0):
    return (scale * torch.randn(4, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).requires_grad_()


def unit(row):
    length = np.sqrt((row**2).sum())
    return row / length if length else row


def plain(x, u, labels, weights, directions, options):
    """(parts, gradient at the weights)."""
    sup, grad = cross_entropy(x @ weights, labels)
    grad = x.T @ grad
    unsup = entropy = 0.0
    for row, d in zip(u, directions, strict=True):
        p = softmax(row @ weights)
        d = unit(d)
        for _ in range(options["iterations"]):
            d = unit(weights @ (softmax((row + options["xi"] * d) @ weights) - p))
        moved = row + options["epsilon"] * d
        answer = softmax(moved @ weights)
        unsup += options["unlabeled_weight"] * (p * (np.log(p) - np.log(answer))).sum() / len(u)
        grad = grad + options["unlabeled_weight"] * np.outer(moved, answer - p) / len(u)
        own = -(p * np.log(p)).sum()
        entropy += options["entropy_weight"] * own / len(u)
        grad = grad + options["entropy_weight"] * np.outer(row, -p * (np.log(p) + own)) / len(u)
    return {"sup_loss": sup, "unsup_loss": unsup, "entropy_loss": entropy}, grad


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 4),
    unlabeled=st.integers(1, 5),
    classes=st.integers(2, 5),
    iterations=st.integers(0, 3),
    epsilon=st.sampled_from([0.0, 0.5, 3.0]),
    xi=st.sampled_from([1e-2, 1.0]),
    entropy_weight=st.sampled_from([0.0, 0.3]),
)
def test_equals_the_plain_derivation(seed, labeled, unlabeled, classes, **options):
    options["unlabeled_weight"] = 1.5
    method = make("vat", options, classes=classes, labeled=labeled, unlabeled=unlabeled)
    views, batch = images(method, seed)
    before = {name: view.clone() for name, view in views.items()}
    weights = matrix(classes, seed)
    loss = method(views, batch, Linear(weights), None)
    loss.total.backward()
    flat = [t.flatten(1).numpy() for t in (views.x, views.u, batch.draws["direction"])]
    parts, grad = plain(flat[0], flat[1], batch.labeled.label_B.numpy(), weights.detach().numpy(), flat[2], options)
    if not options["entropy_weight"]:
        del parts["entropy_loss"]
    assert {name: float(part) for name, part in loss.parts.items()} == pytest.approx(parts, rel=1e-7, abs=1e-10)
    assert loss.total.item() == pytest.approx(sum(parts.values()), rel=1e-7, abs=1e-10)
    np.testing.assert_allclose(weights.grad.numpy(), grad, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(view, before[name]) for name, view in views.items())


def test_gradcheck_with_a_random_direction():
    """Without iterations the shift does not depend on the network; the prediction that it is compared with is held."""
    method = make("vat", {"iterations": 0, "epsilon": 2.0})
    views, batch = images(method, 1)

    class Held(Linear):
        def untracked(self, *views):
            weight = self.weight if torch.is_grad_enabled() else self.other
            return self._answer("untracked", views, weight)

    held = matrix(4, 9).detach()
    assert torch.autograd.gradcheck(lambda w: method(views, batch, Held(w, untracked=held), None).total, matrix(4))


def test_forwards():
    method = make("vat", {"iterations": 2})
    network = Linear(matrix(4))
    method(*images(method, 0), network, None)
    assert network.calls == [
        ("tracked", [3], True),
        ("untracked", [5], False),
        ("untracked", [5], True),
        ("untracked", [5], True),
        ("untracked", [5], True),
    ]
    with_entropy = make("vat", {"entropy_weight": 0.1, "iterations": 0})
    network = Linear(matrix(4))
    with_entropy(*images(with_entropy, 0), network, None)
    assert network.calls[1] == ("untracked", [5], True)


def small_network(dtype):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
    return Network(body, 32, nn.Linear(32, 4)).to(dtype)


def test_only_the_labelled_batch_moves_running_statistics_and_parameters_get_one_gradient():
    method = make("vat", {})
    views, batch = images(method, 0)
    net, other = small_network(torch.float64), small_network(torch.float64)
    loss = method(views, batch, NetworkForward(net), None)
    other(views.x)
    for (name, mine), theirs in zip(net.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    assert all(p.grad is None for p in net.parameters()), "the search for the direction leaves no gradients"
    loss.total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_it_works_without_gradients():
    method = make("vat", {})
    with torch.no_grad():
        loss = method(*images(method, 0), Linear(matrix(4)), None)
    with_gradient = method(*images(method, 0), Linear(matrix(4)), None)
    assert torch.equal(loss.total, with_gradient.total.detach()) and not loss.total.requires_grad


def agreement(xi):
    """Median cosine between the directions found in float32 and in float64."""
    found = []
    for dtype, step in ((torch.float32, xi), (torch.float64, 1e-5)):
        method = make("vat", {"xi": step, "epsilon": 1.0}, unlabeled=32)
        views, batch = images(method, 0, dtype=dtype)
        net = small_network(dtype).eval()
        with torch.no_grad():
            prob = torch.softmax(net(views.u).logits_NC, 1)
        found.append(method._adversary(views.u, prob, batch.draws["direction"], NetworkForward(net)).flatten(1).double())
    return float((found[0] * found[1]).sum(1).median())


def test_the_default_step_survives_float32_and_the_published_one_does_not():
    assert agreement(VAT.Config().xi) > 0.99 > 0.9 > agreement(1e-6)


def test_the_direction_is_the_worst_of_its_length():
    """One iteration already finds a change that costs more than random ones of the same length."""
    costs = {}
    for iterations in (0, 1):
        method = make("vat", {"iterations": iterations, "epsilon": 0.3}, unlabeled=40)
        costs[iterations] = float(method(*images(method, 2), Linear(matrix(4)), None).parts["unsup_loss"])
    assert costs[1] > 1.5 * costs[0] > 0


def test_unit_images():
    x = torch.stack([torch.full((1, 2, 2), 1e-30), torch.zeros(1, 2, 2), torch.full((1, 2, 2), 1e30)])
    torch.testing.assert_close(_unit_images(x).flatten(1).norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))


def test_one_class_and_saturation_stay_finite():
    for classes, scale in ((1, 1.0), (4, 1e4)):
        method = make("vat", {"entropy_weight": 0.1}, classes=classes)
        weights = matrix(classes, scale=scale)
        loss = method(*images(method, 0), Linear(weights), None)
        loss.total.backward()
        assert torch.isfinite(loss.total) and torch.isfinite(weights.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_read_as_float32(dtype):
    losses = []
    for cast in (lambda z: z.to(dtype), lambda z: z.to(dtype).float()):
        method = build_method("vat", {"xi": 1.0}, make_task(4, 3, 5))
        views, batch = images(method, 0, dtype=torch.float32)
        loss = method(views, batch, Linear(matrix(4).detach().float(), cast=cast), None)
        losses.append(loss.total)
        assert loss.total.dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-3)  # gradients are 16 bits wide on the way back in one of them


def test_views_defaults_and_refusals():
    config = VAT.Config()
    assert VAT.views(config) == {"x": View("labeled", "weak"), "u": View("unlabeled", "weak")}
    assert (config.epsilon, config.xi, config.iterations, config.unlabeled_weight, config.entropy_weight) == (8.0, 0.01, 1, 1.0, 0.0)
    assert not list(make("vat", {}).buffers())
    for bad in ({"epsilon": -1.0}, {"xi": 0.0}, {"iterations": -1}, {"unlabeled_weight": -1.0}, {"entropy_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            VAT.Config(**bad)
