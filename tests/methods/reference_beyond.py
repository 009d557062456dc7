"""Methods beyond the recorded originals in plain numpy float64, row by row, with gradients by hand; and small networks to drive them."""

from __future__ import annotations

import numpy as np
import torch

from fastssl.engine.draws import MethodDraws
from fastssl.types import Out, RawBatch, Views
from tests.golden.identity import build_method, make_batch, make_task
from tests.methods.reference import softmax


class Linear:
    """logits = flattened view times ``weight``; heads on request likewise. Calls without tracking may use another weight; every call is written down."""

    def __init__(self, weight, untracked=None, cast=None, **heads):
        self.weight, self.other, self.cast, self.heads = weight, weight if untracked is None else untracked, cast or (lambda z: z), heads
        self.calls = []

    def __call__(self, *views):
        return self._answer("tracked", views, self.weight)

    def untracked(self, *views):
        return self._answer("untracked", views, self.other)

    def head(self, name, *feats):
        out = tuple(self.cast(feat @ self.heads[name]) for feat in feats)
        return out[0] if len(out) == 1 else out

    def _answer(self, kind, views, weight):
        self.calls.append((kind, [len(view) for view in views], torch.is_grad_enabled()))
        outs = tuple(Out(self.cast(view.flatten(1) @ weight), view.flatten(1)) for view in views)
        return outs[0] if len(outs) == 1 else outs


class Columns:
    """A view [n, C + D] IS its logits (the first C columns) and its projection (the rest)."""

    def __init__(self, classes, scale=1.0):
        self.classes, self.scale, self.calls = classes, scale, []

    def __call__(self, *views):
        return self._answer("tracked", views, 1.0)

    def untracked(self, *views):
        return self._answer("untracked", views, self.scale)

    def _answer(self, kind, views, scale):
        self.calls.append((kind, len(views), torch.is_grad_enabled()))
        outs = tuple(Out(scale * view[:, : self.classes], view, {"projection": view[:, self.classes :]}) for view in views)
        return outs[0] if len(outs) == 1 else outs


def make(name, options, *, classes=4, labeled=3, unlabeled=5, **task):
    return build_method(name, options, make_task(classes, labeled, unlabeled, **task)).double()


def images(method, seed, *, step=0, scale=1.0, dtype=torch.float64):
    """(views [n, 1, 2, 2], batch with the engine's own draws) of one step."""
    task, wanted = method.task, method.views(method.config)
    rows = {"labeled": task.labeled_batch, "unlabeled": task.unlabeled_batch}
    generator = torch.Generator().manual_seed(seed)
    pixels = {name: torch.randn(rows[view.stream], 1, 2, 2, generator=generator, dtype=torch.float64) for name, view in wanted.items()}
    views = Views({name: (scale * x).to(dtype) for name, x in pixels.items()})
    batch = make_batch(torch.randint(0, task.num_classes, (rows["labeled"],), generator=generator), rows["unlabeled"], step)
    raw = {stream: RawBatch.allocate(count, 1, 1) for stream, count in rows.items()}
    for stream, count in rows.items():
        raw[stream].draw_B.copy_(torch.arange(count) + step * count)
    draws = MethodDraws(method.draws(method.config, task), wanted, seed=seed, device=torch.device("cpu"))(raw, views, torch.tensor(step))
    batch.draws = {name: draw.to(dtype) if draw.is_floating_point() else draw for name, draw in draws.items()}
    return views, batch


def columns(method, seed, *, extra=0, step=0, scale=3.0):
    """(leaf views [n, C + extra], batch with draws) of one step."""
    task, wanted = method.task, method.views(method.config)
    rows = {"labeled": task.labeled_batch, "unlabeled": task.unlabeled_batch}
    generator = torch.Generator().manual_seed(seed)
    leaves = {}
    for name, view in wanted.items():
        leaves[name] = (scale * torch.randn(rows[view.stream], task.num_classes + extra, generator=generator, dtype=torch.float64)).requires_grad_()
    _, batch = images(method, seed, step=step)
    return leaves, batch


