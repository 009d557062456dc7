"""ShrinkMatch: uncertain rows teach in a class space without the classes that they are confused with.

Shape letters: B labelled rows, U unlabelled rows, N labelled images, K classes, D embedding dimensions, L length of the alignment ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl.functional import (
    align_rows,
    cross_entropy_rows,
    last_of_same,
    probabilities,
    shrink_loss,
    soft_cross_entropy_rows,
    unit_rows,
)
from fastssl.kernels import instance_matching
from fastssl.methods.base import Forward, Method, TeacherForward
from fastssl.parallel import gather_rows, mean_over_ranks
from fastssl.types import Batch, HeadSpec, Loss, Out, PseudoLabels, Task, View, Views


class ShrinkMatch(Method):
    """ShrinkMatch (Yang et al., ICCV 2023, arXiv:2308.06777) on SimMatch (the default), or on FixMatch with distribution alignment.

        P_i  = align(softmax(z'(u_w,i)))        Pt_i = a P_i + (1-a) A_i (as in SimMatch; Pt = P without a bank)     m_i = 1[max Pt_i >= tau]
        For m_i = 0, with classes sorted by Pt_i:  c* = the first c >= 2 with  p_0 / (p_0 + sum_{k>=c} p_k) >= tau, class space S_i = {0} and c*, c*+1, ...
        l_i  = max Pt_i (logsumexp_{S_i} a(u_s,i) - a(u_s,i)_0)         a: auxiliary head; 0 for certain rows, where no c reaches tau, and for K < 3
        rho <- r rho + (1-r) mean m             mean m of the first batch at first; moved before it is used
        L_s  = mean_i CE(z(x_i), t_i)           L_u = lambda_u / U  sum_i m_i H(Pt_i, softmax(z(u_s,i)))
        L    = L_s + L_u + L_in + lambda_u rho / U  sum_i l_i           L_in: SimMatch's instance loss

    ``parts`` are contributions to the total: ``sup_loss``, ``unsup_loss``, ``instance_loss``, ``shrink_loss``.  The shrink loss is on from the start; it
    reaches the backbone.  State as in SimMatch, and rho (``ratio``), the mean prediction (``mean_K``), and whether each has begun.  Means are over all
    ranks; the released code keeps rho, and the moving mean, for each rank.

    The released code has three bases; each difference is a field:
                          ImageNet (default)  CIFAR      STL-10    SVHN
      pseudo_labels       teacher             student    student   student     student: one joint forward [x; u_w; u_s], no teacher
      bank                true                false      false     false       SimMatch's instance branch
      alignment           ring (256)          ring (32)  moving    none        moving: mean prediction with alignment_momentum, moved before use
      hard_targets        false               false      true      true        L_u with CE to argmax P instead of H(Pt, .)
      shrink_scores       aligned             aligned    raw       aligned     raw: sorted by, and c* from, softmax(z') before alignment
      aux_views           strong              strong     all       all         which rows share the auxiliary head's BatchNorm batch
      ratio_reset         false               true       false     false       true: rho starts anew in each epoch
      threshold, unlabeled_weight  0.7, 10    0.95, 1    0.95, 1   0.95, 1
      aux_hidden          512                 D / 4      D / 4     D / 4       D: the network's feature width; aux_activation leaky_relu but on ImageNet
      aux_bn_eps, aux_bn_momentum  1e-5, 0.1  1e-5, 0.1  1e-3, 0.001           a recipe's batchnorm.eps and .momentum would override them
    """

    bank_ND: Tensor
    bank_label_N: Tensor
    ring_LK: Tensor
    ring_slot: Tensor
    mean_K: Tensor
    mean_begun: Tensor
    ratio: Tensor
    ratio_begun: Tensor

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.7  # tau
        unlabeled_weight: float = 10.0  # lambda_u
        pseudo_labels: Literal["teacher", "student"] = "teacher"
        bank: bool = True
        instance_weight: float = 5.0  # lambda_in; this and the next five are read with a bank only
        student_temperature: float = 0.1  # st
        teacher_temperature: float = 0.1  # tt
        smoothing: float = 0.9  # a
        bank_epochs: int = 1
        embed_dim: int = 128  # D of the bank
        alignment: Literal["ring", "moving", "none"] = "ring"
        alignment_length: int = 256  # L
        alignment_momentum: float = 0.999
        hard_targets: bool = False
        shrink_scores: Literal["aligned", "raw"] = "aligned"
        ratio_momentum: float = 0.999  # r
        ratio_reset: bool = False
        aux_views: Literal["strong", "all"] = "strong"
        aux_hidden: int = 512
        aux_activation: Literal["relu", "leaky_relu"] = "relu"
        aux_bn_momentum: float = 0.1
        aux_bn_eps: float = 1e-5

        def __post_init__(self) -> None:
            for name in ("threshold", "unlabeled_weight", "instance_weight", "bank_epochs"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
            for name in ("student_temperature", "teacher_temperature", "alignment_length", "embed_dim", "aux_hidden", "aux_bn_eps"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must be greater than 0")
            for name in ("smoothing", "alignment_momentum", "ratio_momentum", "aux_bn_momentum"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ValueError(f"{name} = {getattr(self, name)} must be in [0, 1]")
            choices = {"pseudo_labels": ("teacher", "student"), "alignment": ("ring", "moving", "none"), "shrink_scores": ("aligned", "raw"),
                       "aux_views": ("strong", "all"), "aux_activation": ("relu", "leaky_relu")}  # fmt: skip
            for name, known in choices.items():
                if getattr(self, name) not in known:
                    raise ValueError(f"{name} = {getattr(self, name)!r} must be one of {', '.join(known)}")

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        if config.bank:
            self.register_buffer("bank_ND", unit_rows(torch.randn(task.num_labeled, config.embed_dim)))
            self.register_buffer("bank_label_N", torch.zeros(task.num_labeled, dtype=torch.int64))
        if config.alignment == "ring":
            self.register_buffer("ring_LK", torch.zeros(config.alignment_length, task.num_classes))
            self.register_buffer("ring_slot", torch.zeros(1, dtype=torch.int64))
        if config.alignment == "moving":
            self.register_buffer("mean_K", torch.zeros(task.num_classes))
            self.register_buffer("mean_begun", torch.zeros((), dtype=torch.bool))
        self.register_buffer("ratio", torch.zeros(()))
        self.register_buffer("ratio_begun", torch.zeros((), dtype=torch.bool))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        x, weak, strong = View("labeled", "weak"), View("unlabeled", "weak"), View("unlabeled", "strong")
        # Student and teacher both read x: with x in the middle either joint forward is one range of rows.
        return {"u_s": strong, "x": x, "u_w": weak} if config.pseudo_labels == "teacher" else {"x": x, "u_w": weak, "u_s": strong}

    @staticmethod
    def heads(config: Any, task: Task) -> dict[str, HeadSpec]:
        aux = {"out": task.num_classes, "hidden": [config.aux_hidden] * 2, "bn": True, "activation": config.aux_activation,
               "bn_momentum": config.aux_bn_momentum, "bn_eps": config.aux_bn_eps}  # fmt: skip
        heads = {"aux": HeadSpec("mlp", aux, on_request=True)}
        return {"projection": HeadSpec("mlp", {"out": config.embed_dim}), **heads} if config.bank else heads

    @staticmethod
    def needs_teacher(config: Any) -> bool:
        return config.pseudo_labels == "teacher"

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        x, u_s, like_x, u_w, aux_UK = self._outs(v, student, teacher)

        raw_UK = probabilities(u_w.logits_NC.detach())
        batch_mean_K = mean_over_ranks(raw_UK.mean(0))
        prob_UK = raw_UK if config.alignment == "none" else align_rows(raw_UK, self._mean_prediction(batch_mean_K))
        target_UK, instance = self._instance_branch(batch, u_s, u_w, prob_UK)
        confidence_U, pseudo_U = target_UK.max(dim=1)
        mask_U = (confidence_U >= config.threshold).to(confidence_U.dtype)

        shrink_U, _ = shrink_loss(raw_UK if config.shrink_scores == "raw" else target_UK, aux_UK, confidence_U, config.threshold)
        certain = mean_over_ranks(mask_U.mean())
        ratio = torch.where(self.ratio_begun, config.ratio_momentum * self.ratio + (1 - config.ratio_momentum) * certain, certain)

        sup = cross_entropy_rows(x.logits_NC, batch.labeled.label_B).mean()
        certain_U = cross_entropy_rows(u_s.logits_NC, pseudo_U) if config.hard_targets else soft_cross_entropy_rows(u_s.logits_NC, target_UK)
        unsup = config.unlabeled_weight * (mask_U * certain_U).mean()
        shrink = config.unlabeled_weight * ratio.to(shrink_U.dtype) * shrink_U.mean()

        self.keep(batch_mean_K=batch_mean_K, ratio=ratio, **({"embed_BD": unit_rows(like_x.heads["projection"])} if config.bank else {}))
        parts = {"sup_loss": sup, "unsup_loss": unsup, "shrink_loss": shrink, **({"instance_loss": instance} if config.bank else {})}
        return Loss(sup + unsup + instance + shrink, {name: part.detach() for name, part in parts.items()}, PseudoLabels(pseudo_U, mask_U, confidence_U))

    def _outs(self, v: Views, student: Forward, teacher: TeacherForward | None) -> tuple[Out, Out, Out, Out, Tensor]:
        """The student's (x, u_s), then (x, u_w) of whoever makes bank entries and pseudo-labels, then the auxiliary logits of u_s."""
        if self.config.pseudo_labels == "student":
            x, u_w, u_s = student(v.x, v.u_w, v.u_s)
            like_x, others = x, [x, u_w]
        else:
            if teacher is None:
                raise RuntimeError("pseudo_labels = 'teacher' needs a teacher forward")
            like_x, u_w = teacher(v.x, v.u_w)
            u_s, x = student(v.u_s, v.x)
            others = [x]
        if self.config.aux_views == "strong":
            return x, u_s, like_x, u_w, student.head("aux", u_s.feat_ND)
        return x, u_s, like_x, u_w, student.head("aux", *(out.feat_ND for out in (*others, u_s)))[-1]

    def _mean_prediction(self, batch_mean_K: Tensor) -> Tensor:
        """The mean prediction that alignment divides by, with the current batch in it."""
        if self.config.alignment == "ring":
            return self.ring_LK.index_copy(0, self.ring_slot, batch_mean_K[None].to(self.ring_LK.dtype)).mean(0)
        momentum = self.config.alignment_momentum
        return torch.where(self.mean_begun, momentum * self.mean_K + (1 - momentum) * batch_mean_K, batch_mean_K)

    def _instance_branch(self, batch: Batch, u_s: Out, u_w: Out, prob_UK: Tensor) -> tuple[Tensor, Tensor]:
        """(pseudo-label distributions [U, K], instance loss with its weight); the probabilities themselves and 0 while the bank fills or without one."""
        config = self.config
        if not config.bank:
            return prob_UK, prob_UK.new_zeros(())
        bank_is_full = batch.clock.epoch >= config.bank_epochs
        instance_U, neighbours_UK = instance_matching(
            unit_rows(u_s.heads["projection"]), unit_rows(u_w.heads["projection"].detach()), self.bank_ND, self.bank_label_N, prob_UK,
            student_temperature=config.student_temperature, teacher_temperature=config.teacher_temperature,
        )  # fmt: skip
        target_UK = torch.where(bank_is_full, config.smoothing * prob_UK + (1 - config.smoothing) * neighbours_UK, prob_UK)
        return target_UK, config.instance_weight * torch.where(bank_is_full, instance_U, 0.0).mean()

    def after_backward(self, batch: Batch) -> None:
        if self.config.bank:
            index_B, label_B = gather_rows(batch.labeled.index_B), gather_rows(batch.labeled.label_B)
            last_B = last_of_same(index_B)
            self.bank_ND.index_copy_(0, index_B, gather_rows(self.kept("embed_BD"))[last_B].to(self.bank_ND.dtype))
            self.bank_label_N.index_copy_(0, index_B, label_B[last_B])
        if self.config.alignment == "ring":
            self.ring_LK.index_copy_(0, self.ring_slot, self.kept("batch_mean_K")[None].to(self.ring_LK.dtype))
            self.ring_slot.add_(1).remainder_(len(self.ring_LK))
        if self.config.alignment == "moving":
            self.mean_K.copy_(self._mean_prediction(self.kept("batch_mean_K")))
            self.mean_begun.fill_(True)
        self.ratio.copy_(self.kept("ratio"))
        self.ratio_begun.fill_(True)

    def on_epoch_start(self, epoch: int) -> None:
        if self.config.ratio_reset:
            self.ratio_begun.fill_(False)
