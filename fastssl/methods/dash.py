"""Dash: unlabelled images whose loss is small count, and what is small shrinks as training goes on.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.functional import cross_entropy_rows, one_hot, probabilities, soft_cross_entropy_rows
from fastssl.methods.base import Forward, Method, TeacherForward, check_range
from fastssl.parallel import mean_over_ranks
from fastssl.types import Batch, Loss, PseudoLabels, Task, View, Views


class Dash(Method):
    """Dash (Xu et al., ICML 2021, arXiv:2109.00650, algorithm 1), from memory of the paper and of common code bases.

    In the first W updates only the labelled loss counts.  rho_hat is the mean labelled loss of the last E of them.  After them, in period
    k = floor((step - W) / decay_steps):

        rho = max(C gamma^-k rho_hat, rho_min)
        q_i = softmax(z(u_w,i) / T) while rho > rho_min, then the class argmax z(u_w,i); no gradient
        f_i = H(q_i, softmax(z(u_w,i)))          m_i = 1[f_i <= rho]
        L = mean CE(z(x), t) + lambda / U sum_i m_i H(q_i, softmax(z(u_s,i)))

    With hard labels and rho_min = 0.05 a row needs a confidence of exp(-0.05) = 0.951.  Rows above rho stay in the denominator U.
    All views share one forward, in the first W updates as well.  Common code bases evaluate the whole labelled set for rho_hat and train the first W
    updates on labelled batches alone; W, E, decay_steps (10 "epochs" of 1024 updates) and the switch to hard labels are theirs.

    State: ``loss_sum`` [], ``loss_count`` [] of the labelled losses that make rho_hat.
    """

    loss_sum: Tensor
    loss_count: Tensor

    @dataclass(frozen=True)
    class Config:
        warmup_steps: int = 2048  # W
        estimate_steps: int = 64  # E
        decay_steps: int = 10240
        gamma: float = 1.27
        scale: float = 1.0001  # C
        lowest: float = 0.05  # rho_min
        temperature: float = 0.5  # T
        unlabeled_weight: float = 1.0  # lambda

        def __post_init__(self) -> None:
            check_range(self, "warmup_steps", "estimate_steps", "decay_steps", "gamma", low=1)
            check_range(self, "scale", "lowest", "unlabeled_weight")
            if not self.temperature > 0:
                raise ValueError(f"temperature = {self.temperature} must be greater than 0")

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        self.register_buffer("loss_sum", torch.tensor(0.0))
        self.register_buffer("loss_count", torch.tensor(0.0))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return {"x": View("labeled", "weak"), "u_w": View("unlabeled", "weak"), "u_s": View("unlabeled", "strong")}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        x, u_w, u_s = student(v.x, v.u_w, v.u_s)
        weak_UC = u_w.logits_NC.detach()
        confidence_U, pseudo_U = probabilities(weak_UC).max(dim=1)
        sup = cross_entropy_rows(x.logits_NC, batch.labeled.label_B).mean()

        rho = self.threshold(batch.clock.step)
        hard_UC = one_hot(pseudo_U, self.task.num_classes, confidence_U.dtype)
        target_UC = torch.where(rho > config.lowest, probabilities(weak_UC, config.temperature), hard_UC)
        selected_U = (soft_cross_entropy_rows(weak_UC, target_UC) <= rho) & (batch.clock.step >= config.warmup_steps)
        mask_U = selected_U.to(confidence_U.dtype)
        unsup = config.unlabeled_weight * (mask_U * soft_cross_entropy_rows(u_s.logits_NC, target_UC)).mean()

        self.keep(sup=mean_over_ranks(sup.detach()))
        return Loss(sup + unsup, {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()}, PseudoLabels(pseudo_U, mask_U, confidence_U))

    def threshold(self, step: Tensor) -> Tensor:
        """rho of the update after ``step`` finished ones, a scalar."""
        period = ((step - self.config.warmup_steps) // self.config.decay_steps).clamp_min(0).to(self.loss_sum.dtype)
        rho = self.config.scale * self.config.gamma**-period * self.loss_sum / self.loss_count.clamp_min(1)
        return rho.clamp_min(self.config.lowest)

    def after_backward(self, batch: Batch) -> None:
        step, end = batch.clock.step, self.config.warmup_steps
        counts = ((step < end) & (step >= end - self.config.estimate_steps)).to(self.loss_sum.dtype)
        self.loss_sum.add_(counts * self.kept("sup").to(self.loss_sum.dtype))
        self.loss_count.add_(counts)
