"""FixMatch: confident hard pseudo-labels from the weak view teach the strong view.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl.functional import cross_entropy_rows, log_prior
from fastssl.kernels import pseudo_label_ce
from fastssl.methods.base import Forward, Method
from fastssl.types import Batch, Loss, PseudoLabels, Task, View, Views


class FixMatch(Method):
    """FixMatch (Sohn et al., NeurIPS 2020, arXiv:2001.07685, equations 3 and 4).

        q_i = softmax(z(u_w,i)), no gradient        h_i = argmax q_i        m_i = 1[max q_i >= tau]
        L_s = mean_i CE(z(x_i), t_i)
        L_u = lambda_u / U  sum_i m_i CE(z(u_s,i), h_i)
        L   = L_s + L_u

    Rows below the threshold stay in the denominator U.  All views go through the student in one joint forward [x; u_w; u_s]
    (one BatchNorm batch).  ``parts`` are the contributions to the total: ``sup_loss`` = L_s (with the a_s term), ``unsup_loss`` = L_u
    (with its weight).  The mean of ``total`` over ranks is the loss of the global batch, as all ranks hold equally many rows.

    What published code does differently, each a field of its own:
      strict_threshold     m_i = 1[max q_i > tau]                                    (Transfer-Learning-Library)
      strong_label_weight  L_s += a_s mean_i CE(z(x_s,i), t_i), a_s = 0.1            (Transfer-Learning-Library)
      separate_forwards    one forward, so one BatchNorm batch, per view, in the order x, x_s, u_w (no gradient), u_s (Transfer-Learning-Library)
      pseudo_labels        'teacher': q comes from the averaged network on u_w; the student sees [x; u_s]  (FixMatch-EMAN, arXiv:2101.08482)

    ``logit_adjustment`` = a > 0 is the baseline for long-tailed labels (Menon et al., ICLR 2021, arXiv:2007.07314, equation 10): the labelled terms become
    CE(z + a log p, t) with p the labelled class frequencies, so that z itself, which is tested and gives the pseudo-labels, belongs to balanced classes.
    """

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.95  # tau
        unlabeled_weight: float = 1.0  # lambda_u
        strict_threshold: bool = False
        strong_label_weight: float = 0.0  # a_s
        separate_forwards: bool = False
        pseudo_labels: Literal["student", "teacher"] = "student"
        logit_adjustment: float = 0.0  # a

        def __post_init__(self) -> None:
            # above 1 a threshold lets nothing pass: some published runs did that
            for name in ("threshold", "unlabeled_weight", "strong_label_weight", "logit_adjustment"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
            if self.pseudo_labels not in ("student", "teacher"):
                raise ValueError(f"pseudo_labels = {self.pseudo_labels!r} must be 'student' or 'teacher'")

    adjustment: Tensor

    def __init__(self, config: Config, task: Task):
        super().__init__(config, task)
        if config.logit_adjustment:
            counts_C = torch.tensor(task.labeled_class_counts, dtype=torch.get_default_dtype())
            self.register_buffer("adjustment", log_prior(counts_C / counts_C.sum(), config.logit_adjustment), persistent=False)  # known from the split

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        labeled = {"x": View("labeled", "weak")}
        if config.strong_label_weight:
            labeled["x_s"] = View("labeled", "strong")
        weak, strong = {"u_w": View("unlabeled", "weak")}, {"u_s": View("unlabeled", "strong")}
        return labeled | strong | weak if config.pseudo_labels == "teacher" else labeled | weak | strong

    @staticmethod
    def needs_teacher(config: Any) -> bool:
        return config.pseudo_labels == "teacher"

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: Forward | None) -> Loss:
        config, label_B = self.config, batch.labeled.label_B
        logits = self._logits(v, student, teacher)

        labeled = {name: logits[name] + self.adjustment if config.logit_adjustment else logits[name] for name in logits if name in ("x", "x_s")}
        sup = cross_entropy_rows(labeled["x"], label_B).mean()
        if config.strong_label_weight:
            sup = sup + config.strong_label_weight * cross_entropy_rows(labeled["x_s"], label_B).mean()

        pseudo = pseudo_label_ce(logits["u_w"], [logits["u_s"]], threshold=config.threshold, strict=config.strict_threshold)
        unsup = config.unlabeled_weight * pseudo.loss_VU.mean()

        parts = {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()}
        return Loss(sup + unsup, parts, PseudoLabels(pseudo.label_U, pseudo.mask_U, pseudo.confidence_U))

    def _logits(self, v: Views, student: Forward, teacher: Forward | None) -> dict[str, Tensor]:
        """Logits of every view by name, forwarded in the grouping that the config asks for."""
        from_student = self.config.pseudo_labels == "student"
        logits: dict[str, Tensor] = {}
        if not from_student:
            if teacher is None:
                raise RuntimeError("pseudo_labels = 'teacher' needs a teacher forward")
            with torch.no_grad():
                logits["u_w"] = teacher(v.u_w).logits_NC
        names = [name for name in self.views(self.config) if from_student or name != "u_w"]
        if self.config.separate_forwards:
            for name in names:
                with torch.set_grad_enabled(torch.is_grad_enabled() and name != "u_w"):
                    logits[name] = student(v[name]).logits_NC
        else:
            logits |= {name: out.logits_NC for name, out in zip(names, student(*(v[name] for name in names)), strict=True)}
        return logits
