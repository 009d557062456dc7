"""Empirical risk minimisation: the supervised baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastssl.functional import cross_entropy_rows
from fastssl.methods.base import Forward, Method
from fastssl.types import Batch, Loss, View, Views


class ERM(Method):
    """Supervised training on the labelled images alone.

        L = CE(x_w, t) + a_s CE(x_s, t)

    CE is the mean over the labelled batch.  Each view is a forward of its own (its own BatchNorm batch), weak first, as in the
    Transfer-Learning-Library, whose recipes set a_s = 0.1.  With a_s = 0 the strong view is neither rendered nor forwarded.
    """

    needs_unlabeled: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Config:
        strong_weight: float = 0.0  # a_s: weight of the strongly augmented labelled view

        def __post_init__(self) -> None:
            if self.strong_weight < 0:
                raise ValueError(f"strong_weight = {self.strong_weight} must not be negative")

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        weak = {"x": View("labeled", "weak")}
        return weak | {"x_s": View("labeled", "strong")} if config.strong_weight else weak

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: Forward | None) -> Loss:
        label_B, a_s = batch.labeled.label_B, self.config.strong_weight
        total = cross_entropy_rows(student(v.x).logits_NC, label_B).mean()
        if a_s:
            total = total + a_s * cross_entropy_rows(student(v.x_s).logits_NC, label_B).mean()
        return Loss(total, {"sup_loss": total.detach()})
