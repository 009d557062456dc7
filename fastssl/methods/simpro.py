"""SimPro: the class distribution of the unlabelled data is estimated with the pseudo-labels, by expectation maximisation.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl.functional import cross_entropy_rows, log_prior, one_hot
from fastssl.kernels import pseudo_label_ce
from fastssl.methods.base import Forward, Method
from fastssl.parallel import sum_over_ranks
from fastssl.types import Batch, Loss, PseudoLabels, Task, View, Views


class SimPro(Method):
    """SimPro (Du et al., ICML 2024, arXiv:2402.13505).

    phi is the class distribution of the unlabelled data (from the uniform one), pi that of the training mixture (from the labelled counts).

        E  q_i = softmax(z(u_w,i) + log phi^tau), no gradient       m_i = 1[max q_i >= threshold]
        M  L_x = 1/r  mean over x, x_s of CE(z + log pi^tau, y)      r = (M/U) / (N/B), lists over batches
           L_u = mean over u_s, u_s2 of m_i CE(z + log pi^tau, q_i)  rows below the threshold stay in the denominator
           L   = L_x + L_u
        once an epoch, with K the labels drawn in it and D = sum of m_i q_i:
           phi <- m phi + (1-m) D / sum D            (unchanged if nothing passed)
           pi  <- m pi  + (1-m) (K + D) / sum(K + D)

    The pseudo-labels q are soft. All views go through the student in one joint forward [x; x_s; u_w; u_s; u_s2] (one BatchNorm batch). Tests score the
    bare logits z: the balanced classifier. State: phi, pi, D, K, all global over ranks and saved (the released code forgets them on resume).

    The defaults of ``prior_exponent``, of the views and of ``ratio`` are the released code's, as is taking pi and phi from an epoch's confident rows:
    the derivation has tau = 1, one labelled view, alpha = mu N/M and all rows. In the published settings r is about 1 to 4. With
    few labels it is large (100 labels, 60 000 images, B = 32, U = 96: r = 208) and the labelled loss next to nothing; ``ratio`` = one leaves r out (ours).

    What published code does differently from the paper for certain:
      unnormalized_prior  D / (sum D + 1) for D / sum D: phi sums to a little less than one, and shrinks in an epoch without a confident row
    """

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.95
        prior_exponent: float = 2.0  # tau; released: 2 for CIFAR-10 and STL-10, 1 elsewhere (there with threshold 0.2)
        prior_momentum: float = 0.9  # m, per epoch
        unnormalized_prior: bool = False
        labeled_strong_view: bool = True  # x_s
        strong_views: int = 2  # 2: u_s and u_s2; 1: u_s
        ratio: Literal["loaders", "exact", "one"] = "loaders"  # r. loaders: M/U and N/B rounded down, as long as neither becomes 0; one: r = 1

        def __post_init__(self) -> None:
            if self.threshold < 0:
                raise ValueError(f"threshold = {self.threshold} must not be negative")
            if not self.prior_exponent > 0:
                raise ValueError(f"prior_exponent = {self.prior_exponent} must be greater than 0")
            if not 0 <= self.prior_momentum <= 1:
                raise ValueError(f"prior_momentum = {self.prior_momentum} must lie in [0, 1]")
            if self.strong_views not in (1, 2):
                raise ValueError(f"strong_views = {self.strong_views} must be 1 or 2")
            if self.ratio not in ("loaders", "exact", "one"):
                raise ValueError(f"ratio = {self.ratio!r} must be 'loaders', 'exact' or 'one'")

    unlabeled_prior: Tensor
    mixture_prior: Tensor
    unlabeled_mass: Tensor
    labeled_count: Tensor

    def __init__(self, config: Config, task: Task):
        super().__init__(config, task)
        counts_C = torch.tensor(task.labeled_class_counts, dtype=torch.get_default_dtype())
        self.register_buffer("unlabeled_prior", torch.full_like(counts_C, 1 / task.num_classes))  # phi
        self.register_buffer("mixture_prior", counts_C / counts_C.sum())  # pi
        self.register_buffer("unlabeled_mass", torch.zeros_like(counts_C))  # D
        self.register_buffer("labeled_count", torch.zeros_like(counts_C))  # K

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        labeled = {"x": View("labeled", "weak")} | ({"x_s": View("labeled", "strong")} if config.labeled_strong_view else {})
        strong = {name: View("unlabeled", "strong") for name in ("u_s", "u_s2")[: config.strong_views]}
        return labeled | {"u_w": View("unlabeled", "weak")} | strong

    @staticmethod
    def ratio(config: Any, task: Task) -> float:
        """r: how many times more batches the unlabelled list has than the labelled one."""
        unlabeled, labeled = task.num_unlabeled // task.unlabeled_batch, task.num_labeled // task.labeled_batch
        if config.ratio == "one":
            return 1.0
        if config.ratio == "loaders" and unlabeled and labeled:
            return unlabeled / labeled
        return (task.num_unlabeled / task.unlabeled_batch) / (task.num_labeled / task.labeled_batch)

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: Forward | None) -> Loss:
        config, label_B = self.config, batch.labeled.label_B
        names = list(self.views(config))
        logits = {name: out.logits_NC for name, out in zip(names, student(*(v[name] for name in names)), strict=True)}

        # The priors move at the end of an epoch only, so these are the same at each of its steps.
        adjust_C = log_prior(self.mixture_prior, config.prior_exponent)
        labeled, strong = ([name for name in names if name in group] for group in (("x", "x_s"), ("u_s", "u_s2")))
        pseudo = pseudo_label_ce(
            logits["u_w"], [logits[name] for name in strong], threshold=config.threshold, soft=True,
            weak_shift_C=log_prior(self.unlabeled_prior, config.prior_exponent), strong_shift_C=adjust_C,
        )  # fmt: skip
        assert pseudo.target_UC is not None
        self.keep(posterior=pseudo.target_UC, mask=pseudo.mask_U)
        sup_rows = torch.stack([cross_entropy_rows(logits[name] + adjust_C, label_B) for name in labeled])
        sup, unsup = sup_rows.mean() / self.ratio(config, self.task), pseudo.loss_VU.mean()

        parts = {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()}
        return Loss(sup + unsup, parts, PseudoLabels(pseudo.label_U, pseudo.mask_U, pseudo.confidence_U))

    def after_backward(self, batch: Batch) -> None:
        mass_C = (self.kept("mask")[:, None] * self.kept("posterior")).sum(0)
        drawn_C = one_hot(batch.labeled.label_B, self.task.num_classes, mass_C.dtype).sum(0)
        sums_2C = sum_over_ranks(torch.stack([drawn_C, mass_C]))
        self.labeled_count.add_(sums_2C[0])
        self.unlabeled_mass.add_(sums_2C[1])

    def on_epoch_start(self, epoch: int) -> None:
        self.labeled_count.zero_()
        self.unlabeled_mass.zero_()

    def on_epoch_end(self, epoch: int) -> None:
        unlabeled_C, mixture_C = self.estimates()
        m = self.config.prior_momentum
        self.unlabeled_prior.copy_(m * self.unlabeled_prior + (1 - m) * unlabeled_C)
        self.mixture_prior.copy_(m * self.mixture_prior + (1 - m) * mixture_C)

    def estimates(self) -> tuple[Tensor, Tensor]:
        """(phi, pi) as the rows of this epoch so far say, [C] each."""
        mass_C, both_C = self.unlabeled_mass, self.labeled_count + self.unlabeled_mass
        total = mass_C.sum()
        if self.config.unnormalized_prior:
            unlabeled_C = mass_C / (total + 1)
        else:
            some = total > 0
            unlabeled_C = torch.where(some, mass_C / torch.where(some, total, 1.0), self.unlabeled_prior)
        return unlabeled_C, both_C / both_C.sum()
