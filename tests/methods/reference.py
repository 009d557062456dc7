"""FixMatch and ERM in plain numpy float64, row by row, with gradients by hand: the other derivation that tests compare with."""

from __future__ import annotations

import numpy as np


def softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row - row.max())
    return e / e.sum()


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over rows and its gradient."""
    loss, grad = 0.0, np.zeros_like(logits)
    for i, (row, label) in enumerate(zip(logits, labels, strict=True)):
        p = softmax(row)
        loss -= np.log(p[label]) / len(logits)
        grad[i] = (p - np.eye(len(row))[label]) / len(logits)
    return loss, grad


def erm(x, x_s, labels, a_s):
    """(loss, {view: gradient})."""
    weak, grad_weak = cross_entropy(x, labels)
    strong, grad_strong = cross_entropy(x_s, labels)
    return weak + a_s * strong, {"x": grad_weak, "x_s": a_s * grad_strong}


def fixmatch(x, x_s, u_w, u_s, labels, *, threshold, weight, a_s, strict):
    """Everything FixMatch says about one step, as a dict."""
    sup, grads = erm(x, x_s, labels, a_s)
    unsup, grad_u_s, mask, pseudo, confidence = 0.0, np.zeros_like(u_s), [], [], []
    for i, (weak, strong) in enumerate(zip(u_w, u_s, strict=True)):
        q, p = softmax(weak), softmax(strong)
        label = int(np.flatnonzero(q == q.max())[0])
        passed = q.max() > threshold if strict else q.max() >= threshold
        if passed:
            unsup -= weight * np.log(p[label]) / len(u_w)
            grad_u_s[i] = weight * (p - np.eye(len(p))[label]) / len(u_w)
        mask.append(float(passed))
        pseudo.append(label)
        confidence.append(q.max())
    return {
        "sup": sup,
        "unsup": unsup,
        "total": sup + unsup,
        "mask": np.array(mask),
        "pseudo": np.array(pseudo),
        "confidence": np.array(confidence),
        "grads": {**grads, "u_w": np.zeros_like(u_w), "u_s": grad_u_s},
    }
