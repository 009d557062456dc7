"""DST: one head makes the pseudo labels, another learns from them, a third plays the worst case against the features.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl.functional import confidence, cross_entropy_rows, exceeds, forward_views, labeled_views, probabilities, reverse_gradient, supervised
from fastssl.methods.base import Forward, Method, TeacherForward, check_choice, check_range
from fastssl.types import Batch, HeadSpec, Loss, PseudoLabels, Task, View, Views

OFFSET = 1e-6  # keeps -log(1 - p) finite at p = 1


class DST(Method):
    """Debiased Self-Training (Chen et al., NeurIPS 2022, arXiv:2202.07136), on top of FixMatch.

    Features f; main head h (the classifier), pseudo head g, worst-case head a; R reverses gradients: R(f) = f, dR/df = -kappa.

        L_s = mean_i CE(h(x_i), t_i)
        L_u = lambda_u / U sum_i m_i CE(g(u_s,i), y_i)      y_i = argmax h(u_w,i), m_i = 1[max softmax h(u_w,i) >= tau], no gradient
        L_w = eta (eta' mean_i CE(a(R x_i), t_i) + mean_i -log min(1, 1 - softmax(a(R u_w,i))_(y_i) + 1e-6))
        L   = L_s + L_u + L_w
        kappa = low + (high - low) (2 / (1 + exp(-alpha k / K)) - 1), k = finished updates

    The main head learns from labels alone, the pseudo head from pseudo labels alone; the worst-case head is right on the labelled rows and avoids the
    pseudo label on the unlabelled ones, and the features are moved against it.  The main head is evaluated.  The two batches may have different sizes.
    x, u_w and u_s share one forward.  No state.  eta, eta', kappa and the hidden width are the released code's values.

    Quirks, each a field:
      labeled_target       'prediction': the labelled half of L_w aims at argmax h(x_i)                (Transfer-Learning-Library)
      strict_threshold     m_i = 1[max softmax h > tau]                                                (Transfer-Learning-Library)
      strong_label_weight  L_s += a_s mean_i CE(h(x_s,i), t_i), a_s = 0.1; its authors found it harmful (Transfer-Learning-Library)
      separate_forwards    three forwards: x_s; x and u_w together; u_s                                (Transfer-Learning-Library)
    """

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.95  # tau
        unlabeled_weight: float = 1.0  # lambda_u
        worst_weight: float = 1.0  # eta
        worst_label_weight: float = 2.0  # eta'
        labeled_target: Literal["label", "prediction"] = "label"
        reversal_low: float = 0.0
        reversal_high: float = 0.1
        reversal_alpha: float = 1.0
        reversal_steps: int = 1000  # K
        hidden: int = 2048
        dropout: float = 0.5
        strict_threshold: bool = False
        strong_label_weight: float = 0.0  # a_s
        separate_forwards: bool = False

        def __post_init__(self) -> None:
            check_range(self, "threshold", "unlabeled_weight", "worst_weight", "worst_label_weight", "strong_label_weight")
            check_range(self, "reversal_low", "reversal_high", "reversal_alpha")
            check_range(self, "reversal_steps", "hidden", low=1)
            check_range(self, "dropout", high=1)
            check_choice(self, "labeled_target", ("label", "prediction"))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        labeled = labeled_views(config.strong_label_weight)
        return dict(reversed(labeled.items())) | {"u_w": View("unlabeled", "weak"), "u_s": View("unlabeled", "strong")}

    @staticmethod
    def heads(config: Any, task: Task) -> dict[str, HeadSpec]:
        options: dict[str, object] = {"out": task.num_classes, "hidden": config.hidden, "dropout": config.dropout}
        return {name: HeadSpec("mlp", options, on_request=True) for name in ("pseudo", "worst")}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config, label_B = self.config, batch.labeled.label_B
        strong = ["x_s"] if config.strong_label_weight else []
        groups = [strong, ["x", "u_w"], ["u_s"]] if config.separate_forwards else [[*strong, "x", "u_w", "u_s"]]
        outs = forward_views(student, v, [group for group in groups if group])
        sup = supervised(outs, label_B, config.strong_label_weight)

        confidence_U, pseudo_U = confidence(outs["u_w"].logits_NC.detach())
        kappa = self.reversal(batch.clock.step, confidence_U.dtype)
        worst_BC, worst_UC = student.head("worst", *(reverse_gradient(outs[name].feat_ND, kappa) for name in ("x", "u_w")))
        target_B = label_B if config.labeled_target == "label" else confidence(outs["x"].logits_NC.detach())[1]
        right, avoid = self.worst_case(worst_BC, target_B, worst_UC, pseudo_U)
        worst = config.worst_weight * (config.worst_label_weight * right + avoid)

        loss_U = cross_entropy_rows(student.head("pseudo", outs["u_s"].feat_ND), pseudo_U)
        mask_U = exceeds(confidence_U, config.threshold, config.strict_threshold).to(loss_U.dtype)
        unsup = config.unlabeled_weight * (mask_U * loss_U).mean()

        parts = {"sup_loss": sup.detach(), "unsup_loss": unsup.detach(), "worst_loss": worst.detach()}
        return Loss(sup + unsup + worst, parts, PseudoLabels(pseudo_U, mask_U, confidence_U))

    def reversal(self, step: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """kappa after ``step`` finished updates; 2 / (1 + exp(-z)) - 1 as tanh(z / 2), which keeps its digits near 0."""
        config = self.config
        z = config.reversal_alpha / config.reversal_steps * step.to(dtype)
        return config.reversal_low + (config.reversal_high - config.reversal_low) * torch.tanh(z / 2)

    @staticmethod
    def worst_case(labeled_BC: Tensor, target_B: Tensor, unlabeled_UC: Tensor, avoided_U: Tensor) -> tuple[Tensor, Tensor]:
        """(mean CE on the labelled rows, mean -log min(1, 1 - p + 1e-6) with p the probability of the class to avoid); scalars."""
        p_U = probabilities(unlabeled_UC).gather(1, avoided_U[:, None])[:, 0]
        return cross_entropy_rows(labeled_BC, target_B).mean(), -torch.log((1 - p_U + OFFSET).clamp(max=1)).mean()
