"""Noisy Student: a new student learns from the frozen soft answers of the one before.

Shape letters: B labelled rows, U unlabelled rows, N rows of the unlabelled set, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.functional import confidence, forward_views, groups_of, labeled_views, probabilities, soft_cross_entropy_rows, supervised
from fastssl.methods.base import Forward, Method, Predict, TeacherForward, check_range
from fastssl.types import Batch, Loss, PseudoLabels, Task, View, Views


class NoisyStudent(Method):
    """Noisy Student (Xie et al., CVPR 2020, arXiv:1911.04252): one round of it.

        Z_i = teacher's logits on one weak view of u_i, once before training, without noise (evaluation mode)
        L   = mean_i CE(z(x_i), t_i) - w / U sum_i sum_c softmax(Z_i / T)_c log softmax(z(u_s,i) / T)_c

    The teacher is the checkpoint of the round before (``teacher.start``); it never moves.  Round 0 is plain ERM.  Every unlabelled image counts: filtering
    and balancing, as the paper has them, is a matter of which images the unlabelled split holds.  No factor T^2.  The student's views share one forward.

    State: ``table`` [N, C], the teacher's logits by position in the unlabelled set; filled by ``prepare``.

    What published code does differently, each a field:
      temperature          T = 2, 0.5 in its script                                                (Transfer-Learning-Library)
      strong_label_weight  L += a_s mean_i CE(z(x_s,i), t_i), a_s = 0.1                            (Transfer-Learning-Library)
      separate_forwards    one forward per view, in the order x, x_s, u_s                          (Transfer-Learning-Library)
    """

    table: Tensor

    @dataclass(frozen=True)
    class Config:
        unlabeled_weight: float = 1.0  # w
        temperature: float = 1.0  # T
        strong_label_weight: float = 0.0  # a_s
        separate_forwards: bool = False

        def __post_init__(self) -> None:
            check_range(self, "unlabeled_weight", "strong_label_weight")
            if self.temperature <= 0:
                raise ValueError(f"temperature = {self.temperature} must be greater than 0")

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        self.register_buffer("table", torch.zeros(task.num_unlabeled, task.num_classes))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        labeled = labeled_views(config.strong_label_weight)
        return labeled | {"u_s": View("unlabeled", "strong"), "u_w": View("unlabeled", "weak", each_step=False)}

    @torch.no_grad()
    def prepare(self, predict: Predict) -> None:
        rows = len(self.table)
        table = self.table.new_zeros(rows + 1, self.table.shape[1])  # padding, index -1, goes to the row too many
        for index_B, out in predict("u_w"):
            table.index_copy_(0, index_B.remainder(rows + 1), out.logits_NC.to(table.dtype))
        self.table.copy_(table[:rows])

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        assert batch.unlabeled is not None
        names = [name for name, view in self.views(config).items() if view.each_step]
        outs = forward_views(student, v, groups_of(names, config.separate_forwards))
        sup = supervised(outs, batch.labeled.label_B, config.strong_label_weight)
        answer_UC = self.table[batch.unlabeled.index_B]
        loss_U = soft_cross_entropy_rows(outs["u_s"].logits_NC, probabilities(answer_UC, config.temperature), config.temperature)
        unsup = config.unlabeled_weight * loss_U.mean()
        confidence_U, pseudo_U = confidence(answer_UC)
        pseudo = PseudoLabels(pseudo_U, torch.ones_like(confidence_U), confidence_U)
        return Loss(sup + unsup, {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()}, pseudo)
