"""SimMatchV2 at its public door: logits and embeddings in; loss, gradients, banks and moving mean out."""

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
from tests.methods.reference_simmatch import align, edges_row, propagate, soft_ce, unit

SimMatchV2 = methods.get("simmatchv2")
CLASSES, DIM, LABELED, UNLABELED, IMAGES = 5, 4, 3, 6, 7
LABELS = tuple(n % CLASSES for n in range(IMAGES))


def make_method(classes=CLASSES, labeled=LABELED, unlabeled=UNLABELED, labels=LABELS, **options):
    torch.manual_seed(0)
    task = make_task(classes, labeled, unlabeled, num_labeled=IMAGES, labeled_labels=labels)
    return build_method("simmatchv2", {"embed_dim": DIM, "bank_batches": 2, "neighbours": 4, **options}, task).double()


def make_views(seed=0, crops=1, classes=CLASSES, labeled=LABELED, unlabeled=UNLABELED, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    strong = {f"u_s{side}": unlabeled for side in range(crops, 0, -1)} if crops > 1 else {"u_s": unlabeled}
    rows = {"x": labeled, "teacher.x": labeled, "teacher.u_w": unlabeled, **strong}
    return {name: (2 * torch.randn(n, classes + DIM, generator=generator, dtype=torch.float64)).to(dtype) for name, n in rows.items()}


def step(method, views, labels=None, index=(0, 1, 2)):
    index = torch.as_tensor(index)
    batch = make_batch(method.label_N[index] if labels is None else torch.as_tensor(labels), len(views["teacher.u_w"]))
    batch = replace(batch, labeled=replace(batch.labeled, index_B=index))
    return one_step(method, Stub(method.task.num_classes, DIM), views, batch)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(1, 6),
    labeled=st.integers(1, 4),
    unlabeled=st.integers(1, 4),
    crops=st.integers(1, 3),
    neighbours=st.integers(1, 9),
    alpha=st.sampled_from([0.0, 0.1, 0.4, 0.9]),
    t=st.floats(0.1, 1),
    threshold=st.floats(0, 1),
    aligned=st.booleans(),
    propagated=st.booleans(),
    uniform=st.booleans(),
)
def test_four_steps_equal_the_plain_derivation(seed, classes, labeled, unlabeled, crops, neighbours, alpha, t, threshold, aligned, propagated, uniform):
    rng = np.random.default_rng(seed)
    options = {"node_weight": 2.0, "edge_weight": 3.0, "node_edge_weight": 4.0, "threshold": threshold, "temperature": t, "propagation": alpha,
               "neighbours": neighbours, "alignment": "moving" if aligned else "none", "alignment_momentum": 0.8,
               "mask_from": "propagated" if propagated else "aligned", "empty_labels": "uniform" if uniform else "zeros",
               "crops": list(range(crops, 0, -1)) if crops > 1 else []}  # fmt: skip
    known = tuple(rng.integers(0, classes, IMAGES).tolist())
    method = make_method(classes, labeled, unlabeled, known, **options)
    label_bank, bank = method.label_bank_ND.numpy().copy(), method.bank_MD.numpy().copy()
    bank_labels, mean = method.bank_label_MK.numpy().copy(), method.mean_K.numpy().copy()  # 1 / classes, rounded to float32
    np.testing.assert_allclose(mean, 1 / classes, rtol=1e-7)
    np.testing.assert_allclose(bank_labels, 1 / classes if uniform else 0.0, rtol=1e-7)
    for number in range(4):
        index, views = rng.integers(0, IMAGES, labeled), make_views(seed + number, crops, classes, labeled, unlabeled)
        labels, rows = np.array(known)[index], {name: view.numpy() for name, view in views.items()}
        names, weak = list(method.strong_views(method.config)), rows["teacher.u_w"]
        raw = np.stack([softmax(row) for row in weak[:, :classes]])
        probs = np.stack([align(p, mean) for p in raw]) if aligned else raw
        embeds = [unit(row) for row in weak[:, classes:]]
        sup, grad_x = cross_entropy(rows["x"][:, :classes], labels)
        parts, grads_s, masks = np.zeros(3), {name: np.zeros_like(rows[name]) for name in names}, []
        for i in range(unlabeled):
            target, _ = propagate(embeds[i], probs[i], label_bank, known, neighbours, alpha, t)
            masks.append(float((target if propagated else probs[i]).max() >= threshold))
            for name in names:
                share = 1 / (len(names) * unlabeled)
                ce, grad_ce = soft_ce(rows[name][i, :classes], target)
                with np.errstate(divide="ignore", invalid="ignore"):
                    edge, node_edge, grad_e, grad_n = edges_row(rows[name][i, classes:], embeds[i], bank, bank_labels, probs[i], t)
                empty = number == 0 and not uniform
                parts += share * np.array([2.0 * masks[-1] * ce, 3.0 * edge, 0.0 if empty else 4.0 * node_edge])
                grads_s[name][i, :classes] = share * 2.0 * masks[-1] * grad_ce
                grads_s[name][i, classes:] = share * (3.0 * grad_e + (0.0 if empty else 4.0 * grad_n))
        for b, j in enumerate(index):
            label_bank[j] = unit(rows["teacher.x"][b, classes:])
        slots = slice(number % 2 * unlabeled, (number % 2 + 1) * unlabeled)
        bank[slots], bank_labels[slots] = embeds, probs
        mean = 0.8 * mean + 0.2 * raw.mean(0) if aligned else mean  # without alignment nobody writes it

        loss, grads = step(method, views, labels, index)
        np.testing.assert_array_equal(loss.pseudo.mask_B.numpy(), masks)
        for name, want in zip(("sup_loss", "unsup_loss", "edge_loss", "node_edge_loss"), (sup, *parts), strict=True):
            assert loss.parts[name].item() == pytest.approx(want, rel=1e-9, abs=1e-11), name
        assert loss.total.item() == pytest.approx(sup + parts.sum(), rel=1e-9)
        np.testing.assert_allclose(grads["x"].numpy()[:, :classes], grad_x, rtol=1e-9, atol=1e-12)
        assert not grads["x"][:, classes:].any() and not grads["teacher.u_w"].any()
        for name in names:
            np.testing.assert_allclose(grads[name].numpy(), grads_s[name], rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(method.label_bank_ND.numpy(), label_bank, rtol=1e-10)
        np.testing.assert_allclose(method.bank_MD.numpy(), bank, rtol=1e-10)
        np.testing.assert_allclose(method.bank_label_MK.numpy(), bank_labels, rtol=1e-10)
        np.testing.assert_allclose(method.mean_K.numpy(), mean, rtol=1e-10)
        assert method.bank_slot.tolist() == [(number + 1) % 2 * unlabeled] and method.label_N.tolist() == list(known)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), nodes=st.integers(2, 12), alpha=st.floats(0, 0.99), t=st.floats(0.05, 2))
