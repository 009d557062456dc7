"""SimMatchV2: labels and similarities of weak and strong views agree as nodes and edges of a graph over labelled and unlabelled banks.

Shape letters: B labelled rows, U unlabelled rows, S strong crops, N labelled images, M length of the unlabelled bank, K classes, D embedding dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl.functional import (
    align_rows,
    cross_entropy_rows,
    edge_matching,
    last_of_same,
    probabilities,
    propagation_weights,
    similarity,
    soft_cross_entropy_rows,
    unit_rows,
)
from fastssl.methods.base import Forward, Method, TeacherForward
from fastssl.parallel import gather_rows, mean_over_ranks
from fastssl.types import Batch, HeadSpec, Loss, Out, PseudoLabels, Task, View, Views


class SimMatchV2(Method):
    """SimMatchV2 (Zheng et al., ICCV 2023, arXiv:2308.06692); the rules are the released code's.

        teacher on [x; u_w]: z', e' = projection / |projection|      student on [x; first crop], then on each further crop alone: z_k, e_k, k = 1..S
        P_i  = align(softmax(z'(u_w,i)))        divided by a moving mean da (its value before this step), rescaled to sum 1
        R_i  = softmax_j(e'(u_w,i) . u_j / t)   over the bank u of unlabelled embeddings with labels P of their time      T_k,i the same with e_k,i
        G_i: label propagation among e'(u_w,i) (node 0, label P_i) and its n nearest labelled embeddings (their one-hot labels):
              M = row softmax(nodes . nodes / t) without self-edges,  G_i = row 0 of (1-alpha) (I - alpha M)^-1 times the nodes' labels
        m_i  = 1[max P_i >= tau]                N_k,i = sum_j T_k,ij P_j
        L_nn = lambda_nn / (S U) sum_k,i m_i H(G_i, softmax(z_k,i))       node-node and edge-node consistency
        L_ee = lambda_ee / (S U) sum_k,i H(R_i, T_k,i)                    edge-edge
        L_ne = lambda_ne / (S U) sum_k,i H(P_i, N_k,i)                    node-edge; these two are not masked
        L    = mean CE(z(x), t) + L_nn + L_ee + L_ne
        da  <- 0.9 da + 0.1 mean softmax(z')    over all ranks, from 1 / K

    ``parts`` are contributions to the total: ``sup_loss``, ``unsup_loss`` (L_nn), ``edge_loss`` (L_ee), ``node_edge_loss`` (L_ne).  Evaluation: the student.
    Similarities are computed in float32 also under autocast (the released code: fp16).

    Views: ``crops`` lists sides in pixels, the first that of the recipe's views; each is drawn by the policy ``crop_<side>`` of the recipe's
    augment.extra.  Without crops there is one strong view by the recipe's strong policy.

    State: ``label_bank_ND`` (unit rows, random at first; the teacher's e'(x), the last one of an image that occurs twice) and ``label_N`` (from the split);
    ``bank_MD``, ``bank_label_MK``, ``bank_slot``: first-in-first-out over ``bank_batches`` global batches of e'(u_w) and P; ``mean_K`` = da.

    Published quirks:
      empty_labels    'zeros' (released code): the labels of the unlabelled bank start at 0; 'uniform': at 1 / K, as seems intended
      zero_nonfinite  True (released code, there for each rank by itself): a step in which L_ne or L_ee is not finite has 0, without gradient, in its place.
                      With labels that start at 0 that is the first step, and any in which some class has no score at all.
                      False: scores count at least as the smallest normal number
      mask_from       'aligned' (released code): m from P;  'propagated': m from G
      alignment       'none': P = softmax(z')
    """

    label_bank_ND: Tensor
    label_N: Tensor
    bank_MD: Tensor
    bank_label_MK: Tensor
    bank_slot: Tensor
    mean_K: Tensor

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.7  # tau
        node_weight: float = 10.0  # lambda_nn
        edge_weight: float = 10.0  # lambda_ee
        node_edge_weight: float = 10.0  # lambda_ne
        temperature: float = 0.1  # t
        propagation: float = 0.1  # alpha
        neighbours: int = 128  # n, at most the labelled images
        bank_batches: int = 256
        alignment: Literal["moving", "none"] = "moving"
        alignment_momentum: float = 0.9
        embed_dim: int = 128  # D
        crops: tuple[int, ...] = ()
        mask_from: Literal["aligned", "propagated"] = "aligned"
        zero_nonfinite: bool = True
        empty_labels: Literal["zeros", "uniform"] = "zeros"

        def __post_init__(self) -> None:
            for name in ("threshold", "node_weight", "edge_weight", "node_edge_weight"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
            for name in ("temperature", "neighbours", "bank_batches", "embed_dim"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must be greater than 0")
            if not 0 <= self.propagation < 1:
                raise ValueError(f"propagation = {self.propagation} must be in [0, 1)")
            if not 0 <= self.alignment_momentum <= 1:
                raise ValueError(f"alignment_momentum = {self.alignment_momentum} must be in [0, 1]")
            if len(set(self.crops)) != len(self.crops) or any(side < 1 for side in self.crops):
                raise ValueError(f"crops = {list(self.crops)} must be different sides in pixels, the first that of the recipe's views")
            choices = {"alignment": ("moving", "none"), "mask_from": ("aligned", "propagated"), "empty_labels": ("zeros", "uniform")}
            for name, known in choices.items():
                if getattr(self, name) not in known:
                    raise ValueError(f"{name} = {getattr(self, name)!r} must be one of {', '.join(known)}")

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        length, classes = config.bank_batches * task.unlabeled_batch, task.num_classes
        self.register_buffer("label_bank_ND", unit_rows(torch.randn(task.num_labeled, config.embed_dim)))
        self.register_buffer("label_N", torch.tensor(task.labeled_labels or [0] * task.num_labeled, dtype=torch.int64))
        self.register_buffer("bank_MD", unit_rows(torch.randn(length, config.embed_dim)))
        self.register_buffer("bank_label_MK", torch.full((length, classes), 0.0 if config.empty_labels == "zeros" else 1 / classes))
        self.register_buffer("bank_slot", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("mean_K", torch.full((classes,), 1 / classes))

    @staticmethod
    def strong_views(config: Any) -> dict[str, View]:
        """The S strong views in order, by name."""
        crops = {f"u_s{side}": View("unlabeled", f"crop_{side}", side) for side in config.crops}
        return crops or {"u_s": View("unlabeled", "strong")}

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        (first, view), *others = SimMatchV2.strong_views(config).items()
        # Student and teacher both read x: with x in the middle either joint forward is one range of rows.
        return {first: view, "x": View("labeled", "weak"), "u_w": View("unlabeled", "weak"), **dict(others)}

    @staticmethod
    def heads(config: Any, task: Task) -> dict[str, HeadSpec]:
        return {"projection": HeadSpec("mlp", {"out": config.embed_dim})}

    @staticmethod
    def needs_teacher(config: Any) -> bool:
        return True

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        if teacher is None:
            raise RuntimeError("SimMatchV2 needs a teacher forward")
        like_x, u_w = teacher(v.x, v.u_w)
        x, crops = self._student_outs(v, student)

        raw_UK, embed_UD = probabilities(u_w.logits_NC.detach()), unit_rows(u_w.heads["projection"].detach())
        prob_UK = align_rows(raw_UK, self.mean_K) if config.alignment == "moving" else raw_UK
        target_UK = self._propagate(embed_UD, prob_UK)
        confidence_U, pseudo_U = (prob_UK if config.mask_from == "aligned" else target_UK).max(dim=1)
        mask_U = (confidence_U >= config.threshold).to(confidence_U.dtype)

        edge, node_edge = self._edges(torch.stack([out.heads["projection"] for out in crops]), embed_UD, prob_UK)
        node_SU = soft_cross_entropy_rows(torch.stack([out.logits_NC for out in crops]), target_UK)
        sup = cross_entropy_rows(x.logits_NC, batch.labeled.label_B).mean()
        unsup = config.node_weight * (mask_U * node_SU).mean()
        edge, node_edge = config.edge_weight * edge, config.node_edge_weight * node_edge

        self.keep(embed_BD=unit_rows(like_x.heads["projection"]), embed_UD=embed_UD, prob_UK=prob_UK, mean_K=mean_over_ranks(raw_UK.mean(0)))
        parts = {"sup_loss": sup, "unsup_loss": unsup, "edge_loss": edge, "node_edge_loss": node_edge}
        total = sup + unsup + edge + node_edge
        return Loss(total, {name: part.detach() for name, part in parts.items()}, PseudoLabels(pseudo_U, mask_U, confidence_U))

    def _student_outs(self, v: Views, student: Forward) -> tuple[Out, list[Out]]:
        """The student's x and crops: the first crop together with x, each other one by itself."""
        first, *others = self.strong_views(self.config)
        if v[first].shape[1:] != v.x.shape[1:]:
            raise ValueError(f"crops[0] = {v[first].shape[-1]} must be the side of the recipe's views (augment.size = {v.x.shape[-1]})")
        crop, x = student(v[first], v.x)
        return x, [crop, *(student(v[name]) for name in others)]

    def _propagate(self, embed_UD: Tensor, prob_UK: Tensor) -> Tensor:
        """The propagated labels G [U, K]."""
        (rows, classes), bank_ND = prob_UK.shape, self.label_bank_ND.to(embed_UD.dtype)
        near_Un = similarity(embed_UD, bank_ND).topk(min(self.config.neighbours, len(bank_ND)), dim=1).indices
        nodes_UVD = torch.cat([embed_UD[:, None], bank_ND[near_Un]], dim=1)
        weight_UV = propagation_weights(nodes_UVD, alpha=self.config.propagation, temperature=self.config.temperature)
        cell_Un = torch.arange(rows, device=prob_UK.device)[:, None] * classes + self.label_N[near_Un]
        votes = weight_UV.new_zeros(rows * classes).index_add(0, cell_Un.flatten(), weight_UV[:, 1:].flatten())
        return weight_UV[:, :1] * prob_UK + votes.view(rows, classes)

    def _edges(self, embed_SUD: Tensor, like_UD: Tensor, prob_UK: Tensor) -> tuple[Tensor, Tensor]:
        """(L_ee, L_ne) without weights. What is not finite is replaced before it enters a graph: 0 times a gradient that is not finite would be NaN."""
        usable = _on_all_ranks(torch.isfinite(embed_SUD).all())
        if self.config.zero_nonfinite:
            embed_SUD = torch.where(usable, embed_SUD, 1.0)
        edge_SU, score_SUK = edge_matching(unit_rows(embed_SUD), like_UD, self.bank_MD, self.bank_label_MK, self.config.temperature)
        if not self.config.zero_nonfinite:
            score_SUK = score_SUK.clamp_min(torch.finfo(score_SUK.dtype).tiny)
            return edge_SU.mean(), -(prob_UK * score_SUK.log()).sum(-1).mean()
        scored = usable & _on_all_ranks((score_SUK > 0).all())
        score_SUK = torch.where(scored, score_SUK, 1.0)
        return torch.where(usable, edge_SU, 0.0).mean(), -(prob_UK * score_SUK.log()).sum(-1).mean()

    def after_backward(self, batch: Batch) -> None:
        index_B = gather_rows(batch.labeled.index_B)
        last_B = last_of_same(index_B)
        self.label_bank_ND.index_copy_(0, index_B, gather_rows(self.kept("embed_BD"))[last_B].to(self.label_bank_ND.dtype))
        self.label_N.index_copy_(0, index_B, gather_rows(batch.labeled.label_B)[last_B])
        embed_UD, prob_UK = gather_rows(self.kept("embed_UD")), gather_rows(self.kept("prob_UK"))
        slots_U = self.bank_slot + torch.arange(len(embed_UD), device=embed_UD.device)
        self.bank_MD.index_copy_(0, slots_U, embed_UD.to(self.bank_MD.dtype))
        self.bank_label_MK.index_copy_(0, slots_U, prob_UK.to(self.bank_label_MK.dtype))
        self.bank_slot.add_(len(embed_UD)).remainder_(len(self.bank_MD))
        if self.config.alignment == "moving":
            self.mean_K.lerp_(self.kept("mean_K").to(self.mean_K.dtype), 1 - self.config.alignment_momentum)


def _on_all_ranks(yes: Tensor) -> Tensor:
    """Whether a condition (bool scalar) holds on every rank."""
    return mean_over_ranks(yes.to(torch.float32)) >= 1
