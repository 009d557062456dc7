"""The Pi model: two noisy looks at an image must agree.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastssl.functional import forward_views, groups_of, labeled_views, probabilities, sigmoid_ramp, supervised
from fastssl.methods.base import Forward, Method, TeacherForward, check_range
from fastssl.types import Batch, Loss, View, Views


class PiModel(Method):
    """Pi model (Laine and Aila, ICLR 2017, arXiv:1610.02242, algorithm 1).

        p, p' = softmax of the student on two weak views of u, both with gradient
        L = mean_i CE(z(x_i), t_i) + w r(e) / (U C) sum_i sum_c (p_ic - p'_ic)^2
        r(e) = exp(-5 (1 - clip(e, 0, E) / E)^2) in finished epochs e, E = ``ramp_epochs`` = 80 (0: no ramp)

    The paper's w is 100 times the share of images with labels, 8 for 4000 of CIFAR-10's 50000, which is the default here (from memory: check it against
    the paper before quoting it).  Labelled images take part in the second term if the unlabelled stream holds them.  All views share one forward; no state.

    What published code does differently, each a field:
      sum_classes          sum over classes instead of the mean; w = 0.1, E = 10                   (Transfer-Learning-Library)
      strong_label_weight  L += a_s mean_i CE(z(x_s,i), t_i), a_s = 0.1                            (Transfer-Learning-Library)
      separate_forwards    one forward per view, in the order x, x_s, u_1, u_2                     (Transfer-Learning-Library)
    """

    @dataclass(frozen=True)
    class Config:
        unlabeled_weight: float = 8.0  # w
        ramp_epochs: int = 80  # E
        sum_classes: bool = False
        strong_label_weight: float = 0.0  # a_s
        separate_forwards: bool = False

        def __post_init__(self) -> None:
            check_range(self, "unlabeled_weight", "ramp_epochs", "strong_label_weight")

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return labeled_views(config.strong_label_weight) | {"u_1": View("unlabeled", "weak"), "u_2": View("unlabeled", "weak")}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        outs = forward_views(student, v, groups_of(list(self.views(config)), config.separate_forwards))
        sup = supervised(outs, batch.labeled.label_B, config.strong_label_weight)
        square_UC = (probabilities(outs["u_1"].logits_NC) - probabilities(outs["u_2"].logits_NC)) ** 2
        distance = square_UC.sum(1).mean() if config.sum_classes else square_UC.mean()
        unsup = config.unlabeled_weight * sigmoid_ramp(batch.clock.epoch, config.ramp_epochs, like=distance) * distance
        return Loss(sup + unsup, {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()})