def test_propagation_weights_equal_the_inverse(seed, nodes, alpha, t):
    node = functional.unit_rows(torch.randn(3, nodes, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    weight = functional.propagation_weights(node, alpha=alpha, temperature=t)
    graph = (node @ node.mT / t).masked_fill(torch.eye(nodes, dtype=torch.bool), -torch.inf).softmax(-1)
    want = (1 - alpha) * torch.linalg.inv(torch.eye(nodes, dtype=torch.float64) - alpha * graph)[:, 0]
    torch.testing.assert_close(weight, want, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(weight.sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(functional.propagation_weights(node.float(), alpha=alpha, temperature=t).double(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"zero_nonfinite": False}, {"empty_labels": "uniform"}, {"crops": [3, 2, 1]}])
def test_gradcheck(options):
    method, views, stub = make_method(**options), make_views(3, len(options.get("crops", "x"))), Stub(CLASSES, DIM)
    names, batch = list(method.strong_views(method.config)), make_batch(torch.tensor([0, 1, 2]), UNLABELED)
    step(method, make_views(1, len(options.get("crops", "x"))))
    step(method, make_views(2, len(options.get("crops", "x"))))

    def total(x, *strong):
        given = Views({"x": x, "u_w": views["teacher.u_w"], **dict(zip(names, strong, strict=True))})
        return method(given, batch, stub, lambda *_: stub(views["teacher.x"], views["teacher.u_w"])).total

    assert torch.autograd.gradcheck(total, (views["x"].requires_grad_(), *(views[name].requires_grad_() for name in names)))


def test_the_first_step_has_no_node_edge_loss_and_finite_gradients():
    loss, grads = step(make_method(), make_views())
    assert float(loss.parts["node_edge_loss"]) == 0 and all(torch.isfinite(grad).all() for grad in grads.values())
    edges_only, grads_only = step(make_method(node_edge_weight=0.0), make_views())
    assert torch.equal(loss.total, edges_only.total) and torch.equal(grads["u_s"], grads_only["u_s"])


def test_without_the_guard_or_with_uniform_labels_the_first_step_has_one():
    wild, grads = step(make_method(zero_nonfinite=False), make_views())
    assert 100 < float(wild.parts["node_edge_loss"]) < float("inf") and torch.isfinite(grads["u_s"]).all()
    calm, _ = step(make_method(empty_labels="uniform"), make_views())
    assert float(calm.parts["node_edge_loss"]) == pytest.approx(10 * np.log(CLASSES))


def test_one_class_without_a_score_silences_the_whole_step():
    method = make_method(empty_labels="uniform")
    method.bank_label_MK[:, 2] = 0
    loss, _ = step(method, make_views())
    assert float(loss.parts["node_edge_loss"]) == 0 and float(loss.parts["edge_loss"]) > 0


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_embeddings_that_are_not_finite_silence_the_edges_only(bad):
    method, views = make_method(empty_labels="uniform"), make_views()
    views["u_s"][1, CLASSES + 1] = bad
    loss, grads = step(method, views)
    assert float(loss.parts["edge_loss"]) == float(loss.parts["node_edge_loss"]) == 0 and torch.isfinite(loss.total)
    assert all(torch.isfinite(grad).all() for grad in grads.values()) and grads["x"].any()


def test_the_guard_asks_all_ranks(monkeypatch):
    monkeypatch.setattr("fastssl.methods.simmatchv2.mean_over_ranks", lambda x: x / 2 if x.dim() == 0 else x)  # the other rank says no
    loss, grads = step(make_method(empty_labels="uniform"), make_views())
    assert float(loss.parts["edge_loss"]) == float(loss.parts["node_edge_loss"]) == 0 and not grads["u_s"][:, CLASSES:].any()


def test_state_is_written_after_the_backward_pass_only_and_survives_a_round_trip():
    one, two, views, stub = make_method(), make_method(), make_views(), Stub(CLASSES, DIM)
    before = {name: b.clone() for name, b in one.state_dict().items()}
    batch = make_batch(torch.tensor([0, 1, 2]), UNLABELED)
    one(Views({"x": views["x"], "u_w": views["teacher.u_w"], "u_s": views["u_s"]}), batch, stub, lambda *_: stub(views["x"], views["u_s"]))
    assert all(torch.equal(b, before[name]) for name, b in one.state_dict().items())
    for seed in range(3):
        step(one, make_views(seed))
    two.load_state_dict(one.state_dict())
    a, b = (step(m, make_views(9))[0].total for m in (one, two))
    assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_read_as_float32_also_under_autocast(dtype):
    views = make_views(dtype=dtype)
    exact, _ = step(make_method().float(), {name: view.float() for name, view in views.items()})
    loss, grads = step(make_method().float(), views)
    with torch.autocast("cpu", dtype):
        cast, _ = step(make_method().float(), views)
    assert loss.total.dtype == torch.float32 and grads["u_s"].dtype == dtype
    assert loss.total.item() == exact.total.item() == cast.total.item()


def test_labels_that_nobody_gave_are_learnt_from_visits():
    method = make_method(labels=())
    assert not method.label_N.any()
    step(method, make_views(), labels=(4, 3, 2), index=(0, 5, 5))
    assert method.label_N.tolist() == [4, 0, 0, 0, 0, 2, 0]


def test_crops_are_views_of_their_own_and_forwarded_alone():
    config = SimMatchV2.Config(crops=(224, 192, 96))
    views = SimMatchV2.views(config)
    assert views["u_s192"] == View("unlabeled", "crop_192", 192) and list(views) == ["u_s224", "x", "u_w", "u_s192", "u_s96"]
    assert SimMatchV2.views(SimMatchV2.Config()) == {"u_s": View("unlabeled", "strong"), "x": View("labeled", "weak"), "u_w": View("unlabeled", "weak")}
    calls, method, made = [], make_method(crops=[3, 2, 1]), make_views(crops=3)
    given = Views({name: made.get(name, made["teacher.u_w"]) for name in method.views(method.config)})
    names = {id(view): name for name, view in given.items()}

    def network(*asked):
        calls.append([names[id(v)] for v in asked])
        outs = tuple(Out(v[:, :CLASSES], v, {"projection": v[:, CLASSES:]}) for v in asked)
        return outs[0] if len(outs) == 1 else outs

    method(given, make_batch(torch.tensor([0, 1, 2]), UNLABELED), network, network)
    assert calls == [["x", "u_w"], ["u_s3", "x"], ["u_s2"], ["u_s1"]]


def test_a_first_crop_of_another_side_is_refused():
    method, made = make_method(crops=[96]), make_views()
    given = Views({"x": torch.zeros(3, 3, 8, 8), "u_w": made["teacher.u_w"], "u_s96": torch.zeros(6, 3, 9, 9)})
    with pytest.raises(ValueError, match=r"crops\[0\]"):
        method(given, make_batch(torch.tensor([0, 1, 2]), UNLABELED), Stub(CLASSES, DIM), lambda *_: (None, None))


def test_defaults_and_sizes_are_the_published_ones():
    config = SimMatchV2.Config()
    assert (config.threshold, config.node_weight, config.edge_weight, config.node_edge_weight) == (0.7, 10.0, 10.0, 10.0)
    assert (config.temperature, config.propagation, config.neighbours, config.alignment_momentum, config.mask_from) == (0.1, 0.1, 128, 0.9, "aligned")
    method = SimMatchV2(config, make_task(10, 64, 320, num_labeled=20))
    assert method.bank_MD.shape == (81920, 128) and not method.bank_label_MK.any() and SimMatchV2.needs_teacher(config)


def test_a_teacher_that_is_missing_is_named():
    with pytest.raises(RuntimeError, match="teacher"):
        make_method()(Views(make_views()), make_batch(torch.tensor([0, 1, 2]), UNLABELED), Stub(CLASSES, DIM), None)


@pytest.mark.parametrize("options", [{"threshold": -1}, {"propagation": 1.0}, {"temperature": 0.0}, {"neighbours": 0}, {"alignment": "ring"},
                                     {"crops": (96, 96)}, {"mask_from": "x"}, {"empty_labels": "x"}])  # fmt: skip
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SimMatchV2.Config(**options)
