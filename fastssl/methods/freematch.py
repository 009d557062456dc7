"""FreeMatch: the threshold follows the network's own confidence, for all classes and for each, and predictions are kept diverse.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.functional import cross_entropy_rows, one_hot, probabilities
from fastssl.methods.base import Forward, Method, TeacherForward, check_range
from fastssl.parallel import mean_over_ranks, sum_over_ranks
from fastssl.types import Batch, Loss, PseudoLabels, Task, View, Views

SMALL = 1e-12  # inside the logarithm of the fairness term


class FreeMatch(Method):
    """FreeMatch (Wang et al., ICLR 2023, arXiv:2205.07246), from memory of the paper and of the authors' code.

    With q_i = softmax(z(u_w,i)) (no gradient), Q_i = softmax(z(u_s,i)), means over the global batch, and every running value moved by this batch
    before it is used (tau, p, h start at 1 / C):

        tau <- m tau + (1 - m) mean_i max q_i                p <- m p + (1 - m) mean_i q_i
        h   <- m h + (1 - m) histogram of argmax q_i
        tau_c = p_c / max p  tau,  clipped to [lowest, highest]          m_i = 1[max q_i >= tau_(argmax q_i)]     (self-adaptive threshold)
        pbar = mean_i m_i Q_i        hbar = histogram of argmax Q_i over rows with m_i = 1
        L_f = sum_c SumNorm(p / h)_c log SumNorm(pbar / hbar)_c                                                   (self-adaptive fairness)
        L = mean CE(z(x), t) + w_u mean_i m_i CE(z(u_s,i), argmax q_i) + w_f L_f

    L_f is a negative number: minus a cross-entropy.  A class whose histogram is 0 counts with ratio 0 (the authors' code); without any selected
    row L_f is 0.  Gradients of L_f run through pbar alone.  All views share one forward.  ``parts`` carry their weights.
    The paper clips thresholds on SVHN alone, to [0.9, 0.95].

    State: ``tau`` [], ``prob_C`` (p), ``hist_C`` (h).
    """

    tau: Tensor
    prob_C: Tensor
    hist_C: Tensor

    @dataclass(frozen=True)
    class Config:
        momentum: float = 0.999  # m
        unlabeled_weight: float = 1.0  # w_u
        fairness_weight: float = 0.01  # w_f; 0.05 in some of the paper's settings
        lowest: float = 0.0
        highest: float = 1.0

        def __post_init__(self) -> None:
            check_range(self, "unlabeled_weight", "fairness_weight", "lowest")
            check_range(self, "momentum", high=1)
            check_range(self, "highest", low=self.lowest)

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        self.register_buffer("tau", torch.tensor(1 / task.num_classes))
        self.register_buffer("prob_C", torch.full((task.num_classes,), 1 / task.num_classes))
        self.register_buffer("hist_C", torch.full((task.num_classes,), 1 / task.num_classes))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return {"x": View("labeled", "weak"), "u_w": View("unlabeled", "weak"), "u_s": View("unlabeled", "strong")}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config, m = self.config, self.config.momentum
        x, u_w, u_s = student(v.x, v.u_w, v.u_s)
        weak_UC = probabilities(u_w.logits_NC.detach())
        confidence_U, pseudo_U = weak_UC.max(dim=1)

        tau = m * self.tau + (1 - m) * mean_over_ranks(confidence_U.mean())
        prob_C = m * self.prob_C + (1 - m) * mean_over_ranks(weak_UC.mean(0))
        hist_C = m * self.hist_C + (1 - m) * mean_over_ranks(one_hot(pseudo_U, self.task.num_classes, weak_UC.dtype).mean(0))
        thresholds_C = (prob_C / prob_C.max() * tau).clamp(config.lowest, config.highest)
        mask_U = (confidence_U >= thresholds_C[pseudo_U]).to(confidence_U.dtype)

        sup = cross_entropy_rows(x.logits_NC, batch.labeled.label_B).mean()
        unsup = config.unlabeled_weight * (mask_U * cross_entropy_rows(u_s.logits_NC, pseudo_U)).mean()
        fairness = config.fairness_weight * self._fairness(probabilities(u_s.logits_NC), mask_U, prob_C, hist_C)
        self.keep(tau=tau, prob_C=prob_C, hist_C=hist_C)
        parts = {"sup_loss": sup.detach(), "unsup_loss": unsup.detach(), "fairness_loss": fairness.detach()}
        return Loss(sup + unsup + fairness, parts, PseudoLabels(pseudo_U, mask_U, confidence_U))

    def _fairness(self, strong_UC: Tensor, mask_U: Tensor, prob_C: Tensor, hist_C: Tensor) -> Tensor:
        """L_f of the global batch, the same on every rank."""
        answer_UC = one_hot(strong_UC.detach().argmax(1), strong_UC.shape[1], mask_U.dtype)
        selected_C = sum_over_ranks((mask_U[:, None] * answer_UC).sum(0))
        mean_C = sum_over_ranks((mask_U[:, None] * strong_UC).sum(0))  # scale cancels
        ratio_C = mean_C * _inverse(selected_C)
        ratio_C = torch.where(selected_C.sum() > 0, ratio_C, torch.ones_like(ratio_C))
        wanted_C = prob_C * _inverse(hist_C)
        loss = (wanted_C / wanted_C.sum() * (ratio_C / ratio_C.sum() + SMALL).log()).sum()
        return torch.where(selected_C.sum() > 0, loss, torch.zeros_like(loss))

    def after_backward(self, batch: Batch) -> None:
        for name in ("tau", "prob_C", "hist_C"):
            getattr(self, name).copy_(self.kept(name))


def _inverse(x_C: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(x_C > 0, 1 / torch.where(x_C > 0, x_C, 1.0), 0.0)
