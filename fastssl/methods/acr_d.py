"""ACR_d: ACR without anchors, the form of ACR that SimPro compares itself with.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl.functional import class_presence, log_prior, present_class_average
from fastssl.kernels import two_head_losses
from fastssl.methods.base import Forward, Method
from fastssl.parallel import gather_rows
from fastssl.types import Batch, HeadSpec, Loss, Out, PseudoLabels, Task, View, Views


class ACRd(Method):
    """ACR_d (the comparison in the code of SimPro, Du et al., ICML 2024, arXiv:2402.13505): ACR (acr.py) with a constant tau.

    Two linear heads on one network: z (standard) and b (balanced, the one that is tested). p is the labelled class distribution, A(tau) = log p^tau.

        L_x  = mean CE(z(x), y)            L_xb = mean CE(b(x) + A(tau2), y)
        P  = softmax((z(u_w) - A(tau1)) / T)     y1 = argmax P     m1 = 1[max P >= threshold]
        P2 = softmax((z(u_w) - A(tau12)) / T)    y2 = argmax P2    m2 likewise
        mt, mb: the same for the bare z(u_w) / T and b(u_w) / T
        L_u  = mean over u_s, u_s2 of [m1 or mt] CE(z, y1)         L_ub = mean of [m2 or mb] CE(b, y2)
        L    = L_x + L_u + L_xb + L_ub
    With tau1 = tau12, as published, both heads learn the same labels. Masked rows stay in the denominator; one joint forward [x; u_w; u_s; u_s2].

    ACR's estimate u of the unlabelled distribution, its divergences k and the tau that they would give are computed as in ACR and saved, but nothing
    reads them. What the released code does differently, each a field of its own:
      class_presence  'last': of the rows that b assigns to a class only the last in batch order is asked whether it counts (in u)
      class_counts    labelled counts to use for p in place of the split's. On ImageNet-127 the code renumbers the classes by size, but takes the counts in
                      the order before: p, and with it every adjustment, is assigned to other classes
    """

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.95
        temperature: float = 1.0  # T
        adaptive_exponent: float = 2.0  # tau1
        label_exponent: float = 2.0  # tau12
        balanced_exponent: float = 2.0  # tau2
        prior_momentum: float = 0.99  # m of u, per step
        estimate_after_epoch: int = 5
        class_presence: Literal["any", "last"] = "any"
        class_counts: tuple[int, ...] = ()

        def __post_init__(self) -> None:
            for name in ("threshold", "estimate_after_epoch"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
            for name in ("temperature", "adaptive_exponent", "label_exponent", "balanced_exponent"):
                if not getattr(self, name) > 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must be greater than 0")
            if not 0 <= self.prior_momentum <= 1:
                raise ValueError(f"prior_momentum = {self.prior_momentum} must lie in [0, 1]")
            if self.class_presence not in ("any", "last"):
                raise ValueError(f"class_presence = {self.class_presence!r} must be 'any' or 'last'")
            if any(count < 0 for count in self.class_counts) or (self.class_counts and not sum(self.class_counts)):
                raise ValueError(f"class_counts = {self.class_counts} must be counts, not all of them 0")

    anchors: Tensor
    unlabeled_prior: Tensor
    divergence: Tensor
    exponent: Tensor

    def __init__(self, config: Config, task: Task):
        super().__init__(config, task)
        counts = config.class_counts or task.labeled_class_counts
        if len(counts) != task.num_classes:
            raise ValueError(f"class_counts has {len(counts)} numbers, the dataset has {task.num_classes} classes: give one labelled count per class")
        labeled_C = torch.tensor(counts, dtype=torch.get_default_dtype()) / sum(counts)
        uniform_C = torch.full_like(labeled_C, 1 / task.num_classes)
        self.register_buffer("anchors", torch.stack([labeled_C, uniform_C, labeled_C.flip(0)]), persistent=False)  # known from the split
        self.register_buffer("unlabeled_prior", uniform_C.clone())  # u
        self.register_buffer("divergence", torch.zeros(3))  # k
        self.register_buffer("exponent", torch.tensor(float(config.adaptive_exponent)))  # what tau would be in ACR

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        strong = View("unlabeled", "strong")
        return {"x": View("labeled", "weak"), "u_w": View("unlabeled", "weak"), "u_s": strong, "u_s2": strong}

    @staticmethod
    def heads(config: Any, task: Task) -> dict[str, HeadSpec]:
        return {"balanced": HeadSpec("linear", {"out": task.num_classes, "init": "xavier"})}

    @staticmethod
    def predict(config: Any, out: Out) -> Tensor:
        return out.heads["balanced"]

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: Forward | None) -> Loss:
        config, labeled_C = self.config, self.anchors[0]
        outs = student(v.x, v.u_w, v.u_s, v.u_s2)
        standard, balanced = [out.logits_NC for out in outs], [out.heads["balanced"] for out in outs]
        shifts = [log_prior(labeled_C, tau) for tau in (config.adaptive_exponent, config.label_exponent, config.balanced_exponent)]
        two = two_head_losses(standard, balanced, batch.labeled.label_B, shifts, config.threshold, config.temperature)
        assert batch.unlabeled is not None
        counted_U = two.seen_mask_U & ~batch.unlabeled.is_labeled_B
        self.keep(seen=two.seen_U, counted=counted_U, label_balanced=two.label_balanced_U, mask_balanced=two.mask_balanced_U)
        terms = {"sup_loss": two.sup, "unsup_loss": two.unsup, "sup_loss_balanced": two.sup_balanced, "unsup_loss_balanced": two.unsup_balanced}
        total = two.sup + two.unsup + two.sup_balanced + two.unsup_balanced
        return Loss(total, {name: term.detach() for name, term in terms.items()}, PseudoLabels(two.label_U, two.mask_U, two.confidence_U))

    def after_backward(self, batch: Batch) -> None:
        prior_C, divergence_3 = present_class_average(self.unlabeled_prior, self.present(batch), self.anchors, self.config.prior_momentum)
        self.unlabeled_prior.copy_(prior_C)
        self.divergence.add_(divergence_3)

    def present(self, batch: Batch) -> Tensor:
        """Classes that count in the estimate of this step, bool [C]; none before the estimate begins."""
        seen, counted, last = gather_rows(self.kept("seen")), gather_rows(self.kept("counted")), self.config.class_presence == "last"
        begun = batch.clock.epoch > self.config.estimate_after_epoch
        return class_presence(seen, counted, self.task.num_classes, last_only=last) & begun

    def on_epoch_start(self, epoch: int) -> None:
        if epoch > self.config.estimate_after_epoch:
            self.exponent.copy_(self.config.adaptive_exponent * torch.softmax(self.divergence / self.task.steps_per_epoch, 0)[0])
        self.divergence.zero_()
