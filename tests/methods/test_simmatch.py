"""SimMatch at its public door: logits and embeddings in; loss, gradients, bank and ring out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import functional, methods
from fastssl.types import Out, View, Views
from tests.golden.handlers.simmatch import Stub, one_step
from tests.golden.identity import build_method, make_batch, make_task
from tests.methods.reference import cross_entropy, softmax
from tests.methods.reference_simmatch import align, instance_row, soft_ce, unit

SimMatch = methods.get("simmatch")
CLASSES, DIM, LABELED, UNLABELED, IMAGES = 5, 4, 3, 6, 7


def make_method(options=None, classes=CLASSES, labeled=LABELED, unlabeled=UNLABELED, images=IMAGES, dim=DIM, **sizes):
    torch.manual_seed(0)
    return build_method("simmatch", {"embed_dim": dim, **(options or {})}, make_task(classes, labeled, unlabeled, num_labeled=images, **sizes)).double()


def make_views(seed=0, classes=CLASSES, labeled=LABELED, unlabeled=UNLABELED, dim=DIM, student=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = {"x": labeled, "u_w": unlabeled, "u_s": unlabeled} if student else {"x": labeled, "u_s": unlabeled, "teacher.x": labeled, "teacher.u_w": unlabeled}
    return {name: (2 * torch.randn(n, classes + dim, generator=generator, dtype=torch.float64)).to(dtype) for name, n in rows.items()}


def make_step(labels, index, unlabeled=UNLABELED, epoch=1):
    batch = make_batch(torch.as_tensor(labels), unlabeled, epoch=epoch)
    return replace(batch, labeled=replace(batch.labeled, index_B=torch.as_tensor(index)))


def step(method, views, labels=(0, 1, 2), index=(0, 1, 2), epoch=1):
    classes, dim = method.ring_LK.shape[1], method.bank_ND.shape[1]
    return one_step(method, Stub(classes, dim), views, make_step(labels, index, len(views["u_s"]), epoch))


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 4),
    unlabeled=st.integers(1, 5),
    classes=st.integers(1, 6),
    images=st.integers(1, 8),
    dim=st.integers(2, 5),
    length=st.integers(1, 4),
    threshold=st.floats(0, 1),
    a=st.floats(0, 1),
    temperatures=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
    aligned=st.booleans(),
    student=st.booleans(),
    momentum=st.sampled_from([0.0, 0.7]),
    bank_epochs=st.sampled_from([0, 1, 2]),
)
def test_four_steps_equal_the_plain_derivation(
    seed, labeled, unlabeled, classes, images, dim, length, threshold, a, temperatures, aligned, student, momentum, bank_epochs
):
    rng = np.random.default_rng(seed)
    tt, st_ = temperatures
    options = {"threshold": threshold, "unlabeled_weight": 3.0, "instance_weight": 2.0, "teacher_temperature": tt, "student_temperature": st_, "smoothing": a,
               "alignment": "ring" if aligned else "none", "alignment_length": length, "bank_epochs": bank_epochs, "bank_momentum": momentum,
               "pseudo_labels": "student" if student else "teacher"}  # fmt: skip
    method = make_method(options, classes, labeled, unlabeled, images, dim)
    bank, bank_labels, ring = method.bank_ND.numpy().copy(), np.zeros(images, dtype=int), np.zeros((length, classes))
    for number in range(4):
        epoch = number // 2
        labels, index = rng.integers(0, classes, labeled), rng.integers(0, images, labeled)  # an image may occur twice
        views = make_views(seed + number, classes, labeled, unlabeled, dim, student)
        rows = {name: view.numpy() for name, view in views.items()}
        weak, like_x = (rows["u_w"], rows["x"]) if student else (rows["teacher.u_w"], rows["teacher.x"])
        probs = np.stack([softmax(row) for row in weak[:, :classes]])
        if aligned:
            ring[number % length] = probs.mean(0)
            probs = np.stack([align(p, ring.mean(0)) for p in probs])
        sup, grad_x = cross_entropy(rows["x"][:, :classes], labels)
        unsup, inst, grad_s, masks = 0.0, 0.0, np.zeros_like(rows["u_s"]), []
        for i in range(unlabeled):
            loss_in, grad_in, neighbours = instance_row(rows["u_s"][i, classes:], unit(weak[i, classes:]), bank, bank_labels, probs[i], st_, tt)
            target = probs[i]
            if epoch >= bank_epochs:
                target = a * probs[i] + (1 - a) * neighbours
                inst += 2.0 * loss_in / unlabeled
                grad_s[i, classes:] = 2.0 * grad_in / unlabeled
            masks.append(float(target.max() >= threshold))
            ce, grad_ce = soft_ce(rows["u_s"][i, :classes], target)
            unsup += masks[-1] * 3.0 * ce / unlabeled
            grad_s[i, :classes] = masks[-1] * 3.0 * grad_ce / unlabeled
        old = bank.copy()
        for b, j in enumerate(index):  # in order: the last one of an image stays
            e = unit(like_x[b, classes:])
            bank[j] = unit(momentum * old[j] + (1 - momentum) * e) if momentum else e
            bank_labels[j] = labels[b]

        loss, grads = step(method, views, labels, index, epoch)
        np.testing.assert_array_equal(loss.pseudo.mask_B.numpy(), masks)
        for name, want in (("sup_loss", sup), ("unsup_loss", unsup), ("instance_loss", inst)):
            assert loss.parts[name].item() == pytest.approx(want, rel=1e-9, abs=1e-12), name
        assert loss.total.item() == pytest.approx(sup + unsup + inst, rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(grads["x"].numpy()[:, :classes], grad_x, rtol=1e-9, atol=1e-12)
        assert not grads["x"][:, classes:].any()
        np.testing.assert_allclose(grads["u_s"].numpy(), grad_s, rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(method.bank_ND.numpy(), bank, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(method.bank_label_N.numpy(), bank_labels)
        np.testing.assert_allclose(method.ring_LK.numpy(), ring, rtol=1e-12)
        assert method.ring_slot.tolist() == [(number + 1) % length if aligned else 0]  # without alignment nobody writes it


def test_gradcheck():
    method, views, stub = make_method({"threshold": 0.3}), make_views(3), Stub(CLASSES, DIM)
    batch = make_step((0, 1, 2), (0, 1, 2))

    def total(x, u_s):
        given = {"u_s": u_s, "x": x, "u_w": views["teacher.u_w"]}
        return method(Views(given), batch, stub, lambda *_: stub(views["teacher.x"], views["teacher.u_w"])).total

    assert torch.autograd.gradcheck(total, (views["x"].requires_grad_(), views["u_s"].requires_grad_()))


def test_nothing_but_the_students_views_gets_a_gradient():
    _, grads = step(make_method({"threshold": 0.0}), make_views())
    assert grads["u_s"].abs().sum(1).all() and grads["x"].any() and not grads["teacher.x"].any() and not grads["teacher.u_w"].any()
    _, grads = step(make_method({"threshold": 0.0, "pseudo_labels": "student"}), make_views(student=True))
    assert not grads["u_w"].any() and grads["u_s"].any()


def test_the_bank_is_read_as_it_was_before_the_step_and_written_after_the_backward_pass():
    method, views = make_method(), make_views()
    before = {name: b.clone() for name, b in method.state_dict().items()}
    stub = Stub(CLASSES, DIM)
    given = Views({"u_s": views["u_s"], "x": views["x"], "u_w": views["teacher.u_w"]})
    batch = make_step((0, 1, 2), (4, 5, 4))
    method(given, batch, stub, lambda *_: stub(views["teacher.x"], views["teacher.u_w"]))
    assert all(torch.equal(b, before[name]) for name, b in method.state_dict().items())
    method.after_backward(batch)
    embed = torch.nn.functional.normalize(views["teacher.x"][:, CLASSES:])
    torch.testing.assert_close(method.bank_ND[[4, 5]], embed[[2, 1]])  # image 4 occurs twice: its last embedding stays
    untouched = [0, 1, 2, 3, 6]
    assert torch.equal(method.bank_ND[untouched], before["bank_ND"][untouched]) and method.bank_label_N.tolist() == [0, 0, 0, 0, 2, 1, 0]


def test_two_ranks_worth_of_rows_average_to_the_global_loss(monkeypatch):
    """Each rank holds half of the rows and the global statistics: the mean of the totals and DDP's mean of the gradients are those of the whole batch."""
    views = make_views(labeled=4)
    whole, grads = step(make_method(), views, (0, 1, 2, 3), (0, 1, 2, 3))
    mean = torch.softmax(views["teacher.u_w"][:, :CLASSES], 1).mean(0)
    monkeypatch.setattr("fastssl.methods.simmatch.mean_over_ranks", lambda _: mean)
    totals, parts = [], []
    for rank in range(2):
        share = {name: view.chunk(2)[rank] for name, view in views.items()}
        loss, grad = step(make_method(), share, torch.arange(4).chunk(2)[rank], torch.arange(4).chunk(2)[rank])
        totals.append(loss.total.detach())
        parts.append(grad["u_s"] / 2)
    torch.testing.assert_close(torch.stack(totals).mean(), whole.total.detach())
    torch.testing.assert_close(torch.cat(parts), grads["u_s"])


