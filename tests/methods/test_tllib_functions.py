"""The pure functions that the Transfer-Learning-Library's methods share."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import functional as F
from fastssl.types import Out, View


@settings(derandomize=True, max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12))
def test_the_last_writer_is_that_of_a_loop(rows):
    index, writes = (list(column) for column in zip(*rows, strict=True))
    table = [-1] * 6
    for n, (i, w) in enumerate(rows):
        table[i] = n if w else table[i]
    got = F.last_writer(torch.tensor(index), 6, torch.tensor(writes))
    assert got.tolist() == [table[i] for i in index]
    everyone = F.last_writer(torch.tensor(index), 6)
    assert everyone.tolist() == [max(n for n, other in enumerate(index) if other == i) for i in index]


def test_a_reversed_gradient():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = F.reverse_gradient(x, torch.tensor(0.25))
    assert torch.equal(y, x)
    (y * torch.tensor([3.0, 5.0])).sum().backward()
    assert x.grad.tolist() == [-0.75, -1.25]
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    F.reverse_gradient(half, torch.tensor(0.5)).sum().backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize(("epoch", "length", "want"), [(0, 10, math.exp(-5)), (5, 10, math.exp(-1.25)), (10, 10, 1), (99, 10, 1), (0, 0, 1), (3, 0, 1)])
def test_the_sigmoid_ramp(epoch, length, want):
    like = torch.zeros((), dtype=torch.float64)
    got = F.sigmoid_ramp(torch.tensor(epoch), length, like)
    assert got.dtype == torch.float64 and float(got) == pytest.approx(want, rel=1e-12)


def test_soft_cross_entropy_of_a_hard_target_is_the_hard_one():
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    one_hot = torch.eye(3, dtype=torch.float64)[labels]
    torch.testing.assert_close(F.soft_cross_entropy_rows(logits, one_hot), F.cross_entropy_rows(logits, labels))
    torch.testing.assert_close(F.soft_cross_entropy_rows(logits, one_hot, 0.5), F.cross_entropy_rows(2 * logits, labels))


@pytest.mark.parametrize(("strict", "want"), [(True, [False, False, True]), (False, [False, True, True])])
def test_exceeds(strict, want):
    assert F.exceeds(torch.tensor([0.4, 0.5, 0.6]), 0.5, strict).tolist() == want


def test_views_are_forwarded_in_groups():
    calls = []

    def network(*views):
        calls.append((len(views), torch.is_grad_enabled()))
        outs = tuple(Out(view + 1, view) for view in views)
        return outs[0] if len(outs) == 1 else outs

    views = {name: torch.full((2, 3), float(n)) for n, name in enumerate("abc")}
    outs = F.forward_views(network, views, [["a", "c"], ["b"]], no_gradient=("b", "c"))
    assert calls == [(2, True), (1, False)] and {name: float(out.logits_NC[0, 0]) for name, out in outs.items()} == {"a": 1.0, "c": 3.0, "b": 2.0}
    assert F.groups_of(["a", "b"], separate=True) == [["a"], ["b"]] and F.groups_of(["a", "b"], separate=False) == [["a", "b"]]


def test_the_strong_labelled_view_exists_only_with_a_weight():
    assert F.labeled_views(0.0) == {"x": View("labeled", "weak")}
    assert F.labeled_views(0.1) == {"x": View("labeled", "weak"), "x_s": View("labeled", "strong")}
