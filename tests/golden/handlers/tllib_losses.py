"""Methods of the Transfer-Learning-Library that were recorded at their logits, in float32: one step after another on one method object."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastssl.functional import exceeds
from fastssl.methods.base import Method
from fastssl.types import Batch, Loss, Out
from tests.golden.identity import build_method, forward_backward, make_batch, make_task
from tests.golden.recorder import Recorder

TOLERANCE = 1e-5
GRAD_FLOOR = 0.1  # gradients at logits are differences of probabilities; a rounding of p = 1 is 6e-8 whatever is left of p - 1
LABELED = {"x": "y_l", "x_s": "y_l_strong"}
WEAK_STRONG = {"u_w": "y_u", "u_s": "y_u_strong"}
LOSSES = {"sup_loss": "cls_loss", "unsup_loss": "self_training_loss"}


@dataclass
class Steps:
    """A recording's inputs, and what the method answers, stacked over steps and compared at the end. ``views``: view name -> array name."""

    rec: Recorder
    views: dict[str, str]
    out: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.logits = {view: self.rec.input(array) for view, array in self.views.items()}
        self.labels = self.rec.input("labels_l")
        self.steps, self.labeled, self.classes = self.logits["x"].shape
        self.unlabeled = self.logits[list(self.views)[-1]].shape[1]

    def build(self, name: str, options: dict[str, Any], **sizes: Any) -> Method:
        """The method with the options that every recording has; lives where its inputs do."""
        common = {"strong_label_weight": self.rec.hp("trade_off_cls_strong"), "separate_forwards": True}
        return build_method(name, common | options, make_task(self.classes, self.labeled, self.unlabeled, **sizes)).to(self.labels.device)

    def batch(self, step: int, epoch: int = 0, index_U: Tensor | None = None) -> Batch:
        batch = make_batch(self.labels[step], self.unlabeled, step, epoch)
        if index_U is not None:
            assert batch.unlabeled is not None
            batch.unlabeled = replace(batch.unlabeled, index_B=index_U)
        return batch

    def run(self, method: Method, step: int, batch: Batch, parts: dict[str, str]) -> Loss:
        """Forward, backward and ``after_backward`` of one step; notes losses (part name -> array name), gradients and pseudo labels."""
        loss, grads = forward_backward(method, {view: x[step] for view, x in self.logits.items()}, batch)
        method.after_backward(batch)
        self.note(loss=loss.total, **{array: loss.parts[part] for part, array in parts.items()})
        self.note(**{f"grad_{array}": grads[view] for view, array in self.views.items()})
        if loss.pseudo is not None:
            self.note(mask=loss.pseudo.mask_B, pseudo_labels=loss.pseudo.label_B)
        return loss

    def note(self, **values: Tensor) -> None:
        """Outputs of this step; those that the file does not hold are dropped."""
        for name, value in values.items():
            if name in self.rec.arrays:
                self.out[name].append(value.detach().clone())

    def check(self) -> None:
        for name, values in self.out.items():
            exact = name in ("mask", "pseudo_labels")
            floor = {"floor": GRAD_FLOOR} if name.startswith("grad_") else {}
            self.rec.check(name, torch.stack(values), 0.0 if exact else TOLERANCE, **floor)


def pseudo_label(rec: Recorder) -> None:
    run = Steps(rec, LABELED | {"u": "y_u"})
    options = {"threshold": rec.hp("threshold"), "unlabeled_weight": rec.hp("trade_off_self_training"), "ramp_end": 0.0, "strict_threshold": True}
    method = run.build("pseudo_label", options)
    for step in range(run.steps):
        run.run(method, step, run.batch(step), LOSSES)
    run.check()


def pi_model(rec: Recorder) -> None:
    run = Steps(rec, LABELED | {"u_1": "y_u1", "u_2": "y_u2"})
    weight = rec.hp("trade_off_con")
    method = run.build("pi_model", {"unlabeled_weight": weight, "ramp_epochs": rec.hp("warm_up_epochs"), "sum_classes": True})
    for step, epoch in enumerate(rec.input("epoch").tolist()):
        loss = run.run(method, step, run.batch(step, epoch), {"sup_loss": "cls_loss", "unsup_loss": "con_loss"})
        p, q = (torch.softmax(run.logits[view][step], -1) for view in ("u_1", "u_2"))
        run.note(ramp=loss.parts["unsup_loss"] / (weight * ((p - q) ** 2).sum(-1).mean()))
    run.check()


