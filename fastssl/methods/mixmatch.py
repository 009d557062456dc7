"""MixMatch: guessed labels of unlabelled images are sharpened, and everything is mixed with everything.

Shape letters: B labelled rows, U unlabelled rows, C classes, N = (B + K U) rows of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.functional import mixup, one_hot, probabilities, sharpen, soft_cross_entropy_rows
from fastssl.methods.base import Forward, Method, TeacherForward, check_range
from fastssl.types import Batch, Draw, Loss, PseudoLabels, Task, View, Views


class MixMatch(Method):
    """MixMatch (Berthelot et al., NeurIPS 2019, arXiv:1905.02249, algorithm 1 and equations 2 to 5), from memory of the paper.

        qbar_i = 1/K sum_k softmax(z(u_k,i)), no gradient               K weak views of the same image
        q_i    = qbar_i^(1/T) / sum                                     (sharpening)
        W      = a permutation of all labelled (x, onehot t) and all K U unlabelled (u_k, q) rows
        l_n ~ Beta(a, a),  l'_n = max(l_n, 1 - l_n)
        (x', p')_n = l'_n row_n + (1 - l'_n) W_n                        for images and targets, so a mixed row lies nearer to its own
        L_x = mean over labelled rows of H(p', softmax(z(x')))
        L_u = 1 / (C K U) sum over the unlabelled rows of |p' - softmax(z(u'))|^2
        L   = L_x + lambda_u min(1, step / ramp) L_u

    Partners come from the global batch.  The K guesses are one student forward each in training mode, without gradient and without moving BatchNorm's
    running statistics (the released code's).  The mixed rows share one joint forward; ``batchnorm.groups`` = K + 1 then gives each group an equal
    share of labelled and unlabelled rows.  ``parts`` carry their weights.  No state.

    Fields beyond the paper's hyper-parameters:
      one_weight   one l for the whole batch instead of one for each row                           (several ports of the released code)
      interleave   K + 1 forwards, forward j of every (K + 1)-th row of each view from row j on; only the first moves BatchNorm's running
                   statistics, as the released code does.  Independent of the number of processes where K + 1 divides the rows of each process.
    """

    @dataclass(frozen=True)
    class Config:
        augmentations: int = 2  # K
        temperature: float = 0.5  # T
        alpha: float = 0.75  # a
        unlabeled_weight: float = 75.0  # lambda_u; CIFAR-10's
        ramp_steps: int = 16000
        one_weight: bool = False
        interleave: bool = False

        def __post_init__(self) -> None:
            check_range(self, "augmentations", low=1)
            check_range(self, "unlabeled_weight", "ramp_steps")
            for name in ("temperature", "alpha"):
                if not getattr(self, name) > 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must be greater than 0")

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return {"x": View("labeled", "weak")} | {name: View("unlabeled", "weak") for name in _guessed(config)}

    @staticmethod
    def draws(config: Any, task: Task) -> dict[str, Draw]:
        rows = task.labeled_batch + config.augmentations * task.unlabeled_batch
        return {"partner": Draw("permutation", rows), "weight": Draw("beta", 1 if config.one_weight else rows, config.alpha)}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        views = [v[name] for name in _guessed(config)]
        with torch.no_grad():
            guess_UC = torch.stack([probabilities(student.untracked(view).logits_NC) for view in views]).mean(0)
            guess_UC = sharpen(guess_UC, config.temperature)
            label_BC = one_hot(batch.labeled.label_B, self.task.num_classes, guess_UC.dtype)
            partner_N, weight_N = batch.draws["partner"], batch.draws["weight"].expand(len(batch.draws["partner"]))
            weight_N = torch.maximum(weight_N, 1 - weight_N)
            images = mixup([v.x, *views], partner_N, weight_N)
            targets = mixup([label_BC, *[guess_UC] * len(views)], partner_N, weight_N)

        logits = self._logits(images, student)
        sup = soft_cross_entropy_rows(logits[0], targets[0]).mean()
        distance = torch.stack([(target - probabilities(z)).square().mean() for target, z in zip(targets[1:], logits[1:], strict=True)]).mean()
        unsup = config.unlabeled_weight * self._ramp(batch.clock.step, distance) * distance

        confidence_U, pseudo_U = guess_UC.max(dim=1)
        parts = {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()}
        return Loss(sup + unsup, parts, PseudoLabels(pseudo_U, torch.ones_like(confidence_U), confidence_U))

    def _ramp(self, step: Tensor, like: Tensor) -> Tensor:
        return (step.to(like.dtype) / self.config.ramp_steps).clamp(max=1) if self.config.ramp_steps else torch.ones_like(like)

    def _logits(self, images: Sequence[Tensor], student: Forward) -> list[Tensor]:
        """Logits of every mixed view, in one joint forward or in interleaved ones."""
        if not self.config.interleave:
            return [out.logits_NC for out in student(*images)]
        forwards = len(images)
        outs = [(student.untracked if j else student)(*(image[j::forwards] for image in images)) for j in range(forwards)]
        logits = []
        for n, image in enumerate(images):
            row = torch.arange(len(image), device=image.device)
            place = torch.argsort(torch.cat([row[j::forwards] for j in range(forwards)]))
            logits.append(torch.cat([out[n].logits_NC for out in outs])[place])
        return logits


def _guessed(config: Any) -> list[str]:
    """Names of the K views of an unlabelled image."""
    return [f"u_{k + 1}" for k in range(config.augmentations)]
