"""CoMatch: class probabilities are smoothed by neighbours in embedding space, and a graph of agreeing pseudo-labels shapes that space in turn.

Shape letters: B labelled rows, U unlabelled rows of one rank, V unlabelled rows of all ranks, C classes, D embedding dimensions,
Q batches in the memory, M labelled and unlabelled rows of one global batch, L length of the alignment ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.functional import align_rows, cross_entropy_rows, one_hot, probabilities, relation, similarity, soft_cross_entropy_rows, unit_rows
from fastssl.methods.base import Forward, Method, TeacherForward, check_range
from fastssl.parallel import gather_rows, gather_rows_with_gradient, mean_over_ranks, rank
from fastssl.types import Batch, HeadSpec, Loss, PseudoLabels, Task, View, Views


class CoMatch(Method):
    """CoMatch (Li et al., ICCV 2021, arXiv:2011.11183), from memory of the paper and of the authors' CIFAR-10 code.

    e(v) is the projection of a view, scaled to length 1; p, q and everything of the weak views are constants.

        p_i  = normalise(softmax(z(u_w,i)) / mean of its batch means over the last L batches, this one included)        (distribution alignment)
        a_ij = softmax_j(e(u_w,i) . e_j / t)  over the memory (e_j, p_j)
        q_i  = alpha p_i + (1 - alpha) sum_j a_ij p_j                     once the memory is full, before that q = p    (memory smoothing)
        m_i  = 1[max q_i >= tau]
        Wq_ij = 1 if i = j;  q_i . q_j if that is >= T;  else 0           over the V unlabelled rows of the global batch, rows rescaled to sum 1
        Wz_ij = softmax_j(e(u_s,i) . e(u_s2,j) / t)
        L = mean CE(z(x), t) + lambda_u / V sum_i m_i H(q_i, softmax(z(u_s,i))) + lambda_c / V sum_i H(Wq_i, Wz_i)

    The off-diagonal of Wz compares the first strong view with the second (the authors' code).  All views share one forward.
    ``parts`` carry their weights: ``sup_loss``, ``unsup_loss``, ``graph_loss``.

    State: ``memory_QMD`` and ``memory_prob_QMC``, of each of the last Q global batches its e(u_w) with p (before smoothing) and its e(x) with
    onehot t; ``memory_steps`` [1], batches ever written;  ``ring_LC``, batch means for the alignment.
    """

    memory_QMD: Tensor
    memory_prob_QMC: Tensor
    memory_steps: Tensor
    ring_LC: Tensor

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.95  # tau
        unlabeled_weight: float = 1.0  # lambda_u
        graph_weight: float = 1.0  # lambda_c
        temperature: float = 0.2  # t
        graph_threshold: float = 0.8  # T
        smoothing: float = 0.9  # alpha
        memory_batches: int = 5  # Q
        embed_dim: int = 64  # D
        alignment_length: int = 32  # L

        def __post_init__(self) -> None:
            check_range(self, "threshold", "unlabeled_weight", "graph_weight", "graph_threshold")
            check_range(self, "smoothing", high=1)
            check_range(self, "memory_batches", "embed_dim", "alignment_length", low=1)
            if not self.temperature > 0:
                raise ValueError(f"temperature = {self.temperature} must be greater than 0")

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        places = (config.memory_batches, task.unlabeled_batch + task.labeled_batch)
        self.register_buffer("memory_QMD", torch.zeros(*places, config.embed_dim))
        self.register_buffer("memory_prob_QMC", torch.zeros(*places, task.num_classes))
        self.register_buffer("memory_steps", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("ring_LC", torch.zeros(config.alignment_length, task.num_classes))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        unlabeled = {name: View("unlabeled", policy) for name, policy in (("u_w", "weak"), ("u_s", "strong"), ("u_s2", "strong"))}
        return {"x": View("labeled", "weak"), **unlabeled}

    @staticmethod
    def heads(config: Any, task: Task) -> dict[str, HeadSpec]:
        return {"projection": HeadSpec("mlp", {"out": config.embed_dim, "activation": "leaky_relu"})}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        x, u_w, u_s, u_s2 = student(v.x, v.u_w, v.u_s, v.u_s2)
        like_x_BD, weak_UD = (unit_rows(out.heads["projection"].detach()) for out in (x, u_w))

        prob_UC = probabilities(u_w.logits_NC.detach())
        mean_C = mean_over_ranks(prob_UC.mean(0))
        ring_LC = self.ring_LC.index_copy(0, self.memory_steps % len(self.ring_LC), mean_C[None].to(self.ring_LC.dtype))
        prob_UC = align_rows(prob_UC, ring_LC.mean(0))
        target_UC = torch.where(self.memory_steps >= config.memory_batches, self._smoothed(prob_UC, weak_UD), prob_UC)
        confidence_U, pseudo_U = target_UC.max(dim=1)
        mask_U = (confidence_U >= config.threshold).to(confidence_U.dtype)

        sup = cross_entropy_rows(x.logits_NC, batch.labeled.label_B).mean()
        unsup = config.unlabeled_weight * (mask_U * soft_cross_entropy_rows(u_s.logits_NC, target_UC)).mean()
        first_UD, second_VD = unit_rows(u_s.heads["projection"]), gather_rows_with_gradient(unit_rows(u_s2.heads["projection"]))
        graph = -config.graph_weight * (self._graph(target_UC) * relation(first_UD, second_VD, config.temperature)).sum(1).mean()

        label_BC = one_hot(batch.labeled.label_B, self.task.num_classes, prob_UC.dtype)
        self.keep(ring_LC=ring_LC, weak_UD=weak_UD, like_x_BD=like_x_BD, prob_UC=prob_UC, label_BC=label_BC)
        parts = {"sup_loss": sup.detach(), "unsup_loss": unsup.detach(), "graph_loss": graph.detach()}
        return Loss(sup + unsup + graph, parts, PseudoLabels(pseudo_U, mask_U, confidence_U))

    def _smoothed(self, prob_UC: Tensor, weak_UD: Tensor) -> Tensor:
        """alpha p + (1 - alpha) the memory's vote."""
        share_UN = relation(weak_UD, self.memory_QMD.flatten(0, 1), self.config.temperature).exp()
        vote_UC = similarity(share_UN, self.memory_prob_QMC.flatten(0, 1).T)
        return self.config.smoothing * prob_UC + (1 - self.config.smoothing) * vote_UC

    def _graph(self, target_UC: Tensor) -> Tensor:
        """Wq, this rank's rows [U, V]."""
        every_VC = gather_rows(target_UC)
        agree_UV = similarity(target_UC, every_VC)
        place_V = torch.arange(len(every_VC), device=every_VC.device)
        own_UV = place_V[: len(target_UC), None] + rank() * len(target_UC) == place_V
        weight_UV = torch.where(own_UV, 1.0, torch.where(agree_UV >= self.config.graph_threshold, agree_UV, 0.0))
        return weight_UV / weight_UV.sum(1, keepdim=True)

    def after_backward(self, batch: Batch) -> None:
        place = self.memory_steps % len(self.memory_QMD)
        for memory, names in ((self.memory_QMD, ("weak_UD", "like_x_BD")), (self.memory_prob_QMC, ("prob_UC", "label_BC"))):
            rows = torch.cat([gather_rows(self.kept(name)) for name in names])
            memory.index_copy_(0, place, rows[None].to(memory.dtype))
        self.ring_LC.copy_(self.kept("ring_LC"))
        self.memory_steps.add_(1)