def uda(rec: Recorder) -> None:
    run = Steps(rec, LABELED | WEAK_STRONG)
    options = {
        "threshold": rec.hp("threshold"),
        "unlabeled_weight": rec.hp("trade_off_con"),
        "target_temperature": 1.0,
        "student_temperature": rec.hp("T"),
        "mean_over": "selected",
        "strict_threshold": True,
    }
    method = run.build("uda", options)
    for step in range(run.steps):
        run.run(method, step, run.batch(step), {"sup_loss": "cls_loss", "unsup_loss": "con_loss"})
    run.check()


def noisy_student(rec: Recorder) -> None:
    run = Steps(rec, LABELED | {"u_s": "y_u_strong"})
    table, index = rec.input("teacher_output"), rec.input("idx_u")
    options = {"unlabeled_weight": rec.hp("trade_off_self_training"), "temperature": rec.hp("T")}
    method = run.build("noisy_student", options, num_unlabeled=len(table))
    rows = torch.arange(len(table), device=table.device)
    half = len(table) // 2 + 1
    padded = torch.cat([rows, rows.new_full((2 * half - len(table),), -1)])  # two batches, the last one padded as the engine pads it

    def predict(view: str):
        for piece in padded.split(half):
            logits = table[piece].masked_fill(piece[:, None] < 0, 100.0)  # padding answers with anything
            yield piece, Out(logits, logits)

    method.prepare(predict)
    for step in range(run.steps):
        run.run(method, step, run.batch(step, index_U=index[step]), LOSSES)
    run.check()


def flexmatch(rec: Recorder) -> None:
    run = Steps(rec, LABELED | WEAK_STRONG)
    index, tau = rec.input("idx_u"), rec.hp("threshold")
    options = {
        "threshold": tau,
        "unlabeled_weight": rec.hp("trade_off_self_training"),
        "warmup": bool(rec.hp("warmup")),
        "one_value": "zero",
        "strict_threshold": True,
    }
    method: Any = run.build("flexmatch", options, num_unlabeled=rec.hp("n_unlabeled"))

    def class_thresholds() -> Tensor:
        return method.thresholds(method.learning_status(run.logits["u_w"].dtype))

    for step in range(run.steps):
        thresholds = class_thresholds()
        run.note(status_before=method.status, class_threshold_before=thresholds)
        loss = run.run(method, step, run.batch(step, index_U=index[step]), LOSSES)
        assert loss.pseudo is not None and loss.pseudo.confidence_B is not None
        run.note(status_after=method.status, confidence=loss.pseudo.confidence_B, dynamic_threshold=thresholds[loss.pseudo.label_B])
        run.note(selected_mask=exceeds(loss.pseudo.confidence_B, tau, strict=True).long())
        seen = torch.stack([(method.status == c).sum() for c in [*range(run.classes), -1]])
        if not torch.equal(seen, method.counts):
            raise AssertionError(f"step {step}: counts {method.counts.tolist()} are not the histogram {seen.tolist()} of the status")
    run.check()
    method.status.fill_(1)
    method.counts.zero_()[1] = len(method.status)
    rec.check("corner_all_one_class_threshold", class_thresholds(), TOLERANCE)


def debiasmatch(rec: Recorder) -> None:
    run = Steps(rec, LABELED | WEAK_STRONG)
    momentum, per_epoch = rec.hp("momentum"), rec.hp("iters_per_epoch")
    options = {
        "threshold": rec.hp("threshold"),
        "unlabeled_weight": rec.hp("trade_off_self_training"),
        "debias": rec.hp("tau"),
        "momentum": momentum,
        "pseudo_prior": "updated",
        "reset_each_epoch": True,
        "strict_threshold": True,
    }
    method: Any = run.build("debiasmatch", options)
    if run.steps != rec.hp("epochs") * per_epoch:
        raise ValueError(f"{run.steps} steps are not {rec.hp('epochs')} epochs of {per_epoch}")
    for step in range(run.steps):
        if step % per_epoch == 0:
            method.on_epoch_start(step // per_epoch)
        run.run(method, step, run.batch(step, step // per_epoch), LOSSES)
        run.note(q_hat=method.q, q=method.kept("answer"))
    run.check()


HANDLERS = {
    "pseudo_label_": pseudo_label,
    "pi_model_": pi_model,
    "uda_": uda,
    "noisy_student_": noisy_student,
    "flexmatch_": flexmatch,
    "debiasmatch_": debiasmatch,
}
