"""The oracle: supervised training with the labels of all images, the ceiling of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastssl.functional import forward_views, groups_of, labeled_views, supervised
from fastssl.methods.base import Forward, Method, check_range
from fastssl.types import Batch, Loss, View, Views


class Oracle(Method):
    """ERM on every row of the split, labelled and unlabelled, each with its true label (the Transfer-Learning-Library's oracle).

        L = CE(x_w, t) + a_s CE(x_s, t)

    No semi-supervised result: what the labels that were held back would have given.
    """

    needs_unlabeled: ClassVar[bool] = False
    labeled_rows: ClassVar[Literal["split", "all"]] = "all"

    @dataclass(frozen=True)
    class Config:
        strong_weight: float = 0.0  # a_s: weight of the strongly augmented view

        def __post_init__(self) -> None:
            check_range(self, "strong_weight")

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return labeled_views(config.strong_weight)

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: Forward | None) -> Loss:
        outs = forward_views(student, v, groups_of(list(self.views(self.config)), separate=True))
        total = supervised(outs, batch.labeled.label_B, self.config.strong_weight)
        return Loss(total, {"sup_loss": total.detach()})
