"""ShrinkMatch at its public door, in all its published forms: logits and embeddings in; loss, gradients and state out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import functional, methods
from fastssl.models.heads import build_head
from fastssl.types import Views
from tests.golden.handlers.simmatch import Stub, one_step
from tests.golden.identity import build_method, make_batch, make_task
from tests.methods.reference import cross_entropy, softmax
from tests.methods.reference_simmatch import align, instance_row, shrink_row, soft_ce, unit

ShrinkMatch = methods.get("shrinkmatch")
CLASSES, DIM, LABELED, UNLABELED, IMAGES = 5, 4, 3, 6, 7
ON_FIXMATCH = {"pseudo_labels": "student", "bank": False, "threshold": 0.95, "unlabeled_weight": 1.0}
FORMS = {
    "imagenet": {},
    "cifar": {**ON_FIXMATCH, "alignment_length": 32, "ratio_reset": True},
    "stl10": {**ON_FIXMATCH, "alignment": "moving", "hard_targets": True, "shrink_scores": "raw", "aux_views": "all"},
    "svhn": {**ON_FIXMATCH, "alignment": "none", "hard_targets": True, "aux_views": "all"},
}


def make_method(form="imagenet", classes=CLASSES, labeled=LABELED, unlabeled=UNLABELED, **options):
    torch.manual_seed(0)
    task = make_task(classes, labeled, unlabeled, num_labeled=IMAGES)
    return build_method("shrinkmatch", {"embed_dim": DIM, **FORMS[form], **options}, task).double()


def make_views(form="imagenet", seed=0, classes=CLASSES, labeled=LABELED, unlabeled=UNLABELED, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    rows = {"x": labeled, "u_w": unlabeled, "u_s": unlabeled}
    if form == "imagenet":
        rows = {"x": labeled, "u_s": unlabeled, "teacher.x": labeled, "teacher.u_w": unlabeled}
    return {name: (scale * torch.randn(n, 2 * classes + DIM, generator=generator, dtype=torch.float64)).to(dtype) for name, n in rows.items()}


def step(method, views, epoch=1, labels=(0, 1, 2), index=(0, 1, 2)):
    classes = method.task.num_classes
    batch = make_batch(torch.as_tensor(labels), len(views["u_s"]), epoch=epoch)
    batch = replace(batch, labeled=replace(batch.labeled, index_B=torch.as_tensor(index)))
    return one_step(method, Stub(classes, DIM), views, batch)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    form=st.sampled_from(list(FORMS)),
    classes=st.integers(1, 7),
    labeled=st.integers(1, 4),
    unlabeled=st.integers(1, 6),
    threshold=st.floats(0.2, 0.99),
    momentum=st.floats(0, 1),
)
def test_four_steps_in_two_epochs_equal_the_plain_derivation(seed, form, classes, labeled, unlabeled, threshold, momentum):
    rng = np.random.default_rng(seed)
    options = {"threshold": threshold, "unlabeled_weight": 3.0, "ratio_momentum": momentum, "alignment_momentum": momentum}
    options |= {"alignment_length": 3} if form in ("imagenet", "cifar") else {}
    method = make_method(form, classes, labeled, unlabeled, **options)
    config = method.config
    bank, bank_labels = (method.bank_ND.numpy().copy(), np.zeros(IMAGES, dtype=int)) if config.bank else (None, None)
    ring, moving, rho = np.zeros((config.alignment_length, classes)), None, None
    for number in range(4):
        epoch = number // 2
        if number % 2 == 0:
            method.on_epoch_start(epoch)
            rho = None if config.ratio_reset else rho
        labels, index = rng.integers(0, classes, labeled), rng.permutation(IMAGES)[:labeled]
        views = make_views(form, seed + number, classes, labeled, unlabeled)
        rows = {name: view.numpy() for name, view in views.items()}
        weak, like_x = (rows["teacher.u_w"], rows["teacher.x"]) if form == "imagenet" else (rows["u_w"], rows["x"])
        raw = np.stack([softmax(row) for row in weak[:, :classes]])
        ring[number % len(ring)] = raw.mean(0)
        moving = raw.mean(0) if moving is None else momentum * moving + (1 - momentum) * raw.mean(0)
        mean = {"ring": ring.mean(0), "moving": moving, "none": None}[config.alignment]
        probs = raw if mean is None else np.stack([align(p, mean) for p in raw])
        sup, grad_x = cross_entropy(rows["x"][:, :classes], labels)
        unsup, inst, shrinks, masks, firsts, grad_s = 0.0, 0.0, [], [], [], np.zeros_like(rows["u_s"])
        for i in range(unlabeled):
            target, u_s = probs[i], rows["u_s"][i]
            if config.bank and epoch >= 1:
                loss_in, grad_in, near = instance_row(
                    u_s[classes : classes + DIM], unit(weak[i, classes : classes + DIM]), bank, bank_labels, probs[i], 0.1, 0.1
                )
                target = 0.9 * probs[i] + 0.1 * near
                inst += 5.0 * loss_in / unlabeled
                grad_s[i, classes : classes + DIM] = 5.0 * grad_in / unlabeled
            masks.append(float(target.max() >= threshold))
            ce, grad_ce = soft_ce(u_s[:classes], np.eye(classes)[target.argmax()] if config.hard_targets else target)
            unsup += masks[-1] * 3.0 * ce / unlabeled
            grad_s[i, :classes] = masks[-1] * 3.0 * grad_ce / unlabeled
            ell, grad_aux, first = shrink_row(raw[i] if config.shrink_scores == "raw" else target, u_s[classes + DIM :], target.max(), threshold)
            shrinks.append(ell)
            firsts.append(first)
            grad_s[i, classes + DIM :] = grad_aux
        rho = np.mean(masks) if rho is None else momentum * rho + (1 - momentum) * np.mean(masks)
        grad_s[:, classes + DIM :] *= 3.0 * rho / unlabeled
        if config.bank:
            for b, j in enumerate(index):
                bank[j], bank_labels[j] = unit(like_x[b, classes : classes + DIM]), labels[b]

        loss, grads = step(method, views, epoch, labels, index)
        np.testing.assert_array_equal(loss.pseudo.mask_B.numpy(), masks)
        wants = {"sup_loss": sup, "unsup_loss": unsup, "shrink_loss": 3.0 * rho * np.mean(shrinks)} | ({"instance_loss": inst} if config.bank else {})
        assert loss.parts.keys() == wants.keys()
        for name, want in wants.items():
            assert loss.parts[name].item() == pytest.approx(want, rel=1e-9, abs=1e-12), name
        assert loss.total.item() == pytest.approx(sum(wants.values()), rel=1e-9)
        np.testing.assert_allclose(grads["x"].numpy()[:, :classes], grad_x, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(grads["u_s"].numpy(), grad_s, rtol=1e-8, atol=1e-11)
        assert not any(grad[:, classes:].any() if name == "x" else grad.any() for name, grad in grads.items() if name != "u_s")
        assert method.ratio.item() == pytest.approx(rho, rel=1e-12)
        if config.bank:
            np.testing.assert_allclose(method.bank_ND.numpy(), bank, rtol=1e-10)
            np.testing.assert_array_equal(method.bank_label_N.numpy(), bank_labels)
        if config.alignment == "ring":
            np.testing.assert_allclose(method.ring_LK.numpy(), ring, rtol=1e-12)
        if config.alignment == "moving":
            np.testing.assert_allclose(method.mean_K.numpy(), moving, rtol=1e-12)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(1, 12), scale=st.sampled_from([0.0, 0.3, 1.0, 3.0, 10.0]), threshold=st.floats(0.1, 1.0))
def test_shrinking_equals_its_definition(seed, classes, scale, threshold):
    generator = torch.Generator().manual_seed(seed)
    logits, aux = (torch.randn(4, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    score = torch.softmax(scale * logits, 1)  # scale 0: all tied
    confidence = score.amax(1)
    loss, first = functional.shrink_loss(score, aux.requires_grad_(), confidence, threshold)
    (grad,) = torch.autograd.grad(loss.sum(), aux)
    for i in range(4):
        want, want_grad, want_first = shrink_row(score[i].numpy(), aux[i].detach().numpy(), float(confidence[i]), threshold)
        assert loss[i].item() == pytest.approx(want, rel=1e-10, abs=1e-12)
        np.testing.assert_allclose(grad[i].numpy(), want_grad, rtol=1e-9, atol=1e-12)
        assert confidence[i] >= threshold or first[i] == want_first
        assert float(loss.detach().min()) >= 0


def test_shrinking_by_hand():
    """0.5 / (0.5 + 0.1) < 0.9 <= 0.5 / (0.5 + 0.02): the classes of 0.3, 0.1 and 0.08 go, that of 0.02 stays."""
    score = torch.tensor([[0.08, 0.5, 0.1, 0.02, 0.3]], dtype=torch.float64)
    aux = torch.tensor([[9.0, 1.0, 9.0, 2.0, 9.0]], dtype=torch.float64)
    loss, first = functional.shrink_loss(score, aux, score.amax(1), 0.9)
    assert first.tolist() == [4] and loss.item() == pytest.approx(0.5 * np.log(1 + np.e))


def test_a_row_that_never_reaches_the_threshold_weighs_nothing():
    loss, first = functional.shrink_loss(torch.full((1, 4), 0.25), torch.randn(1, 4), torch.tensor([0.25]), 0.95)
    assert loss.item() == 0 and first.tolist() == [3]


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    views, method, stub = make_views(form, 3), make_method(form, threshold=0.7), Stub(CLASSES, DIM)
    batch = make_batch(torch.tensor([0, 1, 2]), UNLABELED, epoch=1)

    def total(x, u_s):
        given = Views({"x": x, "u_s": u_s, "u_w": views["u_s" if form == "imagenet" else "u_w"]})
        return method(given, batch, stub, lambda *_: stub(views["teacher.x"], views["teacher.u_w"])).total

    assert torch.autograd.gradcheck(total, (views["x"].requires_grad_(), views["u_s"].requires_grad_()))


@pytest.mark.parametrize("form", FORMS)
def test_state_is_written_after_the_backward_pass_only_and_survives_a_round_trip(form):
    one, two, views = make_method(form), make_method(form), make_views(form)
    before = {name: b.clone() for name, b in one.state_dict().items()}
    stub, given = Stub(CLASSES, DIM), Views({name: views.get(name, views["u_s"]) for name in ("x", "u_w", "u_s")})
    batch = make_batch(torch.tensor([0, 1, 2]), UNLABELED, epoch=1)
    one(given, batch, stub, lambda *_: stub(views["x"], views["u_s"]))
    assert all(torch.equal(b, before[name]) for name, b in one.state_dict().items())
    for seed in range(3):
        step(one, make_views(form, seed))
    assert any(not torch.equal(b, before[name]) for name, b in one.state_dict().items())
    two.load_state_dict(one.state_dict())
    a, b = (step(m, make_views(form, 9))[0].total for m in (one, two))
    assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_only_the_cifar_form_forgets_its_ratio_between_epochs():
    for form in FORMS:
        method = make_method(form, threshold=0.5)
        first = step(method, make_views(form, 1, scale=20.0))[0].pseudo.mask_B.mean()
        method.on_epoch_start(1)
        second = step(method, make_views(form, 2, scale=0.01))[0].pseudo.mask_B.mean()
        assert method.ratio.item() == pytest.approx(float(second if form == "cifar" else 0.999 * first + 0.001 * second)) and first != second


def test_raw_scores_and_hard_targets_change_what_they_say():
    views, made = make_views("stl10", scale=2.0), {}
    for name, options in {"raw": {}, "aligned": {"shrink_scores": "aligned"}, "soft": {"hard_targets": False}}.items():
        loss, grads = step(make_method("stl10", threshold=0.6, **options), views)
        made[name] = loss.parts["unsup_loss"], grads["u_s"][:, CLASSES + DIM :]
    assert made["raw"][0] == made["aligned"][0] and not torch.equal(made["raw"][1], made["aligned"][1])
    assert made["raw"][0] != made["soft"][0] and torch.equal(made["raw"][1], made["soft"][1])


@pytest.mark.parametrize("form", FORMS)
def test_the_auxiliary_head_sees_the_rows_of_its_form(form):
    seen = []

    class Looks(Stub):
        def head(self, name, *feats):
            seen.append([len(feat) for feat in feats])
            return super().head(name, *feats)

    views = make_views(form)
    batch = make_batch(torch.tensor([0, 1, 2]), UNLABELED)
    one_step(make_method(form), Looks(CLASSES, DIM), views, batch)
    assert seen == [[LABELED, UNLABELED, UNLABELED] if form in ("stl10", "svhn") else [UNLABELED]]


def test_certain_batches_and_uncertain_batches():
    sure, grads = step(make_method(threshold=0.0), make_views())
    assert float(sure.parts["shrink_loss"]) == 0 and not grads["u_s"][:, CLASSES + DIM :].any()
    unsure, grads = step(make_method("cifar", threshold=1.01), make_views("cifar"))
    assert float(unsure.parts["unsup_loss"]) == float(unsure.parts["shrink_loss"]) == 0 and torch.isfinite(grads["u_s"]).all()  # rho is 0 too


@pytest.mark.parametrize("form", FORMS)
def test_sixteen_bit_inputs_are_read_as_float32(form):
    views = make_views(form, dtype=torch.bfloat16)
    exact, _ = step(make_method(form).float(), {name: view.float() for name, view in views.items()})
    loss, grads = step(make_method(form).float(), views)
    assert loss.total.dtype == torch.float32 and loss.total.item() == exact.total.item() and grads["u_s"].dtype == torch.bfloat16
    huge, grads = step(make_method(form).float(), {name: 1e3 * view for name, view in views.items()})
    assert torch.isfinite(huge.total) and torch.isfinite(grads["u_s"]).all()


def test_ratio_and_alignment_are_those_of_all_ranks(monkeypatch):
    method = make_method("cifar")
    monkeypatch.setattr("fastssl.methods.shrinkmatch.mean_over_ranks", lambda x: torch.full_like(x, 0.25))
    step(method, make_views("cifar"))
    assert method.ratio.item() == 0.25 and method.ring_LK[0].tolist() == [0.25] * CLASSES


def test_heads_have_the_published_sizes():
    heads = ShrinkMatch.heads(ShrinkMatch.Config(), make_task(1000, 64, 320))
    aux = build_head(heads["aux"].kind, 2048, heads["aux"].options, "aux")
    assert heads["aux"].on_request and not heads["projection"].on_request
    assert [tuple(p.shape) for p in aux.parameters()] == [(512, 2048), *[(512,)] * 3, (512, 512), *[(512,)] * 3, (1000, 512), (1000,)]
    small = ShrinkMatch.Config(**FORMS["svhn"], aux_hidden=32, aux_activation="leaky_relu", aux_bn_momentum=0.001, aux_bn_eps=1e-3)
    heads = ShrinkMatch.heads(small, make_task(10, 64, 448))
    head = build_head(heads["aux"].kind, 128, heads["aux"].options, "aux")
    assert list(heads) == ["aux"] and (head[1].momentum, head[1].eps, head[2].negative_slope) == (0.001, 1e-3, 0.1)
    assert not ShrinkMatch.needs_teacher(small) and list(ShrinkMatch.views(small)) == ["x", "u_w", "u_s"]


@pytest.mark.parametrize(
    "options", [{"threshold": -1}, {"smoothing": 1.1}, {"aux_hidden": 0}, {"alignment": "ema"}, {"shrink_scores": "x"}, {"ratio_momentum": 2}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ShrinkMatch.Config(**options)
