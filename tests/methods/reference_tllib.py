"""The Transfer-Learning-Library's methods in plain numpy float64, row by row, with gradients by hand: the other derivation that tests compare with."""

from __future__ import annotations

import numpy as np

from tests.methods.reference import erm, softmax


def passes(value, threshold, strict):
    return value > threshold if strict else value >= threshold


def first_max(row):
    return int(np.flatnonzero(row == row.max())[0])


def hard_rows(weak, strong, *, thresholds, weight, strict, shift_weak=0.0, shift_strong=0.0):
    """FixMatch's second term with a threshold for each class and logits shifted by a vector; (loss, gradient at ``strong``, mask, label, confidence)."""
    loss, grad, mask, labels, confidence = 0.0, np.zeros_like(strong), [], [], []
    for i, (a, b) in enumerate(zip(weak, strong, strict=True)):
        q, p = softmax(a - shift_weak), softmax(b + shift_strong)
        label = first_max(q)
        passed = passes(q.max(), thresholds[label], strict)
        if passed:
            loss -= weight * np.log(p[label]) / len(weak)
            grad[i] = weight * (p - np.eye(len(p))[label]) / len(weak)
        mask.append(float(passed))
        labels.append(label)
        confidence.append(q.max())
    return loss, grad, np.array(mask), np.array(labels), np.array(confidence)


def squares(a, b, *, weight, sum_classes, sum_rows=False):
    """Weighted squared distance of softmax(a) and softmax(b); (loss, gradient at a, gradient at b)."""
    loss, grad_a, grad_b = 0.0, np.zeros_like(a), np.zeros_like(b)
    scale = weight / (1 if sum_rows else len(a)) / (1 if sum_classes else a.shape[1])
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        p, q = softmax(x), softmax(y)
        loss += scale * ((p - q) ** 2).sum()
        for grad, own, other in ((grad_a, p, q), (grad_b, q, p)):
            d = 2 * (own - other)
            grad[i] = scale * own * (d - (own * d).sum())
    return loss, grad_a, grad_b


def kl_rows(weak, strong, *, threshold, strict, weight, target_temperature, student_temperature, over):
    """UDA's second term; (loss, gradient at ``strong``, mask)."""
    mask = np.array([float(passes(softmax(row).max(), threshold, strict)) for row in weak])
    count = len(weak) if over == "all" else max(mask.sum(), 1)
    loss, grad = 0.0, np.zeros_like(strong)
    for i, (a, b) in enumerate(zip(weak, strong, strict=True)):
        if mask[i]:
            q, p = softmax(a / target_temperature), softmax(b / student_temperature)
            loss += weight / count * sum(qc * (np.log(qc) - np.log(pc)) for qc, pc in zip(q, p, strict=True) if qc > 0)
            grad[i] = weight / count * (p - q) / student_temperature
    return loss, grad, mask


class FlexMatch:
    """With a plain list as status, counted anew at each step."""

    def __init__(self, rows, classes, *, threshold, weight, a_s, strict, warmup, one_value, mapping):
        self.status, self.classes, self.beta = [-1] * rows, classes, np.zeros(classes)
        self.threshold, self.weight, self.a_s, self.strict = threshold, weight, a_s, strict
        self.warmup, self.one_value, self.mapping = warmup, one_value, mapping

    def thresholds(self):
        counts = [self.status.count(c) for c in range(self.classes)]
        none = self.status.count(-1)
        most = max(counts + ([none] if self.warmup else []))
        beta = np.array([n / most if most else 0.0 for n in counts])
        if self.one_value != "formula" and len(self.status) in (*counts, none):
            beta = np.zeros(self.classes) if self.one_value == "zero" else self.beta
        self.beta = beta
        return self.threshold * np.array([{"convex": b / (2 - b), "linear": b, "concave": np.log(1 + b) / np.log(2)}[self.mapping] for b in beta])

    def step(self, x, x_s, u_w, u_s, labels, index):
        sup, grads = erm(x, x_s, labels, self.a_s)
        unsup, grad, mask, pseudo, confidence = hard_rows(u_w, u_s, thresholds=self.thresholds(), weight=self.weight, strict=self.strict)
        for i, label, c in zip(index, pseudo, confidence, strict=True):
            if passes(c, self.threshold, self.strict):
                self.status[i] = int(label)
        return sup, unsup, grads | {"u_w": np.zeros_like(u_w), "u_s": grad}, mask, pseudo


class Queue:
    """Self-Tuning's keys by class, written one by one."""

    def __init__(self, keys, places):
        self.keys, self.places, self.pointer = keys.copy(), places, [0] * (len(keys) // places)

    def contrast(self, query, key, labels, temperature):
        """PGC and its gradient at the (unit) queries."""
        loss, grad, n, k = 0.0, np.zeros_like(query), len(query), self.places
        for i, label in enumerate(labels):
            others = [self.keys[r] for r in range(len(self.keys)) if r // k != label]
            rows = np.array([key[i], *self.keys[label * k : (label + 1) * k], *others])
            r = softmax(rows @ query[i] / temperature)
            target = np.array([1 / (k + 1)] * (k + 1) + [0.0] * (len(rows) - k - 1))
            loss += sum(t * (np.log(t) - np.log(rj)) for t, rj in zip(target, r, strict=True) if t > 0) / n
            grad[i] = (r - target) @ rows / temperature / n
        return loss, grad

    def write(self, key, labels):
        for row, label in zip(key, labels, strict=True):
            self.keys[label * self.places + self.pointer[label]] = row
            self.pointer[label] = (self.pointer[label] + 1) % self.places
