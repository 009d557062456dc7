"""SoftMatch: every pseudo-label counts, with a weight that falls off below the usual confidence like one side of a Gaussian.

Shape letters: B labelled rows, U unlabelled rows of one rank, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl.functional import align_rows, cross_entropy_rows, probabilities
from fastssl.methods.base import Forward, Method, TeacherForward, check_choice, check_range
from fastssl.parallel import mean_over_ranks, sum_over_ranks, world_size
from fastssl.types import Batch, Loss, PseudoLabels, Task, View, Views


class SoftMatch(Method):
    """SoftMatch (Chen et al., ICLR 2023, arXiv:2301.10921), from memory of the paper and of the authors' code.

    With q_i = softmax(z(u_w,i)), no gradient, means and variance over the n rows of the global batch, and every running value moved by this batch
    before it is used (p starts at 1 / C, mu at 1 / C, var at 1):

        p <- m p + (1 - m) mean_i q_i           a_i = normalise(q_i (1/C) / p)                                      (uniform alignment)
        mu <- m mu + (1 - m) mean_i max a_i     var <- m var + (1 - m) sum_i (max a_i - batch mean)^2 / (n - 1)
        w_i = exp(-min(max a_i - mu, 0)^2 / (2 var / s^2))
        L = mean CE(z(x), t) + lambda / U sum_i w_i CE(z(u_s,i), argmax q_i)

    The alignment changes weights only, not labels.  s = 2 is the authors' code (``n_sigma``); s = 1 is the Gaussian as it stands in the paper.
    With n = 1 the batch's variance is 0.  All views share one forward.  The weights are reported as the mask: its mean is the share of used labels.

    State: ``prob_C`` (p), ``mean`` [] (mu), ``variance`` [] (var).

    Fields beyond the paper's hyper-parameters:
      alignment   'none': a = q
    """

    prob_C: Tensor
    mean: Tensor
    variance: Tensor

    @dataclass(frozen=True)
    class Config:
        momentum: float = 0.999  # m
        unlabeled_weight: float = 1.0  # lambda
        sigmas: float = 2.0  # s
        alignment: Literal["uniform", "none"] = "uniform"

        def __post_init__(self) -> None:
            check_range(self, "unlabeled_weight", "sigmas")
            check_range(self, "momentum", high=1)
            check_choice(self, "alignment", ("uniform", "none"))

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        self.register_buffer("prob_C", torch.full((task.num_classes,), 1 / task.num_classes))
        self.register_buffer("mean", torch.tensor(1 / task.num_classes))
        self.register_buffer("variance", torch.tensor(1.0))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return {"x": View("labeled", "weak"), "u_w": View("unlabeled", "weak"), "u_s": View("unlabeled", "strong")}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config, m = self.config, self.config.momentum
        x, u_w, u_s = student(v.x, v.u_w, v.u_s)
        prob_UC = probabilities(u_w.logits_NC.detach())
        confidence_U, pseudo_U = prob_UC.max(dim=1)

        prob_C = m * self.prob_C + (1 - m) * mean_over_ranks(prob_UC.mean(0))
        sure_U = align_rows(prob_UC, prob_C).amax(1) if config.alignment == "uniform" else confidence_U
        batch_mean = mean_over_ranks(sure_U.mean())
        rows = len(sure_U) * world_size()
        batch_variance = sum_over_ranks((sure_U - batch_mean).square().sum()) / max(rows - 1, 1)
        mean = m * self.mean + (1 - m) * batch_mean
        variance = m * self.variance + (1 - m) * batch_variance
        weight_U = gaussian_weight(sure_U, mean, variance, config.sigmas)

        sup = cross_entropy_rows(x.logits_NC, batch.labeled.label_B).mean()
        unsup = config.unlabeled_weight * (weight_U * cross_entropy_rows(u_s.logits_NC, pseudo_U)).mean()
        self.keep(prob_C=prob_C, mean=mean, variance=variance)
        return Loss(sup + unsup, {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()}, PseudoLabels(pseudo_U, weight_U, confidence_U))

    def after_backward(self, batch: Batch) -> None:
        for name in ("prob_C", "mean", "variance"):
            getattr(self, name).copy_(self.kept(name))


def gaussian_weight(confidence_U: Tensor, mean: Tensor, variance: Tensor, sigmas: float) -> Tensor:
    """1 from ``mean`` on, below it exp(-(confidence - mean)^2 sigmas^2 / (2 variance)); a variance of 0 counts as the smallest number."""
    below_U = (confidence_U - mean).clamp(max=0)
    return torch.exp(-(below_U.square() * (sigmas**2 / 2) / variance.clamp_min(torch.finfo(variance.dtype).tiny)))
