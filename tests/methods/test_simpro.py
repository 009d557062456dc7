"""SimPro at its public door: logits in, loss, gradients and priors out, against a derivation row by row in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.types import Out, View, Views
from tests.golden.identity import build_method, forward_backward, make_batch, make_task
from tests.methods.reference import softmax

SimPro = methods.get("simpro")
ROWS = {"x": "labeled", "x_s": "labeled", "u_w": "unlabeled", "u_s": "unlabeled", "u_s2": "unlabeled"}


def make_logits(seed=0, labeled=4, unlabeled=6, classes=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = {"labeled": labeled, "unlabeled": unlabeled}
    return {name: (3 * torch.randn(rows[side], classes, generator=generator, dtype=torch.float64)).to(dtype) for name, side in ROWS.items()}


def make(classes=5, labeled=4, unlabeled=6, counts=None, lists=(8, 24), **options):
    counts = counts or tuple(range(classes, 0, -1))
    task = make_task(classes, labeled, unlabeled, labeled_class_counts=counts, num_labeled=lists[0], num_unlabeled=lists[1])
    return build_method("simpro", options, task).double()


def reference(logits, labels, phi, pi, *, tau, threshold, ratio):
    """One step: loss, gradients at the logits, what it adds to K and D, margins."""
    views = {name: x.numpy() for name, x in logits.items()}
    labeled, strong = [n for n in ("x", "x_s") if n in views], [n for n in ("u_s", "u_s2") if n in views]
    grads = {name: np.zeros_like(x) for name, x in views.items()}
    a_u, a_m = np.log(phi**tau + 1e-12), np.log(pi**tau + 1e-12)
    sup = unsup = 0.0
    for name in labeled:
        for i, y in enumerate(labels):
            p = softmax(views[name][i] + a_m)
            sup -= np.log(p[y]) / (len(labeled) * len(labels) * ratio)
            grads[name][i] = (p - np.eye(len(p))[y]) / (len(labeled) * len(labels) * ratio)
    mass, mask, posterior = np.zeros_like(phi), [], []
    rows = len(strong) * len(views["u_w"])
    for i, weak in enumerate(views["u_w"]):
        q = softmax(weak + a_u)
        posterior.append(q)
        mask.append(float(q.max() >= threshold))
        mass += mask[-1] * q
        for name in strong:
            p = softmax(views[name][i] + a_m)
            unsup -= mask[-1] * (q * np.log(p)).sum() / rows
            grads[name][i] = mask[-1] * (p - q) / rows
    count = np.array([np.sum(np.asarray(labels) == c) for c in range(len(phi))], float)
    return {"sup": sup, "unsup": unsup, "grads": grads, "mass": mass, "count": count, "mask": np.array(mask), "posterior": np.array(posterior)}


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 5),
    unlabeled=st.integers(1, 7),
    classes=st.integers(1, 7),
    tau=st.sampled_from([0.5, 1.0, 2.0]),
    threshold=st.floats(0, 1),
    both=st.booleans(),
    strong=st.sampled_from([1, 2]),
    unnormalized=st.booleans(),
)
def test_epochs_equal_the_plain_derivation(seed, labeled, unlabeled, classes, tau, threshold, both, strong, unnormalized):
    counts = tuple(np.random.RandomState(seed).randint(0, 9, classes) + (np.arange(classes) == 0))
    options = {"prior_exponent": tau, "threshold": threshold, "labeled_strong_view": both, "strong_views": strong, "unnormalized_prior": unnormalized}
    method = make(classes, labeled, unlabeled, counts, (3 * labeled, 7 * unlabeled), prior_momentum=0.7, **options)
    phi, pi = np.full(classes, 1 / classes), np.asarray(counts, np.float32).astype(float) / sum(counts)
    np.testing.assert_allclose(method.mixture_prior.numpy(), pi, rtol=1e-6)
    phi, pi = (p.double().numpy().copy() for p in (method.unlabeled_prior, method.mixture_prior))  # float32 at the start
    for epoch in range(2):
        method.on_epoch_start(epoch)
        K, D = np.zeros(classes), np.zeros(classes)
        for step in range(2):
            logits = {n: x for n, x in make_logits(seed + 10 * epoch + step, labeled, unlabeled, classes).items() if n in method.views(method.config)}
            labels = (torch.arange(labeled) + step) % classes
            batch = make_batch(labels, unlabeled)
            loss, grads = forward_backward(method, logits, batch)
            method.after_backward(batch)
            want = reference(logits, labels.numpy(), phi, pi, tau=tau, threshold=threshold, ratio=7 / 3)
            np.testing.assert_array_equal(loss.pseudo.mask_B.numpy(), want["mask"])
            np.testing.assert_allclose(method.kept("posterior").numpy(), want["posterior"], rtol=1e-10)
            assert float(loss.parts["sup_loss"]) == pytest.approx(want["sup"], rel=1e-10, abs=1e-12)
            assert float(loss.parts["unsup_loss"]) == pytest.approx(want["unsup"], rel=1e-10, abs=1e-12)
            assert loss.total.item() == pytest.approx(want["sup"] + want["unsup"], rel=1e-10, abs=1e-12)
            for name, grad in grads.items():
                np.testing.assert_allclose(grad.numpy(), want["grads"][name], rtol=1e-9, atol=1e-13, err_msg=name)
            K, D = K + want["count"], D + want["mass"]
            np.testing.assert_allclose(method.labeled_count.numpy(), K, rtol=1e-10)
            np.testing.assert_allclose(method.unlabeled_mass.numpy(), D, rtol=1e-10)
        method.on_epoch_end(epoch)
        hat = D / (D.sum() + 1) if unnormalized else D / D.sum() if D.sum() else phi
        phi, pi = 0.7 * phi + 0.3 * hat, 0.7 * pi + 0.3 * (K + D) / (K + D).sum()
        np.testing.assert_allclose(method.unlabeled_prior.numpy(), phi, rtol=1e-10)
        np.testing.assert_allclose(method.mixture_prior.numpy(), pi, rtol=1e-10)


def test_gradcheck():
    logits = make_logits(3, 3, 4, 4)
    method = make(4, 3, 4, threshold=0.5)
    batch = make_batch(torch.tensor([0, 1, 3]), 4)

    def total(x, x_s, u_s, u_s2):
        views = Views({"x": x, "x_s": x_s, "u_w": logits["u_w"], "u_s": u_s, "u_s2": u_s2})
        return method(views, batch, lambda *views: tuple(Out(view, view) for view in views), None).total

    assert torch.autograd.gradcheck(total, tuple(logits[name].requires_grad_() for name in ("x", "x_s", "u_s", "u_s2")))


def step(method, seed=0, labels=(0, 1, 2, 3), **changes):
    logits = {name: x for name, x in make_logits(seed).items() if name in method.views(method.config)} | changes
    batch = make_batch(torch.tensor(labels), len(logits["u_w"]))
    loss, grads = forward_backward(method, logits, batch)
    return loss, grads, batch


def test_forward_alone_writes_nothing_and_priors_move_at_the_epochs_end_only():
    method = make(threshold=0.0)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.on_epoch_start(0)
    _, _, batch = step(method)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    method.after_backward(batch)
    now = method.state_dict()
    assert torch.equal(now["unlabeled_prior"], before["unlabeled_prior"]) and torch.equal(now["mixture_prior"], before["mixture_prior"])
    assert float(now["unlabeled_mass"].sum()) == pytest.approx(6) and now["labeled_count"].tolist() == [1, 1, 1, 1, 0]
    method.on_epoch_end(0)
    assert not torch.equal(method.unlabeled_prior, before["unlabeled_prior"]) and not torch.equal(method.mixture_prior, before["mixture_prior"])
    assert float(method.unlabeled_prior.sum()) == pytest.approx(1) and float(method.mixture_prior.sum()) == pytest.approx(1)
    method.on_epoch_start(1)
    assert not method.unlabeled_mass.any() and not method.labeled_count.any()


def test_an_epoch_without_a_confident_row():
    for unnormalized, total in ((False, 1.0), (True, 0.9)):
        method = make(threshold=1.01, unnormalized_prior=unnormalized)
        method.on_epoch_start(0)
        loss, grads, batch = step(method)
        assert float(loss.parts["unsup_loss"]) == 0 and not grads["u_s"].any() and not loss.pseudo.mask_B.any()
        method.after_backward(batch)
        method.on_epoch_end(0)
        assert float(method.unlabeled_prior.sum()) == pytest.approx(total, rel=1e-6)
        assert torch.isfinite(method.unlabeled_prior).all()


def test_the_unnormalised_prior_loses_a_little_mass():
    sums = {}
    for unnormalized in (False, True):
        method = make(threshold=0.0, prior_momentum=0.0, unnormalized_prior=unnormalized)
        method.on_epoch_start(0)
        method.after_backward(step(method)[2])
        method.on_epoch_end(0)
        sums[unnormalized] = float(method.unlabeled_prior.sum())
    assert sums[False] == pytest.approx(1) and sums[True] == pytest.approx(6 / 7)


def test_a_class_that_is_never_seen_stays_finite():
    method = make(counts=(9, 0, 3, 1, 0), threshold=0.0)
    for epoch in range(3):
        method.on_epoch_start(epoch)
        loss, grads, batch = step(method, seed=epoch, labels=(0, 2, 3, 0))
        assert torch.isfinite(loss.total) and all(torch.isfinite(g).all() for g in grads.values())
        method.after_backward(batch)
        method.on_epoch_end(epoch)
    assert all(torch.isfinite(value).all() for value in method.state_dict().values())


def test_a_confidence_on_the_threshold_passes_and_ties_go_to_the_lowest_class():
    loss, _, _ = step(make(threshold=0.2), u_w=torch.zeros(6, 5, dtype=torch.float64))
    assert loss.pseudo.label_B.tolist() == [0] * 6
    assert loss.pseudo.confidence_B.tolist() == pytest.approx([0.2] * 6)
    method = make(classes=2, labeled=2, threshold=0.5)
    logits = {name: x[:, :2] for name, x in make_logits(labeled=2).items()} | {"u_w": torch.zeros(6, 2, dtype=torch.float64)}
    loss, _ = forward_backward(method, logits, make_batch(torch.tensor([0, 1]), 6))
    assert loss.pseudo.confidence_B.tolist() == [0.5] * 6 and loss.pseudo.mask_B.all()


def test_the_weak_view_gets_no_gradient():
    _, grads, _ = step(make(threshold=0.0))
    assert not grads["u_w"].any() and all(grads[name].any() for name in ("x", "x_s", "u_s", "u_s2"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_read_as_float32(dtype):
    logits, labels = make_logits(dtype=dtype), torch.tensor([0, 1, 2, 3])
    loss, grads = forward_backward(make().float(), logits, make_batch(labels, 6))
    exact, _ = forward_backward(make().float(), {name: x.float() for name, x in logits.items()}, make_batch(labels, 6))
    assert torch.equal(loss.total, exact.total) and loss.total.dtype == torch.float32 and grads["u_s"].dtype == dtype


def test_one_row_of_each():
    method = make(3, 1, 1, lists=(1, 1))
    loss, _ = forward_backward(method, {name: x[:1, :3] for name, x in make_logits().items()}, make_batch(torch.tensor([2]), 1))
    assert torch.isfinite(loss.total)


@pytest.mark.parametrize(
    ("lists", "how", "want"),
    [
        ((1162, 9329), "loaders", 18 / 18),  # the published ones
        ((1162, 40000), "loaders", 78 / 18),
        ((1236, 9922), "loaders", 19 / 19),
        ((1162, 40000), "exact", (40000 / 512) / (1162 / 64)),
        ((40, 49960), "loaders", (49960 / 512) / (40 / 64)),  # fewer rows than a batch: rounding down would divide by zero
        ((1162, 100), "loaders", (100 / 512) / (1162 / 64)),
        ((100, 60000), "one", 1.0),
    ],
)
def test_the_ratio_of_the_lists(lists, how, want):
    task = make_task(10, 64, 512, num_labeled=lists[0], num_unlabeled=lists[1])
    assert SimPro.ratio(SimPro.Config(ratio=how), task) == pytest.approx(want, rel=1e-12)


def test_state_survives_a_round_trip_and_goes_on_alike():
    method = make(threshold=0.3)
    method.on_epoch_start(0)
    method.after_backward(step(method)[2])
    again = make(threshold=0.3)
    again.load_state_dict(method.state_dict())
    for one in (method, again):
        one.after_backward(step(one, seed=1)[2])
        one.on_epoch_end(0)
    assert set(method.state_dict()) == {"unlabeled_prior", "mixture_prior", "unlabeled_mass", "labeled_count"}
    for name, value in method.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_two_halves_of_a_batch_make_the_whole(monkeypatch):
    """What ranks do: the mean of the losses, the sum of the counts."""
    logits, labels = make_logits(), torch.tensor([0, 1, 2, 3])
    whole, batch = make(threshold=0.3), make_batch(labels, 6)
    loss, _ = forward_backward(whole, logits, batch)
    whole.after_backward(batch)
    losses, sums = [], []
    monkeypatch.setattr("fastssl.methods.simpro.sum_over_ranks", lambda x: sums.append(x) or x)
    for rank in range(2):
        half, part = make(threshold=0.3), make_batch(labels.chunk(2)[rank], 3)
        losses.append(forward_backward(half, {name: x.chunk(2)[rank] for name, x in logits.items()}, part)[0].total.detach())
        half.after_backward(part)
    torch.testing.assert_close(torch.stack(losses).mean(), loss.total.detach())
    torch.testing.assert_close(sums[0] + sums[1], torch.stack([whole.labeled_count, whole.unlabeled_mass]))


def test_views_are_one_joint_forward_in_the_published_order():
    asked = []

    def student(*views):
        asked.append(len(views))
        return tuple(Out(view, view) for view in views)

    method = make()
    method(Views(make_logits()), make_batch(torch.tensor([0, 1, 2, 3]), 6), student, None)
    assert asked == [5] and list(SimPro.views(SimPro.Config())) == ["x", "x_s", "u_w", "u_s", "u_s2"]
    assert SimPro.views(SimPro.Config())["u_s2"] == View("unlabeled", "strong")
    assert list(SimPro.views(SimPro.Config(labeled_strong_view=False, strong_views=1))) == ["x", "u_w", "u_s"]


def test_the_defaults():
    config = SimPro.Config()
    assert (config.threshold, config.prior_exponent, config.prior_momentum, config.unnormalized_prior) == (0.95, 2.0, 0.9, False)
    assert (config.labeled_strong_view, config.strong_views, config.ratio) == (True, 2, "loaders")


@pytest.mark.parametrize("options", [{"threshold": -0.1}, {"prior_exponent": 0.0}, {"prior_momentum": 1.1}, {"strong_views": 3}, {"ratio": "x"}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SimPro.Config(**options)
