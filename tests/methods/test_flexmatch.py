"""FlexMatch: thresholds, the status of each image, and its histogram kept up to date."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.types import Out, Views
from tests.golden.identity import build_method, forward_backward, make_batch, make_task
from tests.methods import reference_tllib as reference

FlexMatch = methods.get("flexmatch")
VIEWS = ("x", "x_s", "u_w", "u_s")


def make(options, *, rows=12, classes=4, labeled=3, unlabeled=6):
    return build_method("flexmatch", options, make_task(classes, labeled, unlabeled, num_unlabeled=rows)).double()


def batch_of(labels, index):
    batch = make_batch(labels, len(index))
    batch.unlabeled = dataclasses.replace(batch.unlabeled, index_B=torch.as_tensor(index))
    return batch


def step(method, logits, labels, index):
    batch = batch_of(labels, index)
    loss, grads = forward_backward(method, logits, batch)
    method.after_backward(batch)
    return loss, grads


def histogram(method):
    return [int((method.status == c).sum()) for c in [*range(method.task.num_classes), -1]]


def sure(classes, *labels, strength=20.0):
    """Rows with confidence near 1 (or 1 / classes for None)."""
    rows = torch.zeros(len(labels), classes, dtype=torch.float64)
    for i, label in enumerate(labels):
        if label is not None:
            rows[i, label] = strength
    return rows


def teach(method, index, labels, classes=4):
    """One step that gives these images these classes."""
    weak = sure(classes, *labels)
    logits = {"x": torch.zeros(3, classes).double(), "x_s": torch.zeros(3, classes).double(), "u_w": weak, "u_s": torch.zeros_like(weak)}
    return step(method, logits, torch.tensor([0, 1, 2]), index)[0]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 12),
    unlabeled=st.integers(1, 10),
    classes=st.integers(1, 5),
    threshold=st.sampled_from([0.0, 0.5, 0.7, 0.95, 1.5]),
    a_s=st.sampled_from([0.0, 0.1]),
    warmup=st.booleans(),
    strict=st.booleans(),
    separate=st.booleans(),
    one_value=st.sampled_from(["formula", "zero", "keep"]),
    mapping=st.sampled_from(["convex", "linear", "concave"]),
)
def test_equals_the_plain_derivation(seed, rows, unlabeled, classes, threshold, a_s, warmup, strict, separate, one_value, mapping):
    options = {"threshold": threshold, "unlabeled_weight": 1.5, "strong_label_weight": a_s, "strict_threshold": strict, "warmup": warmup}
    options |= {"one_value": one_value, "mapping": mapping}
    method = make(options | {"separate_forwards": separate}, rows=rows, classes=classes, unlabeled=unlabeled)
    plain = reference.FlexMatch(rows, classes, threshold=threshold, weight=1.5, a_s=a_s, strict=strict, warmup=warmup, one_value=one_value, mapping=mapping)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        sizes = dict(zip(VIEWS, (3, 3, unlabeled, unlabeled), strict=True))
        arrays = {name: rng.normal(0, 4, (n, classes)) for name, n in sizes.items()}
        labels, index = rng.integers(0, classes, 3), rng.integers(0, rows, unlabeled)  # images repeat within a batch
        sup, unsup, want, mask, pseudo = plain.step(*arrays.values(), labels, index)
        loss, grads = step(method, {name: torch.from_numpy(a) for name, a in arrays.items()}, torch.from_numpy(labels), index)
        assert loss.total.item() == pytest.approx(sup + unsup, rel=1e-11, abs=1e-13)
        assert float(loss.parts["unsup_loss"]) == pytest.approx(unsup, rel=1e-11, abs=1e-13)
        np.testing.assert_array_equal(loss.pseudo.mask_B.numpy(), mask)
        np.testing.assert_array_equal(loss.pseudo.label_B.numpy(), pseudo)
        for name in VIEWS:
            np.testing.assert_allclose(grads[name].numpy(), want[name], rtol=1e-10, atol=1e-13, err_msg=name)
        assert method.status.tolist() == plain.status and method.counts.tolist() == histogram(method)


def test_gradcheck():
    method = make({"threshold": 0.6, "strong_label_weight": 0.3})
    teach(method, [0, 1, 2], [0, 0, 1])
    generator = torch.Generator().manual_seed(1)
    x, x_s, u_w, u_s = (2 * torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, 3, 5, 5))

    def network(*views):
        outs = tuple(Out(view, view) for view in views)
        return outs[0] if len(outs) == 1 else outs

    def total(x, x_s, u_s):
        return method(Views({"x": x, "x_s": x_s, "u_w": u_w, "u_s": u_s}), batch_of(torch.tensor([0, 1, 3]), [5, 6, 7, 8, 9]), network, None).total

    assert torch.autograd.gradcheck(total, tuple(t.requires_grad_() for t in (x, x_s, u_s)))


def test_every_image_counts_at_the_start():
    method = make({})
    loss = teach(method, [0, 1], [None, None])
    assert loss.pseudo.mask_B.tolist() == [1.0, 1.0] and method.status.eq(-1).all()


def test_thresholds_follow_the_statuses():
    method = make({"threshold": 0.8}, rows=10)
    teach(method, [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 1])
    assert method.counts.tolist() == [4, 2, 0, 0, 4]
    beta = method.learning_status(torch.float64)
    assert beta.tolist() == [1.0, 0.5, 0.0, 0.0]
    torch.testing.assert_close(method.thresholds(beta), torch.tensor([0.8, 0.8 / 3, 0.0, 0.0], dtype=torch.float64))


def test_warm_up_divides_by_the_undecided():
    for warmup, want in ((True, [2 / 9, 1 / 9]), (False, [1.0, 0.5])):
        method = make({"warmup": warmup}, rows=12)
        teach(method, [0, 1, 2], [0, 0, 1])
        assert method.learning_status(torch.float64)[:2].tolist() == pytest.approx(want)


@pytest.mark.parametrize(("one_value", "want"), [("formula", [1.0, 0.0]), ("zero", [0.0, 0.0]), ("keep", [1.0, 0.5])])
def test_one_status_for_all_images(one_value, want):
    method = make({"one_value": one_value, "warmup": False}, rows=3)
    teach(method, [0, 1, 2], [0, 0, 1])
    teach(method, [0, 1, 2], [0, 0, 0])  # this step's thresholds still read two classes
    assert method.counts.tolist() == [3, 0, 0, 0, 0]
    assert method.learning_status(torch.float64)[:2].tolist() == want


def test_the_later_of_two_uses_of_an_image_wins_if_it_is_sure():
    method = make({}, rows=5)
    teach(method, [3, 3, 3, 1], [0, 2, None, 1])
    assert method.status.tolist() == [-1, 1, -1, 2, -1] and method.counts.tolist() == [0, 1, 1, 0, 3]
    teach(method, [3, 0, 3], [1, 1, 1])
    assert method.status.tolist() == [1, 1, -1, 1, -1] and method.counts.tolist() == [0, 3, 0, 0, 2]


def test_the_status_does_not_hang_on_the_order_in_which_a_device_writes(monkeypatch):
    real = torch.Tensor.index_copy_
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda self, dim, index, source: real(self, dim, index.flip(0), source.flip(0)))
    method = make({}, rows=5)
    teach(method, [3, 3, 3, 1], [0, 2, None, 1])
    assert method.status.tolist() == [-1, 1, -1, 2, -1]


def test_a_status_is_never_taken_back():
    method = make({}, rows=5)
    teach(method, [2], [1])
    teach(method, [2], [None])
    assert method.status[2] == 1


@pytest.mark.parametrize(("strict", "status"), [(False, 0), (True, -1)])
def test_a_confidence_on_the_threshold(strict, status):
    method = make({"threshold": 0.5, "strict_threshold": strict}, classes=2, rows=2)
    logits = {name: torch.zeros(n, 2, dtype=torch.float64) for name, n in (("x", 3), ("x_s", 3), ("u_w", 1), ("u_s", 1))}
    step(method, logits, torch.tensor([0, 1, 0]), [0])
    assert method.status.tolist() == [status, -1]


def test_state_is_written_after_backward_only_and_survives_a_round_trip():
    method = make({"one_value": "keep"})
    teach(method, [0, 1, 2], [0, 0, 1])
    before = {name: value.clone() for name, value in method.state_dict().items()}
    assert set(before) == {"status", "counts", "beta"}
    logits = {name: sure(4, 3, 3, 3) for name in VIEWS}
    batch = batch_of(torch.tensor([0, 1, 2]), [7, 8, 9])
    forward_backward(method, logits, batch)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    copy = make({"one_value": "keep"})
    copy.load_state_dict(before)
    losses = [step(m, logits, torch.tensor([0, 1, 2]), [7, 8, 9])[0].total for m in (method, copy)]
    assert torch.equal(*losses) and all(torch.equal(a, b) for a, b in zip(method.state_dict().values(), copy.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_read_as_float32(dtype):
    generator = torch.Generator().manual_seed(5)
    logits = {name: (3 * torch.randn(n, 4, generator=generator)).to(dtype) for name, n in zip(VIEWS, (3, 3, 6, 6), strict=True)}
    low, full = (build_method("flexmatch", {"threshold": 0.6}, make_task(4, 3, 6, num_unlabeled=12)) for _ in range(2))
    loss, _ = step(low, logits, torch.tensor([0, 1, 2]), [0, 1, 2, 3, 4, 5])
    exact, _ = step(full, {name: x.float() for name, x in logits.items()}, torch.tensor([0, 1, 2]), [0, 1, 2, 3, 4, 5])
    assert loss.total.dtype == torch.float32 and torch.equal(loss.total, exact.total) and torch.equal(low.status, full.status)


def test_the_defaults_are_the_papers_and_impossible_options_are_refused():
    config = FlexMatch.Config()
    assert (config.threshold, config.unlabeled_weight, config.warmup, config.mapping, config.one_value) == (0.95, 1.0, True, "convex", "formula")
    assert (config.strict_threshold, config.strong_label_weight, config.separate_forwards) == (False, 0.0, False)
    for bad in ({"threshold": -1.0}, {"unlabeled_weight": -1.0}, {"one_value": "no"}, {"mapping": "no"}, {"strong_label_weight": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            FlexMatch.Config(**bad)
