"""ERM: the supervised loss and nothing else."""

import numpy as np
import pytest
import torch

from fastssl import methods
from fastssl.types import View
from tests.golden.identity import build_method, forward_backward, make_batch, make_task
from tests.methods.reference import erm as reference

ERM = methods.get("erm")


def logits(seed=0, rows=6, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {name: (3 * torch.randn(rows, classes, generator=generator)).to(dtype) for name in ("x", "x_s")}


@pytest.mark.parametrize("a_s", [0.0, 0.1, 2.0])
def test_equals_the_plain_derivation(a_s):
    views, labels = logits(), torch.tensor([0, 3, 1, 1, 2, 0])
    loss, grads = forward_backward(build_method("erm", {"strong_weight": a_s}, make_task(4, 6, 0)), views, make_batch(labels, 0))
    want, want_grads = reference(views["x"].numpy(), views["x_s"].numpy(), labels.numpy(), a_s)
    assert loss.total.item() == float(loss.parts["sup_loss"]) == pytest.approx(want, rel=1e-13)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad.numpy(), want_grads[name], rtol=1e-12, atol=1e-15)
    assert loss.pseudo is None


def test_the_strong_view_exists_only_with_a_weight():
    assert ERM.views(ERM.Config()) == {"x": View("labeled", "weak")}
    assert ERM.views(ERM.Config(strong_weight=0.1)) == {"x": View("labeled", "weak"), "x_s": View("labeled", "strong")}
    assert not ERM.needs_unlabeled and not ERM.needs_teacher(ERM.Config())


def test_sixteen_bit_logits_are_read_as_float32():
    views, labels = logits(dtype=torch.bfloat16), torch.tensor([0, 3, 1, 1, 2, 0])
    method = build_method("erm", {}, make_task(4, 6, 0))
    loss, grads = forward_backward(method, views, make_batch(labels, 0))
    exact, _ = forward_backward(method, {name: x.float() for name, x in views.items()}, make_batch(labels, 0))
    assert loss.total.dtype == torch.float32 and torch.equal(loss.total, exact.total)
    assert grads["x"].dtype == torch.bfloat16


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="strong_weight"):
        ERM.Config(strong_weight=-0.1)
