"""Pseudo-Label: the network's own answer as a label.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.functional import confidence, cross_entropy_rows, exceeds, forward_views, groups_of, labeled_views, supervised
from fastssl.methods.base import Forward, Method, TeacherForward, check_range
from fastssl.types import Batch, Loss, PseudoLabels, View, Views


class PseudoLabel(Method):
    """Pseudo-Label (Lee, ICML 2013 workshop on challenges in representation learning).

        h_i, p_i = argmax, max of softmax(z(u_i)), no gradient        m_i = 1[p_i >= tau]
        L = mean_i CE(z(x_i), t_i) + w r(k) / U sum_i m_i CE(z(u_i), h_i)

    One weak view is both teacher and pupil.  The paper has no threshold (tau = 0) and a weight that rises linearly,
    r(k) = clip((k / total updates - ramp_start) / (ramp_end - ramp_start), 0, 1); it gives the ramp in epochs of its own data, here it is in shares of
    the run (default: 0 to 0.4).  All views share one forward.  No state.

    What published code does differently, each a field:
      threshold            tau; rows below it stay in the denominator                              (Transfer-Learning-Library)
      ramp_end             0 = constant weight                                                     (Transfer-Learning-Library)
      strict_threshold     m_i = 1[p_i > tau]                                                      (Transfer-Learning-Library)
      strong_label_weight  L += a_s mean_i CE(z(x_s,i), t_i), a_s = 0.1                            (Transfer-Learning-Library)
      separate_forwards    one forward per view, in the order x, x_s, u                            (Transfer-Learning-Library)
    """

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.0  # tau
        unlabeled_weight: float = 1.0  # w
        ramp_start: float = 0.0
        ramp_end: float = 0.4
        strict_threshold: bool = False
        strong_label_weight: float = 0.0  # a_s
        separate_forwards: bool = False

        def __post_init__(self) -> None:
            check_range(self, "threshold", "unlabeled_weight", "strong_label_weight")
            check_range(self, "ramp_start", "ramp_end", high=1)
            if 0 < self.ramp_end < self.ramp_start:
                raise ValueError(f"ramp_end = {self.ramp_end} must not be less than ramp_start = {self.ramp_start}")

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return labeled_views(config.strong_label_weight) | {"u": View("unlabeled", "weak")}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        outs = forward_views(student, v, groups_of(list(self.views(config)), config.separate_forwards))
        sup = supervised(outs, batch.labeled.label_B, config.strong_label_weight)

        confidence_U, pseudo_U = confidence(outs["u"].logits_NC.detach())
        loss_U = cross_entropy_rows(outs["u"].logits_NC, pseudo_U)
        mask_U = exceeds(confidence_U, config.threshold, config.strict_threshold).to(loss_U.dtype)
        unsup = config.unlabeled_weight * self.ramp(batch.clock.step, loss_U.dtype) * (mask_U * loss_U).mean()
        return Loss(sup + unsup, {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()}, PseudoLabels(pseudo_U, mask_U, confidence_U))

    def ramp(self, step: Tensor, dtype: torch.dtype) -> Tensor:
        """r after ``step`` finished updates, a scalar; a ramp of length 0 is a jump."""
        start, end, total = self.config.ramp_start, self.config.ramp_end, self.task.total_steps
        if end == 0:
            return torch.ones_like(step, dtype=dtype)
        return ((step.to(dtype) / total - start) / max(end - start, 1 / total)).clamp(0, 1)
