"""Mean Teacher: the student agrees with an average of its own past.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastssl.functional import forward_views, groups_of, labeled_views, probabilities, sigmoid_ramp, supervised
from fastssl.methods.base import Forward, Method, TeacherForward, check_range
from fastssl.parallel import world_size
from fastssl.types import Batch, Loss, View, Views


class MeanTeacher(Method):
    """Mean Teacher (Tarvainen and Valpola, NeurIPS 2017, arXiv:1703.01780, equation 1).

        p = softmax(student(u_w))        q = softmax(teacher(u_t)), another weak view, no gradient
        L = mean_i CE(z(x_i), t_i) + w r(e) / (U C) sum_i sum_c (p_ic - q_ic)^2
        r(e) = exp(-5 (1 - clip(e, 0, E) / E)^2) in finished epochs e, E = ``ramp_epochs`` (0: no ramp)

    w as for the Pi model: 100 times the share of images with labels, 8 for 4000 of CIFAR-10's 50000 (from memory: check it against the paper before quoting
    it), E = 80.  How the teacher moves and in which mode it runs is the recipe's ``teacher``: the paper's is momentum_law=warmup.  The student's views share
    one forward.  No state beside the teacher.

    What published code does differently, each a field:
      sum_classes          sum over classes instead of the mean; w = 0.1, E = 10                   (Transfer-Learning-Library)
      sum_rows             sum over the unlabelled batch instead of the mean: its size enters w    (Transfer-Learning-Library)
      strong_label_weight  L += a_s mean_i CE(z(x_s,i), t_i), a_s = 0.1                            (Transfer-Learning-Library)
      separate_forwards    one student forward per view, in the order x, x_s, u_w                  (Transfer-Learning-Library)
    """

    @dataclass(frozen=True)
    class Config:
        unlabeled_weight: float = 8.0  # w
        ramp_epochs: int = 80  # E
        sum_classes: bool = False
        sum_rows: bool = False
        strong_label_weight: float = 0.0  # a_s
        separate_forwards: bool = False

        def __post_init__(self) -> None:
            check_range(self, "unlabeled_weight", "ramp_epochs", "strong_label_weight")

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return labeled_views(config.strong_label_weight) | {"u_w": View("unlabeled", "weak"), "u_t": View("unlabeled", "weak")}

    @staticmethod
    def needs_teacher(config: Any) -> bool:
        return True

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        if teacher is None:
            raise RuntimeError("Mean Teacher needs a teacher forward")
        names = [name for name in self.views(config) if name != "u_t"]
        outs = forward_views(student, v, groups_of(names, config.separate_forwards))
        sup = supervised(outs, batch.labeled.label_B, config.strong_label_weight)
        with torch.no_grad():
            target_UC = probabilities(teacher(v.u_t).logits_NC)
        square_UC = (probabilities(outs["u_w"].logits_NC) - target_UC) ** 2
        distance_U = square_UC.sum(1) if config.sum_classes else square_UC.mean(1)
        distance = distance_U.sum() * world_size() if config.sum_rows else distance_U.mean()
        unsup = config.unlabeled_weight * sigmoid_ramp(batch.clock.epoch, config.ramp_epochs, like=distance) * distance
        return Loss(sup + unsup, {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()})
