"""What every method owes the house, whichever paper it comes from."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastssl import methods
from fastssl.engine.draws import MethodDraws
from fastssl.models.heads import build_head
from fastssl.models.joint import NetworkForward
from fastssl.models.network import Network
from fastssl.types import Loss, RawBatch, Task, Views
from tests.golden.identity import make_batch, make_task

ROWS = {"labeled": 4, "unlabeled": 6}
CLASSES = 5


class Body(nn.Module):
    """[N, 1, 4, 4] -> [N, 8]; any side, as multi-crop methods ask for several."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.layers(x)


class CallableTeacher(NetworkForward):
    """A teacher as methods call it: no gradient, and a count of how often it was moved."""

    follows = 0

    @torch.no_grad()
    def __call__(self, *views):
        return super().__call__(*views)

    @torch.no_grad()
    def head(self, name, *feats):
        return super().head(name, *feats)

    def follow(self):
        self.follows += 1


def network_of(method) -> Network:
    """A small network with BatchNorm and the heads that the method declares."""
    specs = method.heads(method.config, method.task)
    heads = {name: build_head(spec.kind, 8, spec.options, name) for name, spec in specs.items()}
    return Network(Body(), 8, nn.Linear(8, CLASSES), heads, on_request=[name for name, spec in specs.items() if spec.on_request])


def inputs_of(method, step: int = 0, seed: int = 0):
    """(views, batch) of one step as the engine would make them."""
    wanted = method.views(method.config)
    generator = torch.Generator().manual_seed(seed + 1000 * step)
    views = Views({name: torch.randn(ROWS[view.stream], 1, 4, 4, generator=generator) for name, view in wanted.items()})
    reads_unlabeled = any(view.stream == "unlabeled" for view in wanted.values())
    batch = make_batch(torch.arange(ROWS["labeled"]) % CLASSES, ROWS["unlabeled"] if reads_unlabeled else 0, step)
    raw = {}
    for stream in ("labeled", "unlabeled")[: 1 + reads_unlabeled]:
        raw[stream] = RawBatch.allocate(ROWS[stream], 1, 1)
        raw[stream].draw_B.copy_(torch.arange(ROWS[stream]) + step * ROWS[stream])
    wishes = method.draws(method.config, method.task)
    batch.draws = MethodDraws(wishes, wanted, seed=seed, device=torch.device("cpu"))(raw, views, torch.tensor(step))
    return views, batch


def one_step(method, step_code=None, step: int = 0, student=None, teacher=None) -> Loss:
    views, batch = inputs_of(method, step)
    student = NetworkForward(network_of(method).train()) if student is None else student
    teacher = CallableTeacher(network_of(method).eval()) if teacher is None else teacher
    loss = (step_code or method)(views, batch, student, teacher if method.needs_teacher(method.config) else None)
    loss.total.backward()
    with torch.no_grad():
        method.after_backward(batch)
    return loss


def task() -> Task:
    labels = tuple(i % CLASSES for i in range(ROWS["labeled"]))
    return make_task(CLASSES, ROWS["labeled"], ROWS["unlabeled"], total_steps=8, steps_per_epoch=2, labeled_labels=labels)


@pytest.fixture(params=methods.names())
def method(request):
    found = methods.get(request.param)
    return found(found.Config(), task())


def test_config_is_frozen_and_documented_defaults_build(method):
    assert dataclasses.is_dataclass(method.config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.config.anything = 1


def test_views_name_real_streams_and_slots(method):
    views = method.views(method.config)
    assert views and all(view.stream in ROWS for view in views.values())
    assert all(view.policy in ("weak", "strong") or view.size is not None for view in views.values()), "named slots are for multi-crop views"
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
        method.on_epoch_start(0)
        one_step(method)
        method.on_epoch_end(0)


def test_state_changes_only_between_forward_and_the_next(method):
    """Evaluation and a repeated forward may not move banks or priors: they are written after the backward pass or at an epoch's ends."""
    torch.manual_seed(0)
    views, batch = inputs_of(method)
    student, teacher = NetworkForward(network_of(method).train()), CallableTeacher(network_of(method).eval())
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    torch.manual_seed(1)  # dropout of heads
    first = method(views, batch, student, teacher if method.needs_teacher(method.config) else None).total
    assert {name: torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items()} == dict.fromkeys(before, True)
    torch.manual_seed(1)
    assert torch.equal(first, method(views, batch, student, teacher if method.needs_teacher(method.config) else None).total)


def test_going_on_from_saved_state_changes_nothing(method):
    """Four steps over an epoch's end in one go, or saved, rebuilt and loaded after two: the same losses and the same state."""

    def run(method, student, teacher, steps) -> list[float]:
        losses = []
        for step in steps:
            if step % 2 == 0:
                method.on_epoch_start(step // 2)
            torch.manual_seed(step)  # dropout of heads
            losses.append(float(one_step(method, None, step, student, teacher).total.detach()))
            if step % 2 == 1:
                method.on_epoch_end(step // 2)
        return losses

    torch.manual_seed(0)
    student, teacher = NetworkForward(network_of(method).train()), CallableTeacher(network_of(method).eval())
    fresh = type(method)(method.config, method.task)
    fresh.load_state_dict(method.state_dict())
    initial = copy.deepcopy(student.network.state_dict())
    whole = run(method, student, teacher, range(4))

    student.network.load_state_dict(initial)
    halves = run(fresh, student, teacher, range(2))
    resumed = type(method)(method.config, method.task)
    resumed.load_state_dict(fresh.state_dict())
    halves += run(resumed, student, teacher, range(2, 4))
    assert halves == whole
    assert all(torch.equal(tensor, method.state_dict()[name]) for name, tensor in resumed.state_dict().items())


def test_the_fake_step_would_catch_a_look():
    fixmatch = methods.get("fixmatch")
    method = fixmatch(fixmatch.Config(), task())

    def peeking(v, batch, student, teacher):
        loss = method(v, batch, student, teacher)
        return loss if loss.pseudo.mask_B.any() else Loss(loss.total * 0)

    with pytest.raises(DataDependentOutputException), FakeTensorMode(allow_non_fake_inputs=True):
        one_step(method, peeking)


def test_state_is_registered(method):
    """Tensors that live on a method are buffers, so that checkpoints and ``.to(device)`` find them."""
    loose = [name for name, value in vars(method).items() if isinstance(value, torch.Tensor)]
    assert loose == [] and list(method.parameters()) == []
