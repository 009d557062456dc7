"""MixMatch: guesses, sharpening, mixing across the whole batch, the ramp, and which forwards may move running statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.functional import mixup, sharpen
from fastssl.models.joint import NetworkForward
from fastssl.types import Out, View, Views
from tests.golden.identity import build_method, make_task
from tests.methods.reference_beyond import Linear, images, make, mixmatch, normalised

MixMatch = methods.get("mixmatch")


def matrix(classes, seed=0, scale=1.0):
    return (scale * torch.randn(4, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).requires_grad_()


def flat(view):
    return view.flatten(1).numpy()


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 5),
    unlabeled=st.integers(1, 6),
    classes=st.integers(1, 5),
    augmentations=st.integers(1, 3),
    temperature=st.sampled_from([0.3, 0.5, 1.0]),
    weight=st.sampled_from([0.0, 1.0, 75.0]),
    now=st.sampled_from([0, 3, 10, 99]),
    ramp=st.sampled_from([0, 10]),
    one_weight=st.booleans(),
    interleave=st.booleans(),
)
def test_equals_the_plain_derivation(seed, labeled, unlabeled, classes, augmentations, temperature, weight, now, ramp, one_weight, interleave):
    options = {"augmentations": augmentations, "temperature": temperature, "unlabeled_weight": weight, "ramp_steps": ramp}
    method = make("mixmatch", {**options, "one_weight": one_weight, "interleave": interleave}, classes=classes, labeled=labeled, unlabeled=unlabeled)
    views, batch = images(method, seed, step=now)
    before = {name: view.clone() for name, view in views.items()}
    weights = matrix(classes, seed)
    loss = method(views, batch, Linear(weights), None)
    loss.total.backward()

    draws = {name: draw.double().numpy() for name, draw in batch.draws.items()}
    rows = labeled + augmentations * unlabeled
    assert sorted(draws["partner"]) == list(range(rows)) and len(draws["weight"]) == (1 if one_weight else rows)
    factor = weight * (min(1.0, now / ramp) if ramp else 1.0)
    sup, unsup, grad, guesses = mixmatch(
        flat(views.x), [flat(views[f"u_{k + 1}"]) for k in range(augmentations)], batch.labeled.label_B.numpy(), weights.detach().numpy(),
        draws["partner"].astype(int), np.broadcast_to(draws["weight"], rows), temperature=temperature, unlabeled_weight=factor,
    )  # fmt: skip
    assert float(loss.parts["sup_loss"]) == pytest.approx(sup, rel=1e-10, abs=1e-12)
    assert float(loss.parts["unsup_loss"]) == pytest.approx(unsup, rel=1e-10, abs=1e-12)
    assert loss.total.item() == pytest.approx(sup + unsup, rel=1e-10, abs=1e-12)
    np.testing.assert_allclose(weights.grad.numpy(), grad, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(loss.pseudo.confidence_B.numpy(), guesses.max(1), rtol=1e-10)
    assert all(torch.equal(view, before[name]) for name, view in views.items()), "the buffers of the views are not the method's to change"


def test_gradcheck_with_the_guess_held():
    method = make("mixmatch", {"unlabeled_weight": 3.0, "ramp_steps": 0})
    views, batch = images(method, 1)
    held = matrix(4, 9).detach()
    assert torch.autograd.gradcheck(lambda w: method(views, batch, Linear(w, untracked=held), None).total, matrix(4))


def test_guesses_are_made_alone_without_gradient_and_statistics():
    method = make("mixmatch", {"augmentations": 3})
    network = Linear(matrix(4))
    method(*images(method, 0), network, None)
    assert network.calls == [("untracked", [5], False)] * 3 + [("tracked", [3, 5, 5, 5], True)]


def test_interleaved_forwards_hold_every_row_once_and_track_the_first():
    method = make("mixmatch", {"interleave": True}, labeled=3, unlabeled=6)
    network = Linear(matrix(4))
    method(*images(method, 0), network, None)
    assert network.calls[2:] == [("tracked", [1, 2, 2], True), ("untracked", [1, 2, 2], True), ("untracked", [1, 2, 2], True)]


class Normed(torch.nn.Module):
    bn_groups = 1

    def __init__(self):
        super().__init__()
        self.bn, self.layer = torch.nn.BatchNorm2d(1), torch.nn.Linear(4, 4)

    def forward(self, x):
        feat = self.bn(x).flatten(1)
        return Out(self.layer(feat), feat)


def test_interleaving_normalises_every_nth_rows_together():
    method = build_method("mixmatch", {"interleave": True}, make_task(4, 3, 6))
    torch.manual_seed(0)
    net = Normed().double()
    views, batch = images(method, 0)
    rows = [torch.randn(n, 1, 2, 2, dtype=torch.float64) for n in (3, 6, 6)]
    got = torch.cat(method._logits(rows, NetworkForward(net)))
    want = torch.empty_like(got)
    everything = torch.cat(rows)
    for j in range(3):
        places = [i for i in range(15) if (i if i < 3 else i - 3 if i < 9 else i - 9) % 3 == j]
        part = everything[places]
        normal = (part - part.mean()) / (part.var(unbiased=False) + net.bn.eps).sqrt()
        want[places] = net.layer(normal.flatten(1))
    torch.testing.assert_close(got, want)
    assert int(net.bn.num_batches_tracked) == 1


def test_a_mixed_row_stays_nearer_to_itself():
    rows = torch.tensor([[0.0], [10.0]])
    method = make("mixmatch", {"augmentations": 1, "temperature": 1.0}, classes=2, labeled=1, unlabeled=1)
    views = Views({"x": rows[:1].view(1, 1, 1, 1).double(), "u_1": rows[1:].view(1, 1, 1, 1).double()})
    _, batch = images(method, 0)
    batch.draws = {"partner": torch.tensor([1, 0]), "weight": torch.tensor([0.2, 0.9])}
    seen = []

    class Spy(Linear):
        def __call__(self, *views):
            seen.extend(view.flatten().tolist() for view in views)
            return super().__call__(*views)

    method(views, batch, Spy(torch.zeros(1, 2, dtype=torch.float64)), None)
    assert seen == [pytest.approx([2.0]), pytest.approx([9.0])]


@settings(derandomize=True, max_examples=50, deadline=None)
@given(row=st.lists(st.floats(1e-6, 1), min_size=1, max_size=6), temperature=st.floats(0.05, 2))
def test_sharpening(row, temperature):
    prob = normalised(np.array(row))
    got = sharpen(torch.from_numpy(prob)[None], temperature)[0].numpy()
    powers = np.exp((np.log(prob) - np.log(prob).max()) / temperature)
    np.testing.assert_allclose(got, normalised(powers), rtol=1e-9, atol=1e-300)


def test_sharpening_many_equal_small_probabilities_does_not_vanish():
    row = torch.full((1, 1000), 1e-3)
    torch.testing.assert_close(sharpen(row, 0.01), row)
    assert sharpen(torch.tensor([[1.0, 0.0]]), 0.5).tolist() == [[1.0, 0.0]]


def test_mixup_takes_partners_from_every_part():
    parts = [torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0]])]
    mixed = mixup(parts, torch.tensor([2, 1, 0]), torch.tensor([0.75, 0.5, 1.0]))
    assert [m.flatten().tolist() for m in mixed] == [[0.75 + 2.5, 2.0], [10.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_read_as_float32(dtype):
    losses = []
    for cast in (lambda z: z.to(dtype), lambda z: z.to(dtype).float()):
        method = build_method("mixmatch", {"ramp_steps": 0}, make_task(4, 3, 5))
        views, batch = images(method, 0, dtype=torch.float32)
        loss = method(views, batch, Linear(matrix(4).detach().float().requires_grad_(), cast=cast), None)
        losses.append(loss.total.detach())
        assert loss.total.dtype == torch.float32
    assert torch.equal(*losses)


def test_saturated_logits_stay_finite():
    method = make("mixmatch", {"ramp_steps": 0})
    weights = matrix(4, scale=1e4)
    loss = method(*images(method, 0), Linear(weights), None)
    loss.total.backward()
    assert torch.isfinite(loss.total) and torch.isfinite(weights.grad).all()


def test_views_defaults_and_refusals():
    config = MixMatch.Config()
    assert MixMatch.views(config) == {"x": View("labeled", "weak"), "u_1": View("unlabeled", "weak"), "u_2": View("unlabeled", "weak")}
    assert (config.temperature, config.alpha, config.unlabeled_weight, config.ramp_steps) == (0.5, 0.75, 75.0, 16000)
    assert not config.one_weight and not config.interleave and not list(make("mixmatch", {}).buffers())
    for bad in ({"augmentations": 0}, {"temperature": 0.0}, {"alpha": 0.0}, {"unlabeled_weight": -1.0}, {"ramp_steps": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            MixMatch.Config(**bad)
