"""Virtual adversarial training: predictions stay the same under the small change of the image that would change them most.

Shape letters: B labelled rows, U unlabelled rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.functional import cross_entropy_rows, probabilities, soft_cross_entropy_rows
from fastssl.methods.base import Forward, Method, TeacherForward, check_range
from fastssl.types import Batch, Draw, Loss, PseudoLabels, Task, View, Views


class VAT(Method):
    """Virtual adversarial training (Miyato et al., TPAMI 2018, arXiv:1704.03976, algorithm 1), from memory of the paper.

    With p_i = softmax(z(u_i)), taken as a constant, and KL between class distributions:

        d_i ~ N(0, I), then P times:  d_i <- gradient of KL(p_i | softmax(z(u_i + xi d_i / |d_i|))) with respect to its argument's shift
        r_i = epsilon d_i / |d_i|                                     (norms over all pixels and channels of an image, in normalised pixels)
        L = mean CE(z(x), t) + alpha / U sum_i KL(p_i | softmax(z(u_i + r_i))) + beta / U sum_i H(softmax(z(u_i)))

    The gradient of the second term reaches the network through the shifted image alone.  beta > 0 adds entropy minimisation ("VAT + EntMin").
    The labelled batch alone moves BatchNorm's running statistics (the authors' code); x, u and each shifted u are normalised as batches of their own.
    The paper sums the penalty over labelled and unlabelled images: list labelled rows in the unlabelled split for that.

    epsilon = 8 is the authors' CIFAR-10 setting with augmentation.  xi is a step of numerical differentiation.  The authors' 1e-6 is below what float32
    images resolve: the direction found is mostly rounding (tests/methods/test_vat.py compares it with float64).  The default keeps the direction in
    float32; under 16-bit autocast take about 1.
    No state.
    """

    @dataclass(frozen=True)
    class Config:
        epsilon: float = 8.0
        xi: float = 0.01
        iterations: int = 1  # P
        unlabeled_weight: float = 1.0  # alpha
        entropy_weight: float = 0.0  # beta

        def __post_init__(self) -> None:
            check_range(self, "epsilon", "iterations", "unlabeled_weight", "entropy_weight")
            if not self.xi > 0:
                raise ValueError(f"xi = {self.xi} must be greater than 0")

    @staticmethod
    def views(config: Any) -> dict[str, View]:
        return {"x": View("labeled", "weak"), "u": View("unlabeled", "weak")}

    @staticmethod
    def draws(config: Any, task: Task) -> dict[str, Draw]:
        return {"direction": Draw("normal", like="u")}

    def forward(self, v: Views, batch: Batch, student: Forward, teacher: TeacherForward | None) -> Loss:
        config = self.config
        sup = cross_entropy_rows(student(v.x).logits_NC, batch.labeled.label_B).mean()
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.entropy_weight > 0):
            clean_UC = student.untracked(v.u).logits_NC
        prob_UC = probabilities(clean_UC.detach())
        shift = self._adversary(v.u, prob_UC, batch.draws["direction"], student)
        unsup = config.unlabeled_weight * _divergence_rows(prob_UC, student.untracked(v.u + shift).logits_NC).mean()

        total, parts = sup + unsup, {"sup_loss": sup.detach(), "unsup_loss": unsup.detach()}
        if config.entropy_weight:
            entropy = config.entropy_weight * soft_cross_entropy_rows(clean_UC, probabilities(clean_UC)).mean()
            total, parts["entropy_loss"] = total + entropy, entropy.detach()
        confidence_U, pseudo_U = prob_UC.max(dim=1)
        return Loss(total, parts, PseudoLabels(pseudo_U, torch.ones_like(confidence_U), confidence_U))

    def _adversary(self, u: Tensor, prob_UC: Tensor, direction: Tensor, student: Forward) -> Tensor:
        """r, in the shape of ``u``; a row whose gradient vanishes gets 0."""
        d = _unit_images(direction.to(u.dtype))
        for _ in range(self.config.iterations):
            with torch.enable_grad():
                shift = (self.config.xi * d).requires_grad_()
                # a sum: each row's gradient is its own, up to what BatchNorm shares
                loss = _divergence_rows(prob_UC, student.untracked(u + shift).logits_NC).sum()
                (gradient,) = torch.autograd.grad(loss, shift)
            d = _unit_images(gradient)
        return self.config.epsilon * d


def _divergence_rows(prob_UC: Tensor, logits_UC: Tensor) -> Tensor:
    """KL(prob | softmax(logits)) per row, [U]; 0 log 0 = 0."""
    return torch.xlogy(prob_UC, prob_UC).sum(1) + soft_cross_entropy_rows(logits_UC, prob_UC)


def _unit_images(x: Tensor) -> Tensor:
    """Images of Euclidean length 1, at least 32 bits inside; an image of zeros stays 0. Scaled by the largest entry first: squares of tiny gradients vanish."""
    smallest = torch.finfo(x.dtype).tiny
    flat = x.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(smallest)
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(smallest)).view(x.shape)