def test_while_the_bank_fills_only_class_probabilities_teach():
    views = make_views()
    filling, grads = step(make_method({"threshold": 0.0}), views, epoch=0)
    assert not grads["u_s"][:, CLASSES:].any() and float(filling.parts["instance_loss"]) == 0
    full, grads = step(make_method({"threshold": 0.0}), views, epoch=1)
    assert grads["u_s"][:, CLASSES:].any() and float(full.parts["instance_loss"]) > 0
    pure, _ = step(make_method({"threshold": 0.0, "smoothing": 1.0}), views, epoch=1)
    assert float(pure.parts["unsup_loss"]) == pytest.approx(float(filling.parts["unsup_loss"])) != pytest.approx(float(full.parts["unsup_loss"]))


def test_a_bank_without_any_class_that_is_likely_stays_finite():
    """All bank labels are 0 and the teacher rules class 0 out exactly: the calibrated weights are 0 / 0 in the formula."""
    views = make_views(dtype=torch.float32)
    views["teacher.u_w"][:, :CLASSES] = torch.tensor([-1e4, 0.0, 1.0, 2.0, 3.0])
    loss, grads = step(make_method({"alignment": "none"}).float(), views)
    assert torch.isfinite(loss.total) and torch.isfinite(grads["u_s"]).all() and float(loss.parts["instance_loss"]) == 0
    aligned, grads = step(make_method().float(), views)  # a class that no row finds possible: 0 / 0 in the alignment
    assert torch.isfinite(aligned.total) and torch.isfinite(grads["u_s"]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_read_as_float32_also_under_autocast(dtype):
    views = make_views(dtype=dtype)
    exact, _ = step(make_method().float(), {name: view.float() for name, view in views.items()})
    loss, grads = step(make_method().float(), views)
    with torch.autocast("cpu", dtype):
        cast, _ = step(make_method().float(), views)
    assert loss.total.dtype == torch.float32 and grads["u_s"].dtype == dtype
    assert loss.total.item() == exact.total.item() == cast.total.item()


def test_state_dict_round_trip():
    one, two = make_method(), make_method()
    for seed in range(3):
        step(one, make_views(seed), index=(seed, 3, 4))
    two.load_state_dict(one.state_dict())
    a, b = (step(m, make_views(9))[0].total for m in (one, two))
    assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_labels_may_be_known_from_the_start():
    labels = tuple(int(n) % CLASSES for n in range(IMAGES))
    assert make_method({"labels_known": True}, labeled_labels=labels).bank_label_N.tolist() == list(labels)
    assert not make_method(labeled_labels=labels).bank_label_N.any()


def test_instance_matching_forms_agree_and_rows_are_distributions():
    generator = torch.Generator().manual_seed(0)
    student, teacher, bank = (functional.unit_rows(torch.randn(n, 4, generator=generator, dtype=torch.float64)) for n in (3, 3, 9))
    prob, label = torch.softmax(torch.randn(3, 5, generator=generator, dtype=torch.float64), 1), torch.arange(9) % 5
    terms = functional.instance_distributions(student, teacher, bank, label, prob, student_temperature=0.2, teacher_temperature=0.1)
    for matrix in (terms.teacher_BN, terms.calibrated_BN, terms.log_student_BN.exp()):
        torch.testing.assert_close(matrix.sum(1), torch.ones(3, dtype=torch.float64))
    loss, neighbours = functional.instance_matching(student, teacher, bank, label, prob, student_temperature=0.2, teacher_temperature=0.1)
    torch.testing.assert_close(neighbours.sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(loss, -(terms.calibrated_BN * terms.log_student_BN).sum(1))


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_last_of_same(index):
    want = [max(j for j, other in enumerate(index) if other == i) for i in index]
    assert functional.last_of_same(torch.tensor(index)).tolist() == want


def test_forwards_are_grouped_as_published_and_views_lie_together():
    calls = []

    def network(who):
        def forward(*views):
            calls.append((who, [names[id(v)] for v in views]))
            return tuple(Out(v[:, :CLASSES], v, {"projection": v[:, CLASSES:]}) for v in views)

        return forward

    for source, want in (("teacher", [("teacher", ["x", "u_w"]), ("student", ["u_s", "x"])]), ("student", [("student", ["x", "u_w", "u_s"])])):
        method, given = make_method({"pseudo_labels": source}), make_views(student=True)
        calls.clear()
        names = {id(v): name for name, v in given.items()}
        method(Views(given), make_step((0, 1, 2), (0, 1, 2)), network("student"), network("teacher"))
        assert calls == want
        order = list(method.views(method.config))
        for _, views in calls:  # each joint forward reads neighbours in memory order
            assert order[order.index(views[0]) :][: len(views)] == views
    assert SimMatch.views(SimMatch.Config()) == {"u_s": View("unlabeled", "strong"), "x": View("labeled", "weak"), "u_w": View("unlabeled", "weak")}


def test_defaults_are_the_published_ones():
    config = SimMatch.Config()
    assert (config.threshold, config.unlabeled_weight, config.instance_weight, config.smoothing) == (0.7, 10.0, 5.0, 0.9)
    assert (config.student_temperature, config.teacher_temperature, config.alignment, config.alignment_length) == (0.1, 0.1, "ring", 256)
    assert SimMatch.needs_teacher(config) and not SimMatch.needs_teacher(replace(config, pseudo_labels="student"))
    assert SimMatch.heads(config, make_task(5, 4, 6))["projection"].options == {"out": 128}


def test_a_teacher_that_is_missing_is_named():
    with pytest.raises(RuntimeError, match="teacher"):
        make_method()(Views(make_views(student=True)), make_step((0, 1, 2), (0, 1, 2)), Stub(CLASSES, DIM), None)


@pytest.mark.parametrize("options", [{"threshold": -1}, {"smoothing": 1.1}, {"student_temperature": 0.0}, {"alignment": "queue"}, {"pseudo_labels": "ema"},
                                     {"alignment_length": 0}, {"bank_momentum": -0.1}, {"bank_epochs": -1}])  # fmt: skip
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SimMatch.Config(**options)
