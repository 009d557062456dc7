"""ReMixMatch: MixMatch with guesses aligned to the class prior, strong views anchored to the weak one, and a rotation task.

Shape letters: B labelled rows, U unlabelled rows, C classes, N = (B + (K + 1) U) rows of all ranks, L length of the alignment ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.functional import align_to, cross_entropy_rows, mixup, one_hot, probabilities, quarter_turns, sharpen, soft_cross_entropy_rows
from fastssl.methods.base import Forward, Method, TeacherForward, check_range
from fastssl.parallel import mean_over_ranks, own_rows
from fastssl.types import Batch, Draw, HeadSpec, Loss, PseudoLabels, Task, View, Views


class ReMixMatch(Method):
    """ReMixMatch (Berthelot et al., ICLR 2020, arXiv:1911.09785, algorithm 1), from memory of the paper.

        q_i = softmax(z(u_w,i)), no gradient
        q_i <- normalise(q_i prior / mean of q over the last L batches)               (distribution alignment)
        q_i <- normalise(q_i^(1/T))
        x', u' = MixUp of the rows [x; u_w; u_s1 .. u_sK] with targets [onehot t; q; q .. q], as in MixMatch: partners from the permuted global batch,
                 l' = max(l, 1 - l), l ~ Beta(a, a) for each row                      (x is a strong view: augmentation anchoring)
        L = mean H(p', softmax(z(x'))) + lambda_u r mean H(q', softmax(z(u')))
            + lambda_1 r mean H(q, softmax(z(u_s1))) + lambda_r mean CE(rotation head(u_s1 turned by t quarter turns), t)

    t is uniform in 0 .. 3 for each image.  r = min(1, step / ramp), 1 with ``ramp_steps`` = 0: the paper's equations have none, released code ramps both
    unlabelled terms.  ``prior`` are the labelled class frequencies of the split.  The ring starts uniform and is read as it stands before this batch.
    The guess is a student forward of its own, without gradient and without moving BatchNorm's running statistics; everything else, turned views
    included, shares one joint forward.  Images must be square.  ``parts`` carry their weights.

    State: ``ring_LC`` batch means of q before alignment, over all ranks, ``ring_slot``.
    """

    prior_C: Tensor
    ring_LC: Tensor
    ring_slot: Tensor

    @dataclass(frozen=True)
    class Config:
        strong_views: int = 8  # K
        temperature: float = 0.5  # T
        alpha: float = 0.75  # a
        unlabeled_weight: float = 1.5  # lambda_u
        strong_weight: float = 0.5  # lambda_1
        rotation_weight: float = 0.5  # lambda_r; 0: no rotation head
        alignment_length: int = 128  # L
        ramp_steps: int = 0

        def __post_init__(self) -> None:
            check_range(self, "strong_views", "alignment_length", low=1)
            check_range(self, "unlabeled_weight", "strong_weight", "rotation_weight", "ramp_steps")
            for name in ("temperature", "alpha"):
                if not getattr(self, name) > 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must be greater than 0")

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        counts_C = torch.tensor(task.labeled_class_counts, dtype=torch.get_default_dtype())
        self.register_buffer("prior_C", counts_C / counts_C.sum(), persistent=False)  # known from the split
        self.register_buffer("ring_LC", torch.full((config.alignment_length, task.num_classes), 1 / task.num_classes))
        self.register_buffer("ring_slot", torch.zeros(1, dtype=torch.int64))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return {"u_w": View("unlabeled", "weak"), "x": View("labeled", "strong")} | {name: View("unlabeled", "strong") for name in _strong(config)}

    @staticmethod
    def heads(config: Any, task: Task) -> dict[str, HeadSpec]:
        return {"rotation": HeadSpec("linear", {"out": 4}, on_request=True)} if config.rotation_weight else {}

    @staticmethod
    def draws(config: Any, task: Task) -> dict[str, Draw]:
        rows = task.labeled_batch + (config.strong_views + 1) * task.unlabeled_batch
        mixing = {"partner": Draw("permutation", rows), "weight": Draw("beta", rows, config.alpha)}
        return mixing | {"turn": Draw("uniform", task.unlabeled_batch)} if config.rotation_weight else mixing

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        strong = [v[name] for name in _strong(config)]
        with torch.no_grad():
            answer_UC = probabilities(student.untracked(v.u_w).logits_NC)
            guess_UC = sharpen(align_to(answer_UC, self.ring_LC.mean(0), self.prior_C), config.temperature)
            label_BC = one_hot(batch.labeled.label_B, self.task.num_classes, guess_UC.dtype)
            weight_N = torch.maximum(batch.draws["weight"], 1 - batch.draws["weight"])
            images = mixup([v.x, v.u_w, *strong], batch.draws["partner"], weight_N)
            targets = mixup([label_BC, *[guess_UC] * (1 + len(strong))], batch.draws["partner"], weight_N)
        self.keep(mean_C=mean_over_ranks(answer_UC.mean(0)))

        extra = [strong[0]]
        if config.rotation_weight:
            turn_U = (own_rows(batch.draws["turn"]) * 4).long().clamp_max(3)
            extra.append(quarter_turns(strong[0], turn_U))
        outs = student(*images, *extra)
        logits = [out.logits_NC for out in outs]

        sup = soft_cross_entropy_rows(logits[0], targets[0]).mean()
        mixed = torch.stack([soft_cross_entropy_rows(z, target) for z, target in zip(logits[1 : len(images)], targets[1:], strict=True)]).mean()
        ramp = (batch.clock.step.to(mixed.dtype) / config.ramp_steps).clamp(max=1) if config.ramp_steps else 1.0
        terms = {
            "sup_loss": sup,
            "unsup_loss": config.unlabeled_weight * ramp * mixed,
            "strong_loss": config.strong_weight * ramp * soft_cross_entropy_rows(logits[len(images)], guess_UC).mean(),
        }
        if config.rotation_weight:
            terms["rotation_loss"] = config.rotation_weight * cross_entropy_rows(student.head("rotation", outs[-1].feat_ND), turn_U).mean()
        confidence_U, pseudo_U = guess_UC.max(dim=1)
        parts = {name: term.detach() for name, term in terms.items()}
        return Loss(torch.stack(list(terms.values())).sum(), parts, PseudoLabels(pseudo_U, torch.ones_like(confidence_U), confidence_U))

    def after_backward(self, batch: Batch) -> None:
        self.ring_LC.index_copy_(0, self.ring_slot, self.kept("mean_C")[None].to(self.ring_LC.dtype))
        self.ring_slot.add_(1).remainder_(len(self.ring_LC))


def _strong(config: Any) -> list[str]:
    """Names of the K strong views of an unlabelled image."""
    return [f"u_s{k + 1}" for k in range(config.strong_views)]
