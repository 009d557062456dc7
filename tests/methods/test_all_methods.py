"""What every method owes the house, whichever paper it comes from."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastssl import methods
from fastssl.types import Loss, Out, Views
from tests.golden.identity import make_batch, make_task

ROWS = {"labeled": 4, "unlabeled": 6}
CLASSES = 5


class Student(nn.Module):
    """A small network with BatchNorm, called as methods call a student."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU()), nn.Linear(7, CLASSES)

    def forward(self, *views):
        feat = self.body(torch.cat(views))
        parts = zip(self.head(feat).split([len(v) for v in views]), feat.split([len(v) for v in views]), strict=True)
        outs = tuple(Out(logits, part) for logits, part in parts)
        return outs[0] if len(outs) == 1 else outs


def one_step(method, step_code=None) -> Loss:
    views = Views({name: torch.randn(ROWS[view.stream], 8) for name, view in method.views(method.config).items()})
    reads_unlabeled = any(view.stream == "unlabeled" for view in method.views(method.config).values())
    batch = make_batch(torch.arange(ROWS["labeled"]) % CLASSES, ROWS["unlabeled"] if reads_unlabeled else 0)
    student, teacher = Student().train(), Student().eval()
    loss = (step_code or method)(views, batch, student, teacher if method.needs_teacher(method.config) else None)
    loss.total.backward()
    method.after_backward(batch)
    return loss


@pytest.fixture(params=methods.names())
def method(request):
    found = methods.get(request.param)
    return found(found.Config(), make_task(CLASSES, ROWS["labeled"], ROWS["unlabeled"]))


def test_config_is_frozen_and_documented_defaults_build(method):
    assert dataclasses.is_dataclass(method.config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.config.anything = 1


def test_views_name_real_streams_and_slots(method):
    views = method.views(method.config)
    assert views and all(view.stream in ROWS and view.policy in ("weak", "strong") for view in views.values())
    assert method.needs_unlabeled == any(view.stream == "unlabeled" for view in views.values())


def test_a_step_gives_a_finite_scalar_and_detached_parts(method):
    torch.manual_seed(0)
    loss = one_step(method)
    assert loss.total.shape == () and torch.isfinite(loss.total)
    assert "sup_loss" in loss.parts and all(part.shape == () and not part.requires_grad for part in loss.parts.values())
    if loss.pseudo is not None:
        assert loss.pseudo.label_B.shape == loss.pseudo.mask_B.shape == (ROWS["unlabeled"],)
        assert loss.pseudo.label_B.dtype == torch.int64 and loss.pseudo.mask_B.is_floating_point()


def test_a_step_never_looks_at_values(method):
    with FakeTensorMode(allow_non_fake_inputs=True):
        one_step(method)


def test_the_fake_step_would_catch_a_look():
    fixmatch = methods.get("fixmatch")
    method = fixmatch(fixmatch.Config(), make_task(CLASSES, 4, 6))

    def peeking(v, batch, student, teacher):
        loss = method(v, batch, student, teacher)
        return loss if loss.pseudo.mask_B.any() else Loss(loss.total * 0)

    with pytest.raises(DataDependentOutputException), FakeTensorMode(allow_non_fake_inputs=True):
        one_step(method, peeking)


def test_state_is_registered(method):
    """Tensors that live on a method are buffers, so that checkpoints and ``.to(device)`` find them."""
    loose = [name for name, value in vars(method).items() if isinstance(value, torch.Tensor)]
    assert loose == [] and list(method.parameters()) == []
