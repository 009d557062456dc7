"""UDA: the sharpened prediction of a weak view is the soft target of the strong one.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl.functional import confidence, cross_entropy_rows, exceeds, forward_views, groups_of, labeled_views, probabilities, soft_cross_entropy_rows
from fastssl.methods.base import Forward, Method, TeacherForward, check_choice, check_range
from fastssl.parallel import sum_over_ranks, world_size
from fastssl.types import Batch, Loss, Out, PseudoLabels, View, Views


class UDA(Method):
    """Unsupervised Data Augmentation (Xie et al., NeurIPS 2020, arXiv:1904.12848).

        q_i = softmax(z(u_w,i) / T_q), no gradient        m_i = 1[max softmax(z(u_w,i)) >= tau]
        L = mean_i CE(z(x_i), t_i) + w / U sum_i m_i KL(q_i || softmax(z(u_s,i) / T_s))

    tau = 0.8, T_q = 0.4 (a sharpened target), T_s = 1.  All views share one forward.  No state.
    Training signal annealing (``signal_annealing``, the paper's option): a labelled row counts only while its probability of the right class is below
    eta = a (1 - 1/C) + 1/C, and the labelled loss is the mean over the rows that count (of all ranks); with s = finished updates / total updates,
    linear: a = s;   log: a = 1 - exp(-5 s);   exp: a = exp(5 (s - 1)).

    What published code does differently, each a field:
      target_temperature   T_q = 1: the target is not sharpened                                    (Transfer-Learning-Library)
      student_temperature  T_s = 0.85: the student is                                              (Transfer-Learning-Library)
      mean_over            'selected': divide by max(sum_i m_i, 1) instead of U                    (Transfer-Learning-Library)
      strict_threshold     m_i = 1[max softmax > tau]                                              (Transfer-Learning-Library)
      strong_label_weight  L += a_s mean_i CE(z(x_s,i), t_i), a_s = 0.1                            (Transfer-Learning-Library)
      separate_forwards    one forward per view, in the order x, x_s, u_w (no gradient), u_s       (Transfer-Learning-Library)
    """

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.8  # tau
        unlabeled_weight: float = 1.0  # w
        target_temperature: float = 0.4  # T_q
        student_temperature: float = 1.0  # T_s
        mean_over: Literal["all", "selected"] = "all"
        signal_annealing: Literal["none", "linear", "log", "exp"] = "none"
        strict_threshold: bool = False
        strong_label_weight: float = 0.0  # a_s
        separate_forwards: bool = False

        def __post_init__(self) -> None:
            check_range(self, "threshold", "unlabeled_weight", "strong_label_weight")
            check_choice(self, "mean_over", ("all", "selected"))
            check_choice(self, "signal_annealing", ("none", "linear", "log", "exp"))
            for name in ("target_temperature", "student_temperature"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must be greater than 0")

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return labeled_views(config.strong_label_weight) | {"u_w": View("unlabeled", "weak"), "u_s": View("unlabeled", "strong")}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        outs = forward_views(student, v, groups_of(list(self.views(config)), config.separate_forwards), no_gradient=("u_w",))
        sup = self._supervised(outs, batch)

        weak_UC, strong_UC = outs["u_w"].logits_NC.detach(), outs["u_s"].logits_NC
        confidence_U, pseudo_U = confidence(weak_UC)
        target_UC = probabilities(weak_UC, config.target_temperature)
        entropy_U = -torch.xlogy(target_UC, target_UC).sum(1)
        loss_U = soft_cross_entropy_rows(strong_UC, target_UC, config.student_temperature) - entropy_U
        mask_U = exceeds(confidence_U, config.threshold, config.strict_threshold).to(loss_U.dtype)
        unsup = config.unlabeled_weight * ((mask_U * loss_U).mean() if config.mean_over == "all" else _mean_of_selected(loss_U, mask_U))
        return Loss(sup + unsup, {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()}, PseudoLabels(pseudo_U, mask_U, confidence_U))

    def _supervised(self, outs: dict[str, Out], batch: Batch) -> Tensor:
        config, label_B = self.config, batch.labeled.label_B
        total: Tensor = torch.zeros((), device=label_B.device)
        for name, weight in (("x", 1.0), ("x_s", config.strong_label_weight)):
            if weight:
                loss_B = cross_entropy_rows(outs[name].logits_NC, label_B)
                known_B = torch.exp(-loss_B.detach())
                counts_B = known_B < self.annealing_threshold(batch.clock.step, loss_B.dtype)
                mean = loss_B.mean() if config.signal_annealing == "none" else _mean_of_selected(loss_B, counts_B.to(loss_B.dtype))
                total = total + weight * mean
        return total

    def annealing_threshold(self, step: Tensor, dtype: torch.dtype) -> Tensor:
        """eta after ``step`` finished updates, a scalar; 1 without annealing."""
        share = step.to(dtype) / self.task.total_steps
        a = {"none": torch.ones_like(share), "linear": share, "log": 1 - torch.exp(-5 * share), "exp": torch.exp(5 * (share - 1))}
        return a[self.config.signal_annealing] * (1 - 1 / self.task.num_classes) + 1 / self.task.num_classes


def _mean_of_selected(loss: Tensor, mask: Tensor) -> Tensor:
    """Mean of the selected rows of all ranks, 0 if there is none; scaled so that the mean over ranks is that."""
    return (mask * loss).sum() * world_size() / sum_over_ranks(mask.sum()).clamp_min(1)
