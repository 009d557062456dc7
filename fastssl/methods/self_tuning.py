"""Self-Tuning: pseudo labels choose the group of keys that a query is pulled to, so that a wrong one does limited harm.

Shape letters: B labelled rows, U unlabelled rows, n rows of one call, C classes, K queue places per class, D projected features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastssl.functional import confidence, cross_entropy_rows, forward_views, groups_of, last_writer, similarity, unit_rows
from fastssl.methods.base import Forward, Method, TeacherForward, check_range
from fastssl.parallel import gather_rows
from fastssl.types import Batch, HeadSpec, Loss, Out, PseudoLabels, Task, View, Views


class SelfTuning(Method):
    """Self-Tuning (Wang et al., ICML 2021, arXiv:2102.12903): pseudo group contrast (PGC).

    q and k are the L2-normalised projections of two views by student and teacher (no gradient); the queue holds K keys for each class.
    For rows with labels t, r_i = softmax over (q_i k_i, q_i Q) / T, and the positives P_i are k_i and the K keys of class t_i:

        PGC(q, k, t) = mean_i [ -log(K + 1) - 1 / (K + 1) sum_(j in P_i) log r_ij ]       (KL from the uniform distribution on the positives)
        L = mean_i CE(z(x_q,i), t_i) + w_l PGC(x_q, x_k, t) + w_u PGC(u_q, u_k, argmax z(u_q))

    No threshold.  A call compares with the queue as it was before the call, then writes its keys one after another, each over the oldest of its class;
    the unlabelled call meets the labelled keys of the same step.  ``forward`` does that on copies, ``after_backward`` writes the result.
    The teacher moves twice a step, before the labelled and before the unlabelled keys (``teacher.when=by_method``), so m acts as m^2.

    State: ``queue`` [C K, D] (class c owns rows c K to c K + K - 1; random unit vectors at the start), ``pointer`` [C] int64, next place to write.
    All values are the released code's.  Student views share one forward; so do the teacher's, after both of its moves.

    Quirks, each a field:
      separate_forwards      one forward per view: x_q, move, x_k, u_q, move, u_k                       (Transfer-Learning-Library)
      pseudo_label_forward   one more forward of u_q makes the pseudo labels: new dropout, BatchNorm statistics counted twice
                             (Transfer-Learning-Library)
    """

    moves_teacher: ClassVar[bool] = True
    queue: Tensor
    pointer: Tensor

    @dataclass(frozen=True)
    class Config:
        queue_size: int = 32  # K
        projection_dim: int = 1024  # D
        temperature: float = 0.07  # T
        labeled_group_weight: float = 1.0  # w_l
        unlabeled_group_weight: float = 1.0  # w_u
        separate_forwards: bool = False
        pseudo_label_forward: bool = False

        def __post_init__(self) -> None:
            check_range(self, "queue_size", "projection_dim", low=1)
            check_range(self, "labeled_group_weight", "unlabeled_group_weight")
            if self.temperature <= 0:
                raise ValueError(f"temperature = {self.temperature} must be greater than 0")

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        self.register_buffer("queue", unit_rows(torch.randn(task.num_classes * config.queue_size, config.projection_dim)))
        self.register_buffer("pointer", torch.zeros(task.num_classes, dtype=torch.int64))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        streams = {"x_q": "labeled", "u_q": "unlabeled", "x_k": "labeled", "u_k": "unlabeled"}
        return {name: View(stream, "strong") for name, stream in streams.items()}  # type: ignore[arg-type]

    @staticmethod
    def heads(config: Any, task: Task) -> dict[str, HeadSpec]:
        return {"projector": HeadSpec("linear", {"out": config.projection_dim})}

    @staticmethod
    def needs_teacher(config: Any) -> bool:
        return True

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config, label_B = self.config, batch.labeled.label_B
        outs = self._outs(v, student, teacher)
        unit = {name: unit_rows(out.heads["projector"]) for name, out in outs.items() if name != "pseudo"}
        sup = cross_entropy_rows(outs["x_q"].logits_NC, label_B).mean()
        confidence_U, pseudo_U = confidence(outs["pseudo"].logits_NC.detach())

        labeled = self.group_contrast(self.log_ratios(unit["x_q"], unit["x_k"], self.queue), label_B)
        queue, pointer = self.enqueued(self.queue, self.pointer, gather_rows(unit["x_k"]), gather_rows(label_B))
        unlabeled = self.group_contrast(self.log_ratios(unit["u_q"], unit["u_k"], queue), pseudo_U)
        queue, pointer = self.enqueued(queue, pointer, gather_rows(unit["u_k"]), gather_rows(pseudo_U))
        self.keep(queue=queue, pointer=pointer)

        labeled, unlabeled = config.labeled_group_weight * labeled, config.unlabeled_group_weight * unlabeled
        parts = {"sup_loss": sup.detach(), "group_loss": labeled.detach(), "unsup_loss": unlabeled.detach()}
        return Loss(sup + labeled + unlabeled, parts, PseudoLabels(pseudo_U, torch.ones_like(confidence_U), confidence_U))

    def after_backward(self, batch: Batch) -> None:
        self.queue.copy_(self.kept("queue"))
        self.pointer.copy_(self.kept("pointer"))

    def log_ratios(self, query_nD: Tensor, key_nD: Tensor, queue: Tensor) -> Tensor:
        """log r [n, 1 + C K]: the row's own key first, then the queue in its order."""
        own_n1 = (query_nD * key_nD).sum(1, keepdim=True)
        return torch.log_softmax(torch.cat([own_n1, similarity(query_nD, queue)], dim=1) / self.config.temperature, dim=1)

    def group_contrast(self, log_ratio: Tensor, label_n: Tensor) -> Tensor:
        """PGC from :meth:`log_ratios`, a scalar."""
        places = self.config.queue_size
        of_class_nCK = log_ratio[:, 1:].unflatten(1, (-1, places))
        mine_nK = of_class_nCK.gather(1, label_n[:, None, None].expand(-1, 1, places))[:, 0]
        return (-math.log(places + 1) - (log_ratio[:, 0] + mine_nK.sum(1)) / (places + 1)).mean()

    @torch.no_grad()
    def enqueued(self, queue: Tensor, pointer: Tensor, key_nD: Tensor, label_n: Tensor) -> tuple[Tensor, Tensor]:
        """Queue and pointers after the keys were written in order, each at its class's pointer, which then moves on by one (modulo K)."""
        places = self.config.queue_size
        so_far_nC = (label_n[:, None] == torch.arange(len(pointer), device=label_n.device)).cumsum(0)
        earlier_n = so_far_nC.gather(1, label_n[:, None])[:, 0] - 1  # rows of the same class before this one
        slot_n = label_n * places + (pointer[label_n] + earlier_n) % places
        # more than K keys of a class in one call meet in a place: all of them write the last one's key
        last_n = last_writer(slot_n, len(queue))
        return queue.index_copy(0, slot_n, key_nD[last_n].to(queue.dtype)), (pointer + so_far_nC[-1]) % places

    def _outs(self, v: Views, student: Forward, teacher: TeacherForward | None) -> dict[str, Out]:
        """Outs of the four views; ``pseudo`` is the one whose argmax are the pseudo labels."""
        if teacher is None:
            raise RuntimeError("Self-Tuning needs a teacher forward")
        config = self.config
        outs: dict[str, Out] = {}
        for names in groups_of(["x", "u"], config.separate_forwards):
            if config.pseudo_label_forward and "u" in names:
                outs["pseudo"] = forward_views(student, v, [["u_q"]], no_gradient=("u_q",))["u_q"]
            outs |= forward_views(student, v, [[f"{name}_q" for name in names]])
            for _ in names:
                teacher.follow()
            with torch.no_grad():
                outs |= forward_views(teacher, v, [[f"{name}_k" for name in names]])
        outs.setdefault("pseudo", outs["u_q"])
        return outs