def step(method, leaves, batch, network):
    """One step with its writes; (loss, {view: gradient})."""
    for leaf in leaves.values():
        leaf.grad = None
    loss = method(Views(leaves), batch, network, None)
    loss.total.backward()
    with torch.no_grad():
        method.after_backward(batch)
    return loss, {name: np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy() for name, leaf in leaves.items()}


def check_sixteen_bits(name, options, *, dtype=torch.bfloat16, classes=4, extra=0):
    """16-bit logits give the loss of the same numbers in float32, in float32."""
    losses = []
    for read in (lambda x: x, lambda x: x.float()):
        method = build_method(name, options, make_task(classes, 3, 5))
        leaves, batch = columns(method, 3, extra=extra)
        loss = method(Views({view: read(leaf.detach().to(dtype)) for view, leaf in leaves.items()}), batch, Columns(classes), None)
        assert loss.total.dtype == torch.float32
        losses.append(loss.total)
    assert torch.isfinite(losses[0]) and torch.equal(*losses)


def check_round_trip(method, network, make_inputs, steps=2):
    """Nothing is written before ``after_backward``; a copy made from the saved state goes on exactly alike."""

    def go(method, n):
        leaves, batch = make_inputs(n)
        return step(method, leaves, batch, network)[0].total.detach()

    for n in range(steps):
        go(method, n)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    leaves, batch = make_inputs(steps)
    method(Views(leaves), batch, network, None).total.backward()
    assert before and all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    copy = type(method)(method.config, method.task).double()
    copy.load_state_dict(before)
    for n in range(steps, 2 * steps):
        assert torch.equal(go(method, n), go(copy, n))
    assert any(not torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert all(torch.equal(value, copy.state_dict()[key]) for key, value in method.state_dict().items())


def soft_cross_entropy(logits, targets, weights=None):
    """(weighted mean over rows, gradient at the logits)."""
    loss, grad = 0.0, np.zeros_like(logits)
    for i, (row, target) in enumerate(zip(logits, targets, strict=True)):
        p, w = softmax(row), 1.0 if weights is None else weights[i]
        loss -= w * sum(t * np.log(q) for t, q in zip(target, p, strict=True) if t) / len(logits)
        grad[i] = w * (p * target.sum() - target) / len(logits)
    return loss, grad


def normalised(row):
    return row / row.sum()


def mixed_rows(parts, partner, weight):
    """MixUp of the concatenated parts, split again."""
    rows = [np.asarray(row) for part in parts for row in part]
    mixed = [max(w, 1 - w) * row + (1 - max(w, 1 - w)) * rows[j] for row, j, w in zip(rows, partner, weight, strict=True)]
    ends = np.cumsum([len(part) for part in parts])
    return [np.array(mixed[end - len(part) : end]) for end, part in zip(ends, parts, strict=True)]


def one_hot(labels, classes):
    return np.array([[float(k == label) for k in range(classes)] for label in labels])


def mixmatch(x, views, labels, matrix, partner, weight, *, temperature, unlabeled_weight):
    """(sup, unsup, gradient at the matrix, guesses) with images flattened to rows."""
    classes = matrix.shape[1]
    guesses = []
    for i in range(len(views[0])):
        average = sum(softmax(view[i] @ matrix) for view in views) / len(views)
        guesses.append(normalised(average ** (1 / temperature)))
    pictures = mixed_rows([x, *views], partner, weight)
    targets = mixed_rows([one_hot(labels, classes), *[guesses] * len(views)], partner, weight)
    sup, grad = soft_cross_entropy(pictures[0] @ matrix, targets[0])
    total_grad = pictures[0].T @ grad
    unsup, rows = 0.0, len(views) * len(views[0]) * classes
    for pictures_k, targets_k in zip(pictures[1:], targets[1:], strict=True):
        for picture, target in zip(pictures_k, targets_k, strict=True):
            p = softmax(picture @ matrix)
            unsup += unlabeled_weight * np.sum((p - target) ** 2) / rows
            slope = 2 * unlabeled_weight * (p - target) / rows
            total_grad = total_grad + np.outer(picture, p * (slope - (slope * p).sum()))
    return sup, unsup, total_grad, np.array(guesses)
