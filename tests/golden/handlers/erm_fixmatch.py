"""ERM and FixMatch as in the Transfer-Learning-Library (float32 files), FixMatch-EMAN (float64)."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from tests.golden.identity import build_method, forward_backward, make_batch, make_task
from tests.golden.recorder import Recorder

TLLIB = 1e-5
EMAN = 1e-9
GRAD_FLOOR = 0.1  # gradients at logits are differences of probabilities; a rounding of p = 1 is 6e-8 whatever is left of p - 1


def erm(rec: Recorder) -> None:
    views = {"x": "y_l", "x_s": "y_l_strong"}
    logits = {view: rec.input(array) for view, array in views.items()}
    labels = rec.input("labels_l")
    steps, batch, classes = logits["x"].shape
    method = build_method("erm", {"strong_weight": rec.hp("trade_off_cls_strong")}, make_task(classes, batch, 0))
    out = defaultdict(list)
    for step in range(steps):
        loss, grads = forward_backward(method, {view: x[step] for view, x in logits.items()}, make_batch(labels[step], 0, step))
        out["loss"].append(loss.total)
        for view, array in views.items():
            out[f"grad_{array}"].append(grads[view])
    _check(rec, out, TLLIB)


def fixmatch_tllib(rec: Recorder) -> None:
    views = {"x": "y_l", "x_s": "y_l_strong", "u_w": "y_u", "u_s": "y_u_strong"}
    logits = {view: rec.input(array) for view, array in views.items()}
    labels = rec.input("labels_l")
    (steps, batch, classes), unlabeled = logits["x"].shape, logits["u_w"].shape[1]
    options = {
        "threshold": rec.hp("threshold"),
        "unlabeled_weight": rec.hp("trade_off_self_training"),
        "strong_label_weight": rec.hp("trade_off_cls_strong"),
        "strict_threshold": True,
        "separate_forwards": True,
    }
    method = build_method("fixmatch", options, make_task(classes, batch, unlabeled))
    out = defaultdict(list)
    for step in range(steps):
        loss, grads = forward_backward(method, {view: x[step] for view, x in logits.items()}, make_batch(labels[step], unlabeled, step))
        assert loss.pseudo is not None
        out["cls_loss"].append(loss.parts["sup_loss"])
        out["self_training_loss"].append(loss.parts["unsup_loss"])
        out["loss"].append(loss.total)
        out["mask"].append(loss.pseudo.mask_B)
        out["pseudo_labels"].append(loss.pseudo.label_B)
        for view, array in views.items():
            out[f"grad_{array}"].append(grads[view])
    _check(rec, out, TLLIB)


def fixmatch_eman(rec: Recorder) -> None:
    steps, classes, batch, unlabeled = (rec.hp(f"hp.{name}") for name in ("steps", "C", "B_l", "B_u"))
    weight = rec.hp("hp.lambda_u")
    options = {"threshold": rec.hp("hp.threshold"), "unlabeled_weight": weight, "pseudo_labels": "teacher"}
    method = build_method("fixmatch", options, make_task(classes, batch, unlabeled))
    for step in range(steps):
        x, u_s = rec.input(f"s{step}.in.logits_q").split([batch, unlabeled])
        logits = {"x": x, "u_w": rec.input(f"s{step}.in.logits_u_w"), "u_s": u_s}
        loss, grads = forward_backward(method, logits, make_batch(rec.input(f"s{step}.in.targets_x"), unlabeled, step))
        assert loss.pseudo is not None and loss.pseudo.confidence_B is not None
        rec.check(f"s{step}.pseudo_targets", loss.pseudo.label_B)
        rec.check(f"s{step}.max_probs", loss.pseudo.confidence_B, EMAN)
        rec.check(f"s{step}.mask", loss.pseudo.mask_B)
        rec.check(f"s{step}.loss_x", loss.parts["sup_loss"], EMAN)
        rec.check(f"s{step}.loss_u", loss.parts["unsup_loss"] / weight, EMAN)  # recorded without its weight
        rec.check(f"s{step}.loss", loss.total, EMAN)
        rec.check(f"s{step}.grad.logits_q", torch.cat([grads["x"], grads["u_s"]]), EMAN, GRAD_FLOOR)


def _check(rec: Recorder, out: dict[str, list[Tensor]], tolerance: float) -> None:
    """Compare stacks over steps; masks and labels exactly."""
    for name, values in out.items():
        stack = torch.stack([value.detach() for value in values])
        if name in ("mask", "pseudo_labels"):
            rec.check(name, stack)
        elif name.startswith("grad_"):
            rec.check(name, stack, tolerance, GRAD_FLOOR)
        else:
            rec.check(name, stack, tolerance)


HANDLERS = {"erm_": erm, "fixmatch_": fixmatch_tllib, "simmatch_fixmatch_eman_": fixmatch_eman}
