"""The SimMatch family in plain numpy float64, row by row and entry by entry, with gradients by hand: the other derivation that tests compare with."""

from __future__ import annotations

import numpy as np

from tests.methods.reference import softmax


def unit(row):
    return row / max(np.linalg.norm(row), 1e-12)


def unit_backward(raw, grad):
    """Gradient at a raw row of a function of the row scaled to length 1."""
    norm, e = np.linalg.norm(raw), unit(raw)
    return (grad - (grad @ e) * e) / norm


def align(p, mean):
    q = p / mean
    return q / q.sum()


def soft_ce(logits, target):
    """(-sum target log softmax(logits), gradient at logits)."""
    p = softmax(logits)
    return -sum(t * np.log(q) for t, q in zip(target, p, strict=True)), p * target.sum() - target


def instance_row(raw_s, e_w, bank, labels, prob, st, tt):
    """(loss, gradient at the raw student embedding, neighbours' class distribution) of one row."""
    weights = softmax(np.array([e_w @ v for v in bank]) / tt)
    student = softmax(np.array([unit(raw_s) @ v for v in bank]) / st)
    calibrated = np.array([w * prob[label] for w, label in zip(weights, labels, strict=True)])
    calibrated /= calibrated.sum()
    neighbours = np.zeros(len(prob))
    loss, grad = 0.0, np.zeros_like(raw_s)
    for w, c, s, label, v in zip(weights, calibrated, student, labels, bank, strict=True):
        neighbours[label] += w
        loss -= c * np.log(s)
        grad += (s - c) * v / st
    return loss, unit_backward(raw_s, grad), neighbours


def shrink_row(score, aux, confidence, threshold):
    """(loss, gradient at the auxiliary logits, c*) of one row by the definition, class by class."""
    classes, none = len(score), np.zeros(len(score))
    order = sorted(range(classes), key=lambda c: (-score[c], c))
    top, reached, first = score[order[0]], False, classes - 1
    for c in range(2, classes):
        if top / (top + sum(score[k] for k in order[c:])) >= threshold:
            first, reached = c, True
            break
    if confidence >= threshold or not reached:
        return 0.0, none, first
    kept = [order[0], *order[first:]]
    p = softmax(np.array([aux[k] for k in kept]))
    grad = none.copy()
    for k, q in zip(kept, p, strict=True):
        grad[k] += confidence * q
    grad[order[0]] -= confidence
    return -confidence * np.log(p[0]), grad, first


def propagate(e_w, prob, bank, labels, n, alpha, t):
    """(propagated label, weight of the row itself) by matrix inversion."""
    near = sorted(range(len(bank)), key=lambda j: -(e_w @ bank[j]))[:n]
    nodes = np.stack([e_w, *(bank[j] for j in near)])
    graph = np.zeros((len(nodes), len(nodes)))
    for a in range(len(nodes)):
        others = [b for b in range(len(nodes)) if b != a]
        graph[a, others] = softmax(np.array([nodes[a] @ nodes[b] for b in others]) / t)
    spread = (1 - alpha) * np.linalg.inv(np.eye(len(nodes)) - alpha * graph)
    given = np.stack([prob, *(np.eye(len(prob))[labels[j]] for j in near)])
    return (spread @ given)[0], spread[0, 0]


def edges_row(raw_s, e_w, bank, bank_labels, prob, t):
    """(edge loss, node-edge loss, gradients at the raw student embedding) of one row."""
    target = softmax(np.array([e_w @ u for u in bank]) / t)
    student = softmax(np.array([unit(raw_s) @ u for u in bank]) / t)
    read = sum(s * y for s, y in zip(student, bank_labels, strict=True))
    edge = -sum(r * np.log(s) for r, s in zip(target, student, strict=True))
    node_edge = -sum(p * np.log(q) for p, q in zip(prob, read, strict=True))
    d_student = np.array([-(prob / read) @ y for y in bank_labels])
    d_logit = student * (d_student - student @ d_student)
    edge_grad = sum((s - r) * u / t for s, r, u in zip(student, target, bank, strict=True))
    node_grad = sum(d * u / t for d, u in zip(d_logit, bank, strict=True))
    return edge, node_edge, unit_backward(raw_s, edge_grad), unit_backward(raw_s, node_grad)
