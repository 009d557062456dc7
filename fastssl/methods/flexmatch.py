"""FlexMatch: FixMatch with one threshold per class, low for classes that are learned slowly.

Shape letters: B labelled rows, U unlabelled rows, N rows of the unlabelled set, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl.functional import exceeds, forward_views, groups_of, labeled_views, last_writer, supervised
from fastssl.kernels import pseudo_label_ce
from fastssl.methods.base import Forward, Method, TeacherForward, check_choice, check_range
from fastssl.parallel import gather_rows
from fastssl.types import Batch, Loss, PseudoLabels, Task, View, Views


class FlexMatch(Method):
    """FlexMatch (Zhang et al., NeurIPS 2021, arXiv:2110.08263): curriculum pseudo labels.

    Every unlabelled image has a status: the last class it was given with confidence above tau, or "none".  With n_c images of status c and
    n_none without one, before this batch counts:

        beta_c = n_c / max(max_c n_c, n_none)         T_c = tau M(beta_c)        M(b) = b / (2 - b)
        h_i, p_i = argmax, max of softmax(z(u_w,i)), no gradient                 m_i = 1[p_i >= T_(h_i)]
        L = mean_i CE(z(x_i), t_i) + lambda_u / U sum_i m_i CE(z(u_s,i), h_i)

    then status(i) <- h_i for every i with p_i >= tau (the fixed tau); an image that is twice in a batch keeps the later one.
    At the start every threshold is 0, so every image counts.  A class that nobody has been given keeps threshold 0.

    State: ``status`` [N] (-1 = none), ``counts`` [C + 1] (its histogram, "none" last, kept up to date row by row), ``beta`` [C] (of the last step).
    Views go through the student in one joint forward.  The comparisons are the released code's (>=).

    Quirks, each a field:
      warmup               False: n_none is left out of the denominator                            (Transfer-Learning-Library)
      one_value            when one status fills the whole set: 'formula' applies it, 'zero' sets beta = 0 for all classes
                           (Transfer-Learning-Library), 'keep' leaves beta as it was               (TorchSSL)
      mapping              M: 'convex' b / (2 - b), 'linear' b, 'concave' ln(1 + b) / ln 2          (the paper's ablation)
      strict_threshold     both comparisons are >                                                  (Transfer-Learning-Library)
      strong_label_weight  L += a_s mean_i CE(z(x_s,i), t_i), a_s = 0.1                             (Transfer-Learning-Library)
      separate_forwards    one forward per view, in the order x, x_s, u_w (no gradient), u_s       (Transfer-Learning-Library)
    """

    status: Tensor
    counts: Tensor
    beta: Tensor

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.95  # tau
        unlabeled_weight: float = 1.0  # lambda_u
        warmup: bool = True
        one_value: Literal["formula", "zero", "keep"] = "formula"
        mapping: Literal["convex", "linear", "concave"] = "convex"
        strict_threshold: bool = False
        strong_label_weight: float = 0.0  # a_s
        separate_forwards: bool = False

        def __post_init__(self) -> None:
            check_range(self, "threshold", "unlabeled_weight", "strong_label_weight")
            check_choice(self, "one_value", ("formula", "zero", "keep"))
            check_choice(self, "mapping", ("convex", "linear", "concave"))

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        counts = torch.zeros(task.num_classes + 1, dtype=torch.int64)
        counts[-1] = task.num_unlabeled
        self.register_buffer("status", torch.full((task.num_unlabeled,), -1))
        self.register_buffer("counts", counts)
        self.register_buffer("beta", torch.zeros(task.num_classes))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return labeled_views(config.strong_label_weight) | {"u_w": View("unlabeled", "weak"), "u_s": View("unlabeled", "strong")}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        outs = forward_views(student, v, groups_of(list(self.views(config)), config.separate_forwards), no_gradient=("u_w",))
        sup = supervised(outs, batch.labeled.label_B, config.strong_label_weight)

        weak_UC = outs["u_w"].logits_NC
        beta_C = self.learning_status(torch.promote_types(weak_UC.dtype, torch.float32))
        pseudo = pseudo_label_ce(weak_UC, [outs["u_s"].logits_NC], threshold=self.thresholds(beta_C), strict=config.strict_threshold)
        unsup = config.unlabeled_weight * pseudo.loss_VU.mean()

        self.keep(beta_C=beta_C, pseudo_U=pseudo.label_U, sure_U=exceeds(pseudo.confidence_U, config.threshold, config.strict_threshold))
        return Loss(sup + unsup, {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()}, PseudoLabels(pseudo.label_U, pseudo.mask_U, pseudo.confidence_U))

    def learning_status(self, dtype: torch.dtype) -> Tensor:
        """beta [C] of the statuses as they stand."""
        seen_C, none = self.counts[:-1], self.counts[-1]
        most = torch.maximum(seen_C.max(), none) if self.config.warmup else seen_C.max()
        beta_C = seen_C.to(dtype) / most.clamp_min(1).to(dtype)
        if self.config.one_value == "formula":
            return beta_C
        instead_C = self.beta.to(dtype) if self.config.one_value == "keep" else torch.zeros_like(beta_C)
        return torch.where(self.counts.max() == self.task.num_unlabeled, instead_C, beta_C)

    def thresholds(self, beta_C: Tensor) -> Tensor:
        """T [C]."""
        mapped = {"convex": beta_C / (2 - beta_C), "linear": beta_C, "concave": torch.log1p(beta_C) / math.log(2)}
        return self.config.threshold * mapped[self.config.mapping]

    @torch.no_grad()
    def after_backward(self, batch: Batch) -> None:
        assert batch.unlabeled is not None
        self.beta.copy_(self.kept("beta_C"))
        rows = torch.stack([batch.unlabeled.index_B, self.kept("pseudo_U"), self.kept("sure_U").long()], dim=1)
        index_M, label_M, sure_M = gather_rows(rows).unbind(1)  # M rows of all ranks
        winner_M = last_writer(index_M, len(self.status), sure_M > 0)
        old_M = self.status[index_M]
        new_M = torch.where(winner_M >= 0, label_M[winner_M.clamp_min(0)], old_M)
        # a repeated image moves in the histogram once, at its last confident row
        moves_M = winner_M == torch.arange(len(winner_M), device=winner_M.device)
        self.counts.add_(self._histogram(new_M, moves_M) - self._histogram(old_M, moves_M))
        self.status.index_copy_(0, index_M, new_M)  # repeats write the same class

    def _histogram(self, status_M: Tensor, weight_M: Tensor) -> Tensor:
        """int64 [C + 1]; -1 counts in the last place."""
        places = torch.arange(len(self.counts), device=status_M.device)
        return ((status_M.remainder(len(self.counts))[:, None] == places) & weight_M[:, None]).sum(0)
