"""ACR and ACR_d at their public door: logits of two heads in, loss, gradients and estimates out, against a derivation row by row in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.functional import class_presence, log_prior, present_class_average, symmetric_kl
from fastssl.types import Out, Views
from tests.golden.identity import build_method, make_batch, make_task
from tests.methods.reference import cross_entropy, softmax

BOTH = ["acr", "acr_d"]
VIEWS = ("x", "u_w", "u_s", "u_s2")


def make_logits(seed=0, labeled=4, unlabeled=6, classes=5, dtype=torch.float64):
    """Both heads of a view side by side, [N, 2K]."""
    generator = torch.Generator().manual_seed(seed)
    rows = (labeled, unlabeled, unlabeled, unlabeled)
    return {name: (3 * torch.randn(n, 2 * classes, generator=generator, dtype=torch.float64)).to(dtype) for name, n in zip(VIEWS, rows, strict=True)}


def make(name="acr", classes=5, labeled=4, unlabeled=6, counts=None, steps_per_epoch=2, **options):
    task = make_task(classes, labeled, unlabeled, labeled_class_counts=counts or tuple(range(classes, 0, -1)), steps_per_epoch=steps_per_epoch)
    return build_method(name, options, task).double()


def two_heads(*views):
    return tuple(Out(view.chunk(2, 1)[0], view, {"balanced": view.chunk(2, 1)[1]}) for view in views)


def step(method, logits, labels=(0, 1, 2, 3), duplicates=(), epoch=0):
    batch = make_batch(torch.as_tensor(labels), len(logits["u_w"]), epoch=epoch)
    batch.unlabeled.is_labeled_B = torch.tensor([i in duplicates for i in range(len(logits["u_w"]))])
    leaves = {name: x.clone().requires_grad_() for name, x in logits.items()}
    loss = method(Views(leaves), batch, two_heads, None)
    loss.total.backward()
    return loss, {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}, batch


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


class Reference:
    """The whole method in plain numpy."""

    def __init__(self, counts, *, tau1, tau12, tau2, threshold, T, momentum, after, last, adaptive, steps):
        self.__dict__.update(locals())
        self.p = np.asarray(counts, float) / sum(counts)
        self.u, self.k, self.tau = np.full(len(counts), 1 / len(counts)), np.zeros(3), tau1

    def start(self, epoch):
        if epoch > self.after:
            e = np.exp(self.k / self.steps)
            self.tau = self.tau1 * e[0] / e.sum()
        self.k = np.zeros(3)

    def step(self, logits, labels, duplicates, epoch):
        z, b = ({name: x.numpy()[:, half] for name, x in logits.items()} for half in (slice(None, len(self.p)), slice(len(self.p), None)))

        def shift(tau):
            return np.log(self.p**tau + 1e-12)

        sup, grad_x = cross_entropy(z["x"], labels)
        sup_b, grad_xb = cross_entropy(b["x"] + shift(self.tau2), labels)
        grads = {name: np.zeros_like(x.numpy()) for name, x in logits.items()}
        grads["x"] = np.concatenate([grad_x, grad_xb], 1)
        n, C = len(z["u_w"]), len(self.p)
        unsup = unsup_b = 0.0
        mask, label, seen, counted = [], [], [], []
        for i in range(n):
            P = softmax((z["u_w"][i] - shift(self.tau if self.adaptive else self.tau1)) / self.T)
            P2, Pb, Pt = softmax((z["u_w"][i] - shift(self.tau12)) / self.T), softmax(b["u_w"][i] / self.T), softmax(z["u_w"][i] / self.T)
            y1, y2, yb = P.argmax(), P2.argmax(), Pb.argmax()
            m, mb = (max(P.max(), Pt.max()) >= self.threshold), (max(P2.max(), Pb.max()) >= self.threshold)
            for name in ("u_s", "u_s2"):
                q, qb = softmax(z[name][i]), softmax(b[name][i])
                unsup -= m * np.log(q[y1]) / (2 * n)
                unsup_b -= mb * np.log(qb[y2]) / (2 * n)
                grads[name][i] = np.concatenate([m * (q - np.eye(C)[y1]), mb * (qb - np.eye(C)[y2])]) / (2 * n)
            mask.append(float(m))
            label.append(int(y1))
            seen.append(int(yb))
            counted.append(bool(Pb.max() >= self.threshold) and i not in duplicates)
        w = np.zeros(C)
        for c, v in zip(seen, counted, strict=True):
            w[c] = v if self.last else max(w[c], v)
        if epoch > self.after and w.any():
            self.u = self.momentum * self.u + (1 - self.momentum) * w / w.sum()
            anchors = (self.p, np.full(C, 1 / C), self.p[::-1])
            self.k = self.k + [(kl(self.u, a) + kl(a, self.u)) / 2 for a in anchors]
        return {"sup": sup, "unsup": unsup, "sup_b": sup_b, "unsup_b": unsup_b, "grads": grads, "mask": mask, "label": label}


@settings(derandomize=True, max_examples=20, deadline=None)
@given(
    name=st.sampled_from(BOTH),
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 5),
    unlabeled=st.integers(1, 9),
    classes=st.integers(1, 6),
    taus=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0])] * 3),
    threshold=st.floats(0, 1),
    temperature=st.sampled_from([0.5, 1.0]),
    after=st.integers(0, 2),
    last=st.booleans(),
)
def test_epochs_equal_the_plain_derivation(name, seed, labeled, unlabeled, classes, taus, threshold, temperature, after, last):
    counts = tuple(int(n) for n in np.sort(np.random.RandomState(seed).randint(1, 50, classes))[::-1])
    options = {"adaptive_exponent": taus[0], "label_exponent": taus[1], "balanced_exponent": taus[2], "threshold": threshold, "temperature": temperature}
    options |= {"prior_momentum": 0.8, "estimate_after_epoch": after, "class_presence": "last" if last else "any"}
    method = make(name, classes, labeled, unlabeled, counts, **options)
    method.anchors.copy_(torch.stack([torch.tensor(a) for a in anchors_of(counts)]))  # the buffers begin in float32
    method.unlabeled_prior.fill_(1 / classes)
    want = Reference(
        counts, tau1=taus[0], tau12=taus[1], tau2=taus[2], threshold=threshold, T=temperature,
        momentum=0.8, after=after, last=last, adaptive=name == "acr", steps=2,
    )  # fmt: skip
    for epoch in range(4):
        method.on_epoch_start(epoch)
        want.start(epoch)
        assert float(method.exponent) == pytest.approx(want.tau, rel=1e-9)
        for t in range(2):
            logits, labels = make_logits(seed + 2 * epoch + t, labeled, unlabeled, classes), torch.arange(labeled) % classes
            duplicates = {i for i in range(unlabeled) if (i + seed + t) % 3 == 0}
            loss, grads, batch = step(method, logits, labels, duplicates, epoch)
            method.after_backward(batch)
            ref = want.step(logits, labels.numpy(), duplicates, epoch)
            assert loss.pseudo.mask_B.tolist() == ref["mask"] and loss.pseudo.label_B.tolist() == ref["label"]
            parts = {"sup_loss": "sup", "unsup_loss": "unsup", "sup_loss_balanced": "sup_b", "unsup_loss_balanced": "unsup_b"}
            for ours, theirs in parts.items():
                assert float(loss.parts[ours]) == pytest.approx(ref[theirs], rel=1e-10, abs=1e-12), ours
            assert loss.total.item() == pytest.approx(sum(ref[theirs] for theirs in parts.values()), rel=1e-10, abs=1e-12)
            for view in VIEWS:
                np.testing.assert_allclose(grads[view].numpy(), ref["grads"][view], rtol=1e-9, atol=1e-13, err_msg=view)
            np.testing.assert_allclose(method.unlabeled_prior.numpy(), want.u, rtol=1e-9)
            np.testing.assert_allclose(method.divergence.numpy(), want.k, rtol=1e-8, atol=1e-12)


def anchors_of(counts):
    p = np.asarray(counts, float) / sum(counts)
    return [p, np.full(len(p), 1 / len(p)), p[::-1].copy()]


@pytest.mark.parametrize("name", BOTH)
def test_gradcheck(name):
    logits, method, batch = make_logits(3, 3, 4, 3), make(name, 3, 3, 4, threshold=0.6), make_batch(torch.tensor([0, 1, 2]), 4)

    def total(x, u_s, u_s2):
        return method(Views({"x": x, "u_w": logits["u_w"], "u_s": u_s, "u_s2": u_s2}), batch, two_heads, None).total

    assert torch.autograd.gradcheck(total, tuple(logits[view].requires_grad_() for view in ("x", "u_s", "u_s2")))


@pytest.mark.parametrize("name", BOTH)
def test_forward_alone_writes_nothing_and_the_estimate_begins_when_it_should(name):
    method = make(name, threshold=0.0, estimate_after_epoch=1)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    assert set(before) == {"unlabeled_prior", "divergence", "exponent"}
    for epoch, moves in ((0, False), (1, False), (2, True)):
        *_, batch = step(method, make_logits(), epoch=epoch)
        assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
        method.after_backward(batch)
        assert torch.equal(method.unlabeled_prior, before["unlabeled_prior"]) != moves and method.divergence.any() == moves
    assert float(method.unlabeled_prior.sum()) == pytest.approx(1)


def test_the_exponent_follows_the_divergences():
    method = make(estimate_after_epoch=0, adaptive_exponent=2.0, smallest_exponent=0.5)
    method.divergence.fill_(9.0)
    method.on_epoch_start(0)
    assert float(method.exponent) == 2.0 and not method.divergence.any()
    method.on_epoch_start(1)
    assert float(method.exponent) == pytest.approx(1.0)  # a third of the way from 0.5 to 2
    method.divergence.copy_(torch.tensor([100.0, 0.0, 0.0]))
    method.on_epoch_start(2)
    assert float(method.exponent) == pytest.approx(2.0)  # far from the labelled distribution
    method.divergence.copy_(torch.tensor([0.0, 100.0, 100.0]))
    method.on_epoch_start(3)
    assert float(method.exponent) == pytest.approx(0.5)


def test_acr_adapts_its_labels_and_acr_d_does_not():
    logits = make_logits(seed=2, unlabeled=40)
    adapted = {}
    for name in BOTH:
        method = make(name, unlabeled=40, counts=(90, 30, 9, 3, 1), estimate_after_epoch=0)
        first = step(method, logits)[0].pseudo.label_B
        method.on_epoch_start(1)
        assert float(method.exponent) == pytest.approx(2 / 3)
        adapted[name] = not torch.equal(first, step(method, logits)[0].pseudo.label_B)
    assert adapted == {"acr": True, "acr_d": False}


@pytest.mark.parametrize("name", BOTH)
def test_no_confident_row_changes_nothing(name):
    method = make(name, threshold=1.01, estimate_after_epoch=0)
    before = method.unlabeled_prior.clone()
    loss, grads, batch = step(method, make_logits(), epoch=1)
    method.after_backward(batch)
    assert float(loss.parts["unsup_loss"]) == float(loss.parts["unsup_loss_balanced"]) == 0 and not grads["u_s"].any() and not grads["u_w"].any()
    assert torch.equal(method.unlabeled_prior, before) and not method.divergence.any()


@pytest.mark.parametrize("name", BOTH)
def test_labelled_duplicates_are_not_counted(name):
    method = make(name, threshold=0.0, estimate_after_epoch=0)
    *_, batch = step(method, make_logits(), epoch=1, duplicates=range(6))
    assert not method.present(batch).any()
    *_, batch = step(method, make_logits(), epoch=1, duplicates=range(5))
    assert method.present(batch).sum() == 1 and method.present(batch)[make_logits()["u_w"][5, 5:].argmax()]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("rule", "present"), [("any", True), ("last", False)])
def test_who_decides_whether_a_class_is_present(name, rule, present):
    """Two rows that the balanced head takes for class 1: the first confident, the second not."""
    logits = make_logits(unlabeled=2)
    logits["u_w"][:, 5:] = torch.tensor([[0.0, 50, 0, 0, 0], [0.0, 0.1, 0, 0, 0]])
    method = make(name, unlabeled=2, estimate_after_epoch=0, class_presence=rule)
    *_, batch = step(method, logits, epoch=1)
    assert method.present(batch).tolist() == [False, present, False, False, False]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12), last=st.booleans())
def test_class_presence_is_the_loop(rows, last):
    want = [False] * 5
    for label, counts in rows:
        want[label] = counts if last else want[label] or counts
    labels, counted = (torch.tensor(column) for column in zip(*rows, strict=True))
    assert class_presence(labels, counted, 5, last_only=last).tolist() == want


def test_the_shared_formulas():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    assert float(symmetric_kl(p, p)) == 0 and float(symmetric_kl(p, q)) == float(symmetric_kl(q, p))
    assert float(symmetric_kl(p, q)) == pytest.approx((kl([0.5, 0.5], [0.25, 0.25]) + kl([0.25, 0.25, 0.5], [0.5, 0.5, 1e-12])) / 2, rel=1e-5)
    assert log_prior(p, 2.0).tolist() == pytest.approx([np.log(0.25), np.log(0.25), np.log(1e-12)], rel=1e-5)
    moved, divergence = present_class_average(q, torch.zeros(3, dtype=torch.bool), p[None], 0.5)
    assert torch.equal(moved, q) and divergence.tolist() == [0]
    moved, divergence = present_class_average(q, torch.tensor([True, False, True]), torch.stack([p, q]), 0.5)
    assert moved.tolist() == pytest.approx([0.375, 0.125, 0.5]) and divergence.tolist() == pytest.approx([float(symmetric_kl(moved, a)) for a in (p, q)])


@pytest.mark.parametrize("name", BOTH)
def test_a_class_without_labels_stays_finite(name):
    method = make(name, counts=(9, 0, 3, 1, 0), threshold=0.0, estimate_after_epoch=0)
    for epoch in range(3):
        method.on_epoch_start(epoch)
        loss, grads, batch = step(method, make_logits(epoch), (0, 2, 3, 0), epoch=epoch)
        method.after_backward(batch)
        assert torch.isfinite(loss.total) and all(torch.isfinite(g).all() for g in grads.values())
    assert all(torch.isfinite(value).all() for value in method.state_dict().values())


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_read_as_float32(name, dtype):
    logits = make_logits(dtype=dtype)
    loss, grads, _ = step(make(name).float(), logits)
    exact, _, _ = step(make(name).float(), {view: x.float() for view, x in logits.items()})
    assert torch.equal(loss.total, exact.total) and loss.total.dtype == torch.float32 and grads["u_s"].dtype == dtype


def test_the_double_prior_makes_the_loss_double():
    task = make_task(5, 4, 6, labeled_class_counts=(5, 4, 3, 2, 1))
    logits = make_logits(dtype=torch.float32)
    plain, double = (step(build_method("acr", {"float64_prior": wish}, task), logits)[0] for wish in (False, True))
    assert plain.total.dtype == torch.float32 and double.total.dtype == torch.float64 and plain.total.item() == pytest.approx(double.total.item(), rel=1e-5)


def test_acr_d_may_take_its_prior_from_other_counts():
    logits = make_logits()
    other = make("acr_d", counts=(5, 4, 3, 2, 1), class_counts=(1, 2, 3, 4, 5))
    torch.testing.assert_close(step(other, logits)[0].total, step(make("acr_d", counts=(1, 2, 3, 4, 5)), logits)[0].total)
    assert not torch.equal(step(other, logits)[0].total, step(make("acr_d", counts=(5, 4, 3, 2, 1)), logits)[0].total)
    with pytest.raises(ValueError, match="class_counts has 2 numbers, the dataset has 5"):
        make("acr_d", class_counts=(1, 2))


@pytest.mark.parametrize("name", BOTH)
def test_state_survives_a_round_trip_and_goes_on_alike(name):
    method = make(name, threshold=0.3, estimate_after_epoch=0)
    method.on_epoch_start(1)
    method.after_backward(step(method, make_logits(), epoch=1)[2])
    again = make(name, threshold=0.3, estimate_after_epoch=0)
    again.load_state_dict(method.state_dict())
    for one in (method, again):
        one.after_backward(step(one, make_logits(1), epoch=1)[2])
        one.on_epoch_start(2)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in method.state_dict().items())


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("rule", ["any", "last"])
def test_the_estimate_reads_the_rows_of_all_ranks(name, rule, monkeypatch):
    logits, options = make_logits(unlabeled=8), {"threshold": 0.6, "estimate_after_epoch": 0, "class_presence": rule, "unlabeled": 8}
    whole = make(name, **options)
    *_, batch = step(whole, logits, epoch=1, duplicates=(3,))
    whole.after_backward(batch)
    kept = []
    for rank in range(2):
        half = make(name, **options)
        share = {view: x if view == "x" else x.chunk(2)[rank] for view, x in logits.items()}
        *_, batch = step(half, share, epoch=1, duplicates=(3,) if rank == 0 else ())
        kept.append(dict(half._kept))
    both = {key: torch.cat([part[key] for part in kept]) for key in ("seen", "counted")}
    monkeypatch.setattr(f"fastssl.methods.{name}.gather_rows", lambda x: next(v for k, v in both.items() if torch.equal(v[-len(x) :], x)))
    half.after_backward(batch)
    assert torch.equal(half.unlabeled_prior, whole.unlabeled_prior) and torch.equal(half.divergence, whole.divergence)


@pytest.mark.parametrize("name", BOTH)
def test_what_the_method_asks_of_the_house(name):
    found = methods.get(name)
    config, task = found.Config(), make_task(5, 4, 6)
    assert list(found.views(config)) == list(VIEWS)
    spec = found.heads(config, task)["balanced"]
    assert (spec.kind, spec.options, spec.on_request) == ("linear", {"out": 5, "init": "xavier"}, False)
    out = Out(torch.zeros(2, 5), torch.zeros(2, 3), {"balanced": torch.ones(2, 5)})
    assert torch.equal(found.predict(config, out), torch.ones(2, 5))
    assert (config.threshold, config.adaptive_exponent, config.label_exponent, config.balanced_exponent) == (0.95, 2.0, 2.0, 2.0)
    assert (config.prior_momentum, config.estimate_after_epoch, config.temperature, config.class_presence) == (0.99, 5, 1.0, "any")


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    "options",
    [{"threshold": -1.0}, {"temperature": 0.0}, {"adaptive_exponent": 0.0}, {"prior_momentum": 2.0}, {"estimate_after_epoch": -1}, {"class_presence": "x"}],
)
def test_impossible_options_are_refused(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        methods.get(name).Config(**options)


def test_more_impossible_options_are_refused():
    with pytest.raises(ValueError, match="smallest_exponent"):
        methods.get("acr").Config(smallest_exponent=3.0)
    with pytest.raises(ValueError, match="class_counts"):
        methods.get("acr_d").Config(class_counts=(0, 0))
