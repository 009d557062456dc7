"""AdaMatch: FixMatch whose threshold and class distribution follow what the network says of labelled images.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.functional import align_to, cross_entropy_rows, one_hot, probabilities, soft_cross_entropy_rows
from fastssl.methods.base import Forward, Method, TeacherForward, check_range
from fastssl.parallel import mean_over_ranks, own_rows
from fastssl.types import Batch, Draw, Loss, PseudoLabels, Task, View, Views


class AdaMatch(Method):
    """AdaMatch (Berthelot et al., ICLR 2022, arXiv:2106.04732, section 3), from memory of the paper.

        z'(x), z'(x_s), z(u_w), z(u_s)  from one joint forward          z''(x), z''(x_s)  from a forward of the labelled views alone
        z(x) = l z'(x) + (1 - l) z''(x),  l uniform in [0, 1) for each row, view and class                  (random logit interpolation)
        E_x = mean softmax(z(x)),  E_u = mean softmax(z(u_w)), over the global batch
        q_i = normalise(softmax(z(u_w,i)) E_x / E_u), no gradient                                          (distribution alignment)
        c = tau mean_i max softmax(z(x_i))           m_i = 1[max q_i >= c]                                 (relative confidence threshold)
        L = mean CE(z(x), t) + mean CE(z(x_s), t) + w mu mean_i m_i H(q_i, softmax(z(u_s,i)))
        mu = 1/2 - cos(min(pi, 2 pi step / total steps)) / 2                                               (1 from half of training on)

    Only the joint forward moves BatchNorm's running statistics.  ``parts`` carry their weights.

    State: ``labeled_C`` and ``unlabeled_C``, E_x and E_u of the last step (with a momentum: their running means).

    Fields beyond the paper's hyper-parameters:
      interpolate         False: the joint forward alone
      alignment_momentum  a > 0: E <- a E + (1 - a) batch mean, from uniform, with this batch        (0.999 in common code bases)
      hard_labels         H against the class argmax q_i instead of q_i                              (common code bases)
    """

    labeled_C: Tensor
    unlabeled_C: Tensor

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.9  # tau
        unlabeled_weight: float = 1.0  # w
        interpolate: bool = True
        alignment_momentum: float = 0.0  # a
        hard_labels: bool = False

        def __post_init__(self) -> None:
            check_range(self, "threshold", "unlabeled_weight")
            check_range(self, "alignment_momentum", high=1)

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        self.register_buffer("labeled_C", torch.full((task.num_classes,), 1 / task.num_classes))
        self.register_buffer("unlabeled_C", torch.full((task.num_classes,), 1 / task.num_classes))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        labeled = {"x": View("labeled", "weak"), "x_s": View("labeled", "strong")}
        return labeled | {"u_w": View("unlabeled", "weak"), "u_s": View("unlabeled", "strong")}

    @staticmethod
    def draws(config: Any, task: Task) -> dict[str, Draw]:
        return {"mix": Draw("uniform", task.labeled_batch * 2 * task.num_classes)} if config.interpolate else {}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config, label_B = self.config, batch.labeled.label_B
        outs = student(v.x, v.x_s, v.u_w, v.u_s)
        x_BC, x_s_BC, u_w_UC, u_s_UC = (out.logits_NC for out in outs)
        if config.interpolate:
            wide = torch.promote_types(x_BC.dtype, torch.float32)
            alone_B2C = torch.stack([out.logits_NC.to(wide) for out in student.untracked(v.x, v.x_s)], dim=1)
            mix_B2C = own_rows(batch.draws["mix"].view(self.task.labeled_batch, 2, -1)).to(wide)
            x_BC, x_s_BC = torch.lerp(alone_B2C, torch.stack([x_BC, x_s_BC], dim=1).to(wide), mix_B2C).unbind(1)

        prob_BC, prob_UC = probabilities(x_BC.detach()), probabilities(u_w_UC.detach())
        labeled_C, unlabeled_C = (self._moved(old, prob) for old, prob in ((self.labeled_C, prob_BC), (self.unlabeled_C, prob_UC)))
        target_UC = align_to(prob_UC, unlabeled_C, labeled_C)
        confidence_U, pseudo_U = target_UC.max(dim=1)
        threshold = config.threshold * mean_over_ranks(prob_BC.amax(1).mean())
        mask_U = (confidence_U >= threshold).to(confidence_U.dtype)
        if config.hard_labels:
            target_UC = one_hot(pseudo_U, self.task.num_classes, target_UC.dtype)

        sup = cross_entropy_rows(x_BC, label_B).mean() + cross_entropy_rows(x_s_BC, label_B).mean()
        warm = 0.5 - torch.cos((batch.clock.step.to(sup.dtype) * (2 * math.pi / self.task.total_steps)).clamp(max=math.pi)) / 2
        unsup = config.unlabeled_weight * warm * (mask_U * soft_cross_entropy_rows(u_s_UC, target_UC)).mean()
        self.keep(labeled_C=labeled_C, unlabeled_C=unlabeled_C)
        return Loss(sup + unsup, {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()}, PseudoLabels(pseudo_U, mask_U, confidence_U))

    def _moved(self, old_C: Tensor, prob_NC: Tensor) -> Tensor:
        share = self.config.alignment_momentum
        return share * old_C + (1 - share) * mean_over_ranks(prob_NC.mean(0))

    def after_backward(self, batch: Batch) -> None:
        self.labeled_C.copy_(self.kept("labeled_C"))
        self.unlabeled_C.copy_(self.kept("unlabeled_C"))
