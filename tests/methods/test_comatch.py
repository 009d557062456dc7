"""CoMatch: memory smoothing, the pseudo-label graph against the embedding graph, queues."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.types import View, Views
from tests.methods.reference import cross_entropy, softmax
from tests.methods.reference_beyond import Columns, check_round_trip, check_sixteen_bits, columns, make, normalised, one_hot, soft_cross_entropy, step

CoMatch = methods.get("comatch")
D = 3


def unit(row):
    return row / np.sqrt((row**2).sum())


def through_unit(row, slope):
    """Gradient at the row, given the gradient at its unit vector."""
    e = unit(row)
    return (slope - (slope * e).sum() * e) / np.sqrt((row**2).sum())


class Plain:
    def __init__(self, classes, options):
        self.classes, self.options, self.means, self.memory = classes, options, [], []

    def step(self, v, labels):
        """(parts, gradients, mask, targets)."""
        o, k = self.options, self.classes
        weak = [softmax(row[:k]) for row in v["u_w"]]
        self.means.append(np.mean(weak, 0))
        mean = np.mean(self.means[-o["alignment_length"] :], 0)
        aligned = [normalised(row / mean) for row in weak]
        targets = list(aligned)
        if len(self.memory) >= o["memory_batches"]:
            entries = [entry for batch in self.memory[-o["memory_batches"] :] for entry in batch]
            for i, row in enumerate(v["u_w"]):
                shares = softmax(np.array([unit(row[k:]) @ e for e, _ in entries]) / o["temperature"])
                targets[i] = o["smoothing"] * aligned[i] + (1 - o["smoothing"]) * sum(a * p for a, (_, p) in zip(shares, entries, strict=True))
        mask = [float(row.max() >= o["threshold"]) for row in targets]
        sup, grad_x = cross_entropy(v["x"][:, :k], labels)
        unsup, grad_s = soft_cross_entropy(v["u_s"][:, :k], np.array(targets), mask)
        first, second = ([unit(row[k:]) for row in v[name]] for name in ("u_s", "u_s2"))
        graph, rows = 0.0, len(targets)
        slopes = np.zeros((2, rows, v["x"].shape[1] - k))
        for i in range(rows):
            w = np.array([1.0 if i == j else float(targets[i] @ targets[j]) for j in range(rows)])
            w = normalised(np.where((np.arange(rows) == i) | (w >= o["graph_threshold"]), w, 0.0))
            r = softmax(np.array([first[i] @ e for e in second]) / o["temperature"])
            graph -= o["graph_weight"] * (w * np.log(r)).sum() / rows
            for j in range(rows):
                d = o["graph_weight"] * (r[j] - w[j]) / rows / o["temperature"]
                slopes[0, i] += d * second[j]
                slopes[1, j] += d * first[i]
        grads = {name: np.zeros_like(view) for name, view in v.items()}
        grads["x"][:, :k] = grad_x
        grads["u_s"][:, :k] = o["unlabeled_weight"] * grad_s
        for i in range(rows):
            grads["u_s"][i, k:] = through_unit(v["u_s"][i, k:], slopes[0, i])
            grads["u_s2"][i, k:] = through_unit(v["u_s2"][i, k:], slopes[1, i])
        entries = [(unit(row[k:]), p) for row, p in zip(v["u_w"], aligned, strict=True)]
        self.memory.append(entries + [(unit(row[k:]), p) for row, p in zip(v["x"], one_hot(labels, k), strict=True)])
        return {"sup_loss": sup, "unsup_loss": o["unlabeled_weight"] * unsup, "graph_loss": graph}, grads, mask, targets


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 4),
    unlabeled=st.integers(1, 5),
    classes=st.integers(1, 4),
    memory_batches=st.integers(1, 3),
    alignment_length=st.integers(1, 3),
    threshold=st.sampled_from([0.0, 0.7, 0.95]),
    graph_threshold=st.sampled_from([0.0, 0.5, 0.8, 2.0]),
    smoothing=st.sampled_from([0.0, 0.6, 1.0]),
)
def test_equals_the_plain_derivation(seed, labeled, unlabeled, classes, **options):
    options |= {"unlabeled_weight": 1.5, "graph_weight": 0.7, "temperature": 0.3}
    method = make("comatch", {**options, "embed_dim": D}, classes=classes, labeled=labeled, unlabeled=unlabeled)
    plain = Plain(classes, options)
    for now in range(5):
        leaves, batch = columns(method, seed + now, extra=D)
        arrays = {name: leaf.detach().numpy() for name, leaf in leaves.items()}
        parts, want, mask, targets = plain.step(arrays, batch.labeled.label_B.numpy())
        loss, grads = step(method, leaves, batch, Columns(classes))
        np.testing.assert_allclose(loss.pseudo.confidence_B, [row.max() for row in targets], rtol=1e-9)
        assert loss.pseudo.mask_B.tolist() == mask
        assert {name: float(part) for name, part in loss.parts.items()} == pytest.approx(parts, rel=1e-9, abs=1e-11)
        assert loss.total.item() == pytest.approx(sum(parts.values()), rel=1e-9, abs=1e-11)
        for name in leaves:
            np.testing.assert_allclose(grads[name], want[name], rtol=1e-7, atol=1e-10, err_msg=name)
    newest = method.memory_QMD[4 % options["memory_batches"]], method.memory_prob_QMC[4 % options["memory_batches"]]
    np.testing.assert_allclose(newest[0], [e for e, _ in plain.memory[-1]], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(newest[1], [p for _, p in plain.memory[-1]], rtol=1e-9, atol=1e-12)


def test_gradcheck():
    method = make("comatch", {"embed_dim": D, "threshold": 0.5, "memory_batches": 1})
    step(method, *columns(method, 0, extra=D), Columns(4))
    leaves, batch = columns(method, 1, extra=D)

    def total(x, u_s, u_s2):
        views = Views({"x": x, "u_w": leaves["u_w"].detach(), "u_s": u_s, "u_s2": u_s2})
        return method(views, batch, Columns(4), None).total

    assert torch.autograd.gradcheck(total, tuple(leaves[name] for name in ("x", "u_s", "u_s2")))


def test_labels_are_smoothed_once_the_memory_is_full():
    changed = []
    for smoothing in (1.0, 0.5):
        method = make("comatch", {"embed_dim": D, "memory_batches": 2, "smoothing": smoothing})
        changed.append([step(method, *columns(method, now, extra=D), Columns(4))[0].pseudo.confidence_B for now in range(4)])
    assert [torch.equal(a, b) for a, b in zip(*changed, strict=True)] == [True, True, False, False]


def test_without_agreement_the_graph_is_instance_discrimination():
    method = make("comatch", {"embed_dim": D, "graph_threshold": 2.0, "temperature": 0.5})
    leaves, batch = columns(method, 0, extra=D)
    loss, _ = step(method, leaves, batch, Columns(4))
    first, second = (torch.nn.functional.normalize(leaves[name].detach()[:, 4:]) for name in ("u_s", "u_s2"))
    want = torch.nn.functional.cross_entropy(first @ second.T / 0.5, torch.arange(5))
    torch.testing.assert_close(loss.parts["graph_loss"], want)


def test_the_threshold_of_the_graph_counts_itself():
    method = make("comatch", {"graph_threshold": 0.5}, classes=2, unlabeled=2)
    target = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    torch.testing.assert_close(method._graph(target), torch.tensor([[1.0, 0.5], [0.5, 1.0]]) / 1.5)


def test_weak_and_labelled_embeddings_get_no_gradient():
    method = make("comatch", {"embed_dim": D, "threshold": 0.0})
    _, grads = step(method, *columns(method, 0, extra=D), Columns(4))
    assert not grads["u_w"].any() and not grads["x"][:, 4:].any() and not grads["u_s2"][:, :4].any()
    assert grads["u_s"][:, :4].any() and grads["u_s"][:, 4:].any() and grads["u_s2"][:, 4:].any()


def test_state_is_written_after_backward_only_and_survives_a_round_trip():
    method = make("comatch", {"embed_dim": D, "memory_batches": 2, "threshold": 0.5})
    check_round_trip(method, Columns(4), lambda n: columns(method, n, extra=D), steps=3)
    assert set(method.state_dict()) == {"memory_QMD", "memory_prob_QMC", "memory_steps", "ring_LC"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_read_as_float32(dtype):
    check_sixteen_bits("comatch", {"embed_dim": D, "threshold": 0.5}, dtype=dtype, extra=D)


def test_saturated_logits_stay_finite():
    method = make("comatch", {"embed_dim": D, "memory_batches": 1})
    for now in range(2):
        loss, grads = step(method, *columns(method, now, extra=D, scale=1e4), Columns(4))
        assert torch.isfinite(loss.total) and all(np.isfinite(grad).all() for grad in grads.values())


def test_views_heads_defaults_and_refusals():
    config = CoMatch.Config()
    assert list(CoMatch.views(config)) == ["x", "u_w", "u_s", "u_s2"] and CoMatch.views(config)["u_s2"] == View("unlabeled", "strong")
    assert CoMatch.heads(config, make("comatch", {}).task)["projection"].options == {"out": 64, "activation": "leaky_relu"}
    assert (config.threshold, config.unlabeled_weight, config.graph_weight, config.temperature, config.graph_threshold) == (0.95, 1.0, 1.0, 0.2, 0.8)
    assert (config.smoothing, config.memory_batches, config.embed_dim, config.alignment_length) == (0.9, 5, 64, 32)
    for bad in ({"threshold": -1.0}, {"graph_threshold": -1.0}, {"smoothing": 1.1}, {"temperature": 0.0}, {"memory_batches": 0}, {"embed_dim": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            CoMatch.Config(**bad)
