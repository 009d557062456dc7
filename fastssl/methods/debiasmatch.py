"""DebiasMatch: FixMatch without the classes that the network favours of itself.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl.functional import forward_views, groups_of, labeled_views, probabilities, supervised
from fastssl.kernels import pseudo_label_ce
from fastssl.methods.base import Forward, Method, TeacherForward, check_choice, check_range
from fastssl.parallel import mean_over_ranks
from fastssl.types import Batch, Loss, PseudoLabels, Task, View, Views


class DebiasMatch(Method):
    """DebiasMatch / DebiasPL (Wang et al., CVPR 2022, arXiv:2201.01490).

    q is a running mean of the network's answers, uniform at the start; q' is q with this batch, q' = mu q + (1 - mu) mean_i softmax(z(u_w,i)).

        h_i, p_i = argmax, max of softmax(z(u_w,i) - lambda log q), no gradient        m_i = 1[p_i >= tau]
        L = mean_i CE(z(x_i), t_i) + w / U sum_i m_i CE(z(u_s,i) + lambda log q', h_i)

    The second term is the adaptive marginal loss, with margin lambda log(1 / q'_c); no gradient goes through q.  lambda = 1 is the
    Transfer-Learning-Library's; the paper's image experiments used less.  All views share one forward.

    State: ``q`` [C].

    What published code does differently, each a field:
      pseudo_prior         'updated': pseudo labels are freed of q' instead of q                   (Transfer-Learning-Library)
      reset_each_epoch     q starts from uniform again at every epoch: with mu = 0.999 and 500 updates it gets at most 39 % of the way
                           (Transfer-Learning-Library)
      strict_threshold     m_i = 1[p_i > tau]                                                      (Transfer-Learning-Library)
      strong_label_weight  L += a_s mean_i CE(z(x_s,i), t_i), a_s = 0.1                            (Transfer-Learning-Library)
      separate_forwards    one forward per view, in the order x, x_s, u_w (no gradient), u_s       (Transfer-Learning-Library)
    """

    q: Tensor

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.95  # tau
        unlabeled_weight: float = 1.0  # w
        debias: float = 1.0  # lambda
        momentum: float = 0.999  # mu
        pseudo_prior: Literal["before", "updated"] = "before"
        reset_each_epoch: bool = False
        strict_threshold: bool = False
        strong_label_weight: float = 0.0  # a_s
        separate_forwards: bool = False

        def __post_init__(self) -> None:
            check_range(self, "threshold", "unlabeled_weight", "debias", "strong_label_weight")
            check_range(self, "momentum", high=1)
            check_choice(self, "pseudo_prior", ("before", "updated"))

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        self.register_buffer("q", torch.full((task.num_classes,), 1 / task.num_classes))

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return labeled_views(config.strong_label_weight) | {"u_w": View("unlabeled", "weak"), "u_s": View("unlabeled", "strong")}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        outs = forward_views(student, v, groups_of(list(self.views(config)), config.separate_forwards), no_gradient=("u_w",))
        sup = supervised(outs, batch.labeled.label_B, config.strong_label_weight)

        weak_UC, strong_UC = outs["u_w"].logits_NC.detach(), outs["u_s"].logits_NC
        answer_C = mean_over_ranks(probabilities(weak_UC).mean(0))
        updated_C = config.momentum * self.q + (1 - config.momentum) * answer_C
        prior_C = updated_C if config.pseudo_prior == "updated" else self.q
        pseudo = pseudo_label_ce(
            weak_UC, [strong_UC], threshold=config.threshold, strict=config.strict_threshold,
            weak_shift_C=-self._margin(prior_C), strong_shift_C=self._margin(updated_C),
        )  # fmt: skip
        unsup = config.unlabeled_weight * pseudo.loss_VU.mean()

        self.keep(q=updated_C, answer=answer_C)
        return Loss(sup + unsup, {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()}, PseudoLabels(pseudo.label_U, pseudo.mask_U, pseudo.confidence_U))

    def _margin(self, q_C: Tensor) -> Tensor:
        """lambda log q [C]; a q that has decayed below the smallest number counts as that."""
        return self.config.debias * torch.log(q_C.clamp_min(torch.finfo(q_C.dtype).tiny))

    def after_backward(self, batch: Batch) -> None:
        self.q.copy_(self.kept("q"))

    def on_epoch_start(self, epoch: int) -> None:
        if self.config.reset_each_epoch:
            self.q.fill_(1 / self.task.num_classes)
