"""Empirical risk minimisation: the supervised baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastssl.functional import forward_views, groups_of, labeled_views, supervised
from fastssl.methods.base import Forward, Method, check_range
from fastssl.types import Batch, Loss, View, Views


class ERM(Method):
    """Supervised training on the labelled images alone.

        L = CE(x_w, t) + a_s CE(x_s, t)

    CE is the mean over the labelled batch.  Each view is a forward of its own (its own BatchNorm batch), weak first, as in the
    Transfer-Learning-Library, whose recipes set a_s = 0.1.  With a_s = 0 the strong view is neither rendered nor forwarded.
    ``head_only`` freezes the backbone in evaluation mode and trains what stands on its features: a linear probe where that is the classifier alone;
    a neck, if the model has one (it starts from random weights), is trained with it.
    """

    needs_unlabeled: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Config:
        strong_weight: float = 0.0  # a_s: weight of the strongly augmented labelled view
        head_only: bool = False

        def __post_init__(self) -> None:
            check_range(self, "strong_weight")

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return labeled_views(config.strong_weight)

    @staticmethod
    def frozen(config: Any) -> tuple[str, ...]:
        return (r"^backbone\.",) if config.head_only else ()

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: Forward | None) -> Loss:
        outs = forward_views(student, v, groups_of(list(self.views(self.config)), separate=True))
        total = supervised(outs, batch.labeled.label_B, self.config.strong_weight)
        return Loss(total, {"sup_loss": total.detach()})
