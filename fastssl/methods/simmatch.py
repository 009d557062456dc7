"""SimMatch: class probabilities and similarities to a bank of labelled embeddings correct each other, and both teach the strong view.

Shape letters: B labelled rows, U unlabelled rows, N labelled images, K classes, D embedding dimensions, L length of the alignment ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl.functional import align_rows, cross_entropy_rows, last_of_same, probabilities, soft_cross_entropy_rows, unit_rows
from fastssl.kernels import instance_matching
from fastssl.methods.base import Forward, Method, TeacherForward
from fastssl.parallel import gather_rows, mean_over_ranks
from fastssl.types import Batch, HeadSpec, Loss, Out, PseudoLabels, Task, View, Views


class SimMatch(Method):
    """SimMatch (Zheng et al., CVPR 2022, arXiv:2203.06915, sections 3.2 to 3.4).

        student on [x; u_s] (one BatchNorm batch): z, e = projection / |projection|      teacher on [x; u_w]: z', e'
        P_i  = align(softmax(z'(u_w,i)))        divided by the mean of the last L batch means (this one included), rescaled to sum 1
        W_ij = softmax_j(e'(u_w,i) . v_j / tt)  over the bank v of labelled images with labels y      S_ij = softmax_j(e(u_s,i) . v_j / st)
        Wc_ij = W_ij P_i,y(j) / sum             class probabilities unfolded to instances
        A_ik = sum_{j: y(j)=k} W_ij             instances aggregated to classes
        Pt_i = a P_i + (1-a) A_i                m_i = 1[max Pt_i >= tau]
        L_s  = mean_i CE(z(x_i), t_i)
        L_u  = lambda_u / U  sum_i m_i H(Pt_i, softmax(z(u_s,i)))         soft targets, no sharpening
        L_in = lambda_in / U  sum_i H(Wc_i, S_i)                          not masked
        L    = L_s + L_u + L_in

    In the first ``bank_epochs`` epochs, while the bank fills, Pt = P and L_in = 0 (L_u is on from the start, as in the released code).
    ``parts`` are contributions to the total (with their weights): ``sup_loss``, ``unsup_loss``, ``instance_loss``.  Evaluation: the student.

    State: ``bank_ND`` (unit rows, random at first) and ``bank_label_N``: after each step the teacher's e'(x) and t of the step's labelled rows, of all
    ranks; an image that occurs twice in a batch keeps its last embedding.  ``ring_LK`` and ``ring_slot``: batch means over all ranks for the alignment.

    Fields beyond the paper's hyper-parameters:
      alignment      'none': P = softmax(z')
      labels_known   True: bank labels are right from the start; False (released code): an image not yet visited counts as class 0
      pseudo_labels  'student': no teacher, one forward [x; u_w; u_s], bank and pseudo-labels from the student itself   (small-image settings, unverified)
      bank_momentum  m > 0: v <- unit(m v + (1-m) e')                                                                    (small-image settings, unverified)
    """

    bank_ND: Tensor
    bank_label_N: Tensor
    ring_LK: Tensor
    ring_slot: Tensor

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.7  # tau
        unlabeled_weight: float = 10.0  # lambda_u
        instance_weight: float = 5.0  # lambda_in
        student_temperature: float = 0.1  # st
        teacher_temperature: float = 0.1  # tt
        smoothing: float = 0.9  # a: share of the class probabilities in the pseudo-label
        bank_epochs: int = 1
        alignment: Literal["ring", "none"] = "ring"
        alignment_length: int = 256  # L
        embed_dim: int = 128  # D
        pseudo_labels: Literal["teacher", "student"] = "teacher"
        bank_momentum: float = 0.0
        labels_known: bool = False

        def __post_init__(self) -> None:
            for name in ("threshold", "unlabeled_weight", "instance_weight", "bank_epochs"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
            for name in ("student_temperature", "teacher_temperature", "alignment_length", "embed_dim"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must be greater than 0")
            for name in ("smoothing", "bank_momentum"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ValueError(f"{name} = {getattr(self, name)} must be in [0, 1]")
            for name, known in (("alignment", ("ring", "none")), ("pseudo_labels", ("teacher", "student"))):
                if getattr(self, name) not in known:
                    raise ValueError(f"{name} = {getattr(self, name)!r} must be one of {', '.join(known)}")

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        labels = task.labeled_labels if config.labels_known else ()
        self.register_buffer("bank_ND", unit_rows(torch.randn(task.num_labeled, config.embed_dim)))
        self.register_buffer("bank_label_N", torch.tensor(labels or [0] * task.num_labeled, dtype=torch.int64))
        self.register_buffer("ring_LK", torch.zeros(config.alignment_length, task.num_classes))
        self.register_buffer("ring_slot", torch.zeros(1, dtype=torch.int64))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        x, weak, strong = View("labeled", "weak"), View("unlabeled", "weak"), View("unlabeled", "strong")
        # Student and teacher both read x: with x in the middle either joint forward is one range of rows.
        return {"u_s": strong, "x": x, "u_w": weak} if config.pseudo_labels == "teacher" else {"x": x, "u_w": weak, "u_s": strong}

    @staticmethod
    def heads(config: Any, task: Task) -> dict[str, HeadSpec]:
        return {"projection": HeadSpec("mlp", {"out": config.embed_dim})}

    @staticmethod
    def needs_teacher(config: Any) -> bool:
        return config.pseudo_labels == "teacher"

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        x, u_s, like_x, u_w = self._outs(v, student, teacher)
        bank_is_full = batch.clock.epoch >= config.bank_epochs

        prob_UK = probabilities(u_w.logits_NC.detach())
        mean_K = mean_over_ranks(prob_UK.mean(0))
        if config.alignment == "ring":
            prob_UK = align_rows(prob_UK, self.ring_LK.index_copy(0, self.ring_slot, mean_K[None].to(self.ring_LK.dtype)).mean(0))
        instance_U, neighbours_UK = instance_matching(
            unit_rows(u_s.heads["projection"]), unit_rows(u_w.heads["projection"].detach()), self.bank_ND, self.bank_label_N, prob_UK,
            student_temperature=config.student_temperature, teacher_temperature=config.teacher_temperature,
        )  # fmt: skip
        target_UK = torch.where(bank_is_full, config.smoothing * prob_UK + (1 - config.smoothing) * neighbours_UK, prob_UK)
        confidence_U, pseudo_U = target_UK.max(dim=1)
        mask_U = (confidence_U >= config.threshold).to(confidence_U.dtype)

        sup = cross_entropy_rows(x.logits_NC, batch.labeled.label_B).mean()
        unsup = config.unlabeled_weight * (mask_U * soft_cross_entropy_rows(u_s.logits_NC, target_UK)).mean()
        instance = config.instance_weight * torch.where(bank_is_full, instance_U, 0.0).mean()

        self.keep(embed_BD=unit_rows(like_x.heads["projection"]), mean_K=mean_K)
        parts = {"sup_loss": sup.detach(), "unsup_loss": unsup.detach(), "instance_loss": instance.detach()}
        return Loss(sup + unsup + instance, parts, PseudoLabels(pseudo_U, mask_U, confidence_U))

    def _outs(self, v: Views, student: Forward, teacher: TeacherForward | None) -> tuple[Out, Out, Out, Out]:
        """The student's (x, u_s), then (x, u_w) of whoever makes bank entries and pseudo-labels."""
        if self.config.pseudo_labels == "student":
            x, u_w, u_s = student(v.x, v.u_w, v.u_s)
            return x, u_s, x, u_w
        if teacher is None:
            raise RuntimeError("pseudo_labels = 'teacher' needs a teacher forward")
        like_x, u_w = teacher(v.x, v.u_w)
        u_s, x = student(v.u_s, v.x)
        return x, u_s, like_x, u_w

    def after_backward(self, batch: Batch) -> None:
        index_B, label_B = gather_rows(batch.labeled.index_B), gather_rows(batch.labeled.label_B)
        last_B = last_of_same(index_B)
        embed_BD = gather_rows(self.kept("embed_BD"))[last_B].to(self.bank_ND.dtype)
        if self.config.bank_momentum:
            embed_BD = unit_rows(torch.lerp(embed_BD, self.bank_ND[index_B], self.config.bank_momentum))
        self.bank_ND.index_copy_(0, index_B, embed_BD)
        self.bank_label_N.index_copy_(0, index_B, label_B[last_B])
        if self.config.alignment == "ring":
            self.ring_LK.index_copy_(0, self.ring_slot, self.kept("mean_K")[None].to(self.ring_LK.dtype))
            self.ring_slot.add_(1).remainder_(len(self.ring_LK))
