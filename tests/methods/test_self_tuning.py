"""Self-Tuning: the group contrast, the queue that is written in order without a loop, the teacher that moves twice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.types import Out, View, Views
from tests.golden.identity import build_method, make_batch, make_task
from tests.methods import reference_tllib as reference
from tests.methods.reference import cross_entropy

SelfTuning = methods.get("self_tuning")


def make(classes=3, labeled=4, unlabeled=5, places=2, dim=6, **options):
    torch.manual_seed(0)
    given = {"queue_size": places, "projection_dim": dim} | options
    return build_method("self_tuning", given, make_task(classes, labeled, unlabeled)).double()


class Net:
    """Logits are the first columns of a view, the projection the rest; notes calls by view name."""

    def __init__(self, who, classes, views, calls):
        self.who, self.classes, self.names, self.calls = who, classes, {id(tensor): name for name, tensor in views.items()}, calls

    def __call__(self, *views):
        self.calls.append((self.who, [self.names[id(view)] for view in views], torch.is_grad_enabled()))
        outs = tuple(Out(v[:, : self.classes], v, {"projector": v[:, self.classes :]}) for v in views)
        return outs[0] if len(outs) == 1 else outs

    def follow(self):
        self.calls.append((self.who, "moves"))


def run(method, views, labels, write=True):
    """(loss, calls); views are leaves that hold gradients afterwards."""
    calls = []
    nets = [Net(who, method.task.num_classes, views, calls) for who in ("student", "teacher")]
    batch = make_batch(labels, len(views["u_q"]))
    loss = method(Views(views), batch, *nets)
    loss.total.backward()
    if write:
        method.after_backward(batch)
    return loss, calls


def make_views(seed, classes=3, labeled=4, unlabeled=5, dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = {"x_q": labeled, "x_k": labeled, "u_q": unlabeled, "u_k": unlabeled}
    return {name: torch.randn(n, classes + dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for name, n in rows.items()}


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(1, 5),
    labeled=st.integers(1, 9),
    unlabeled=st.integers(1, 9),
    places=st.integers(1, 4),  # fewer places than rows of a class in a batch happen often
    dim=st.integers(2, 5),
    temperature=st.sampled_from([0.07, 0.5]),
    separate=st.booleans(),
    extra=st.booleans(),
)
def test_equals_the_plain_derivation(seed, classes, labeled, unlabeled, places, dim, temperature, separate, extra):
    options = {"temperature": temperature, "labeled_group_weight": 0.7, "unlabeled_group_weight": 1.3}
    method = make(classes, labeled, unlabeled, places, dim, separate_forwards=separate, pseudo_label_forward=extra, **options)
    plain = reference.Queue(method.queue.numpy(), places)
    for step in range(3):
        views = make_views(seed + step, classes, labeled, unlabeled, dim)
        labels = torch.from_numpy(np.random.default_rng(seed + step).integers(0, classes, labeled))
        loss, _ = run(method, views, labels)
        arrays = {name: view.detach().numpy() for name, view in views.items()}
        logits, keys = ({name: a[:, part] for name, a in arrays.items()} for part in (slice(classes), slice(classes, None)))
        ce, grad_ce = cross_entropy(logits["x_q"], labels.numpy())
        pseudo = logits["u_q"].argmax(1)
        total, want = ce, {"x_q": [grad_ce], "u_q": [np.zeros_like(logits["u_q"])]}
        for stream, given_labels, weight in (("x", labels.numpy(), 0.7), ("u", pseudo, 1.3)):
            q, k, length = unit(keys[f"{stream}_q"]), unit(keys[f"{stream}_k"]), np.linalg.norm(keys[f"{stream}_q"], axis=1, keepdims=True)
            contrast, grad = plain.contrast(q, k, given_labels, temperature)
            plain.write(k, given_labels)
            total += weight * contrast
            want[f"{stream}_q"].append(weight * (grad - q * (grad * q).sum(1, keepdims=True)) / length)
        assert loss.total.item() == pytest.approx(total, rel=1e-9)
        for name, parts in want.items():
            np.testing.assert_allclose(views[name].grad.numpy(), np.concatenate(parts, 1), rtol=1e-7, atol=1e-10)
        assert views["x_k"].grad is None and views["u_k"].grad is None
        np.testing.assert_array_equal(loss.pseudo.label_B.numpy(), pseudo)
        np.testing.assert_allclose(method.queue.numpy(), plain.keys, rtol=1e-12)
        assert method.pointer.tolist() == plain.pointer


def test_gradcheck():
    method = make()
    views = make_views(3)
    batch = make_batch(torch.tensor([0, 1, 2, 0]), 5)

    def total(x_q, u_q):
        given = {"x_q": x_q, "x_k": views["x_k"].detach(), "u_q": u_q, "u_k": views["u_k"].detach()}
        return method(Views(given), batch, *(Net(who, 3, given, []) for who in ("student", "teacher"))).total

    assert torch.autograd.gradcheck(total, (views["x_q"], views["u_q"]))


def test_the_teacher_moves_twice_and_forwards_are_grouped_as_published():
    labels = torch.tensor([0, 1, 2, 0])
    student = [("student", ["x_q"], True), ("teacher", "moves"), ("teacher", ["x_k"], False)]
    again = [("student", ["u_q"], False), ("student", ["u_q"], True), ("teacher", "moves"), ("teacher", ["u_k"], False)]
    assert run(make(separate_forwards=True, pseudo_label_forward=True), make_views(0), labels)[1] == student + again
    assert run(make(separate_forwards=True), make_views(0), labels)[1] == student + again[1:]
    moves = [("teacher", "moves")] * 2
    assert run(make(), make_views(0), labels)[1] == [("student", ["x_q", "u_q"], True), *moves, ("teacher", ["x_k", "u_k"], False)]
    assert SelfTuning.moves_teacher and SelfTuning.needs_teacher(SelfTuning.Config())
    assert SelfTuning.views(SelfTuning.Config())["u_k"] == View("unlabeled", "strong")


def test_more_keys_of_a_class_than_places():
    method = make(classes=2, places=2, dim=2)
    keys = torch.arange(10, dtype=torch.float64).view(5, 2)
    queue, pointer = method.enqueued(torch.zeros(4, 2).double(), torch.tensor([1, 0]), keys, torch.tensor([0, 0, 1, 0, 0]))
    assert queue.tolist() == [[8, 9], [6, 7], [4, 5], [0, 0]] and pointer.tolist() == [1, 1]


def test_the_result_does_not_hang_on_the_order_in_which_a_device_writes(monkeypatch):
    method, keys, labels = make(classes=2, places=2, dim=3), torch.randn(9, 3).double(), torch.tensor([0, 0, 1, 0, 0, 1, 0, 1, 1])
    want = method.enqueued(method.queue, method.pointer, keys, labels)
    real = torch.Tensor.index_copy
    monkeypatch.setattr(torch.Tensor, "index_copy", lambda self, dim, index, source: real(self, dim, index.flip(0), source.flip(0)))
    got = method.enqueued(method.queue, method.pointer, keys, labels)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and not torch.equal(got[0], method.queue)


def test_the_unlabelled_call_meets_the_labelled_keys():
    method = make(classes=1, labeled=1, unlabeled=1, places=1, temperature=1.0)
    views = make_views(1, 1, 1, 1)
    loss, _ = run(method, views, torch.tensor([0]))
    q, own, labeled_key = (unit(views[name].detach().numpy()[:, 1:])[0] for name in ("u_q", "u_k", "x_k"))
    a, b = q @ own, q @ labeled_key
    assert float(loss.parts["unsup_loss"]) == pytest.approx(-np.log(2) - (a + b) / 2 + np.log(np.exp(a) + np.exp(b)))


def test_the_queue_starts_with_unit_vectors_and_is_written_after_backward_only():
    method = make()
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    labels = torch.tensor([0, 1, 2, 0])
    run(method, make_views(0), labels, write=False)
    assert set(before) == {"queue", "pointer"} and all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    copy = make()
    run(method, make_views(0), labels)
    copy.load_state_dict(method.state_dict())
    losses = [run(m, make_views(1), labels)[0].total for m in (method, copy)]
    assert torch.equal(*losses) and torch.equal(method.queue, copy.queue) and torch.equal(method.pointer, copy.pointer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_answers_are_read_as_float32(dtype):
    low = {name: view.detach() for name, view in make_views(2, dtype=dtype).items()}
    totals = []
    for views in (low, {name: view.float() for name, view in low.items()}):
        method = make().float()
        loss, _ = run(method, {name: view.clone().requires_grad_() for name, view in views.items()}, torch.tensor([0, 1, 2, 0]))
        totals.append((loss.total, method.queue))
    assert totals[0][0].dtype == torch.float32 and torch.equal(totals[0][0], totals[1][0]) and torch.equal(totals[0][1], totals[1][1])


def test_the_head_the_defaults_and_impossible_options():
    spec = SelfTuning.heads(SelfTuning.Config(), make_task(3, 4, 5))["projector"]
    assert (spec.kind, spec.options, spec.on_request) == ("linear", {"out": 1024}, False)
    config = SelfTuning.Config()
    assert (config.queue_size, config.projection_dim, config.temperature) == (32, 1024, 0.07)
    for bad in ({"queue_size": 0}, {"temperature": 0.0}, {"labeled_group_weight": -1.0}, {"unlabeled_group_weight": -1.0}, {"projection_dim": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SelfTuning.Config(**bad)
    with pytest.raises(RuntimeError, match="teacher"):
        make()(Views(make_views(0)), make_batch(torch.tensor([0, 1, 2, 0]), 5), lambda *v: None, None)
