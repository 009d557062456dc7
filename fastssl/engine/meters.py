"""What training reports: sums on the device, read by the host only at log steps.

Every figure is a sum of per-update terms held in float64 on the device; sums over ranks are taken when they are read. The sums since the last log
line are part of a checkpoint, so that a resumed run writes the very line the uninterrupted run would have written.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.parallel import world_size
from fastssl.types import Loss

NEVER = 2**62  # value of the non-finite flag while all losses were finite: larger than any step, so ranks combine it with MIN


class Meters:
    """Sums since the last log line and the sticky flag of the first non-finite update."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.first_bad_step = torch.full((), NEVER, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, loss: Loss, truth_B: Tensor | None, step: Tensor) -> None:
        """Add one update. ``truth_B`` int64 [rows of the unlabelled batch], -1 where unknown; ``step`` int64 scalar, 0-based.

        No host sync: everything stays on the device.
        """
        total = loss.total.detach()
        self.first_bad_step.copy_(torch.where(torch.isfinite(total).all(), self.first_bad_step, torch.minimum(self.first_bad_step, step)))
        self._add("updates", torch.ones((), device=self.device))
        self._add("mean/loss", total)
        for name, value in loss.parts.items():
            self._add(f"mean/{name}", value.detach())
        if loss.pseudo is not None:
            self._add_pseudo(loss.pseudo.label_B, loss.pseudo.mask_B, loss.pseudo.confidence_B, truth_B)

    def _add_pseudo(self, label_B: Tensor, mask_B: Tensor, confidence_B: Tensor | None, truth_B: Tensor | None) -> None:
        mask_B = mask_B.detach().double()
        self._add("pseudo/rows", torch.full((), float(mask_B.numel()), device=self.device))
        self._add("pseudo/mask", mask_B.sum())
        if confidence_B is not None:
            self._add("pseudo/confidence", confidence_B.detach().double().sum())
        if truth_B is not None and truth_B.shape == label_B.shape:
            known_B = (truth_B >= 0).double()
            right_B = (truth_B == label_B).double() * known_B
            self._add("pseudo/known", known_B.sum())
            self._add("pseudo/right", right_B.sum())
            self._add("pseudo/known_mask", (known_B * mask_B).sum())
            self._add("pseudo/right_mask", (right_B * mask_B).sum())

    def _add(self, name: str, value: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = torch.zeros((), dtype=torch.float64, device=self.device)
        self.sums[name] += value.double()

    def read(self) -> dict[str, float | None]:
        """Means since the last call as ``train/*`` values, then start again from zero. Waits for the device and for all ranks.

        Shares (``util_ratio``, ``confidence``) lie in 0..1, accuracies (``pseudo_acc``, ``pseudo_acc_all``) in percent; None where nothing was counted.
        """
        names = sorted(self.sums)
        if not names:
            return {}
        packed = torch.stack([self.sums[name] for name in names])
        if world_size() > 1:
            dist.all_reduce(packed)
        value = dict(zip(names, packed.tolist(), strict=True))
        for name in names:
            self.sums[name].zero_()
        line: dict[str, float | None] = {f"train/{n[5:]}": _ratio(value[n], value["updates"]) for n in names if n.startswith("mean/")}
        if "pseudo/rows" in value:
            line["train/util_ratio"] = _ratio(value["pseudo/mask"], value["pseudo/rows"])
            if "pseudo/confidence" in value:
                line["train/confidence"] = _ratio(value["pseudo/confidence"], value["pseudo/rows"])
            if "pseudo/known" in value:
                line["train/pseudo_acc"] = _ratio(100.0 * value["pseudo/right_mask"], value["pseudo/known_mask"])
                line["train/pseudo_acc_all"] = _ratio(100.0 * value["pseudo/right"], value["pseudo/known"])
        return line

    def bad_step(self) -> int | None:
        """The first update (0-based) with a non-finite loss on any rank, or None. Waits for the device and for all ranks."""
        flag = self.first_bad_step.clone()
        if world_size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        step = int(flag.item())
        return None if step == NEVER else step

    def tensors(self) -> dict[str, Tensor]:
        """This rank's sums, for a checkpoint."""
        return {name: value.detach().cpu().clone() for name, value in self.sums.items()}

    def load_tensors(self, sums: dict[str, Tensor]) -> None:
        self.sums = {name: value.to(self.device, torch.float64).clone() for name, value in sums.items()}


def _ratio(numerator: float, denominator: float) -> float | None:
    if denominator == 0 or not math.isfinite(numerator):
        return None
    return numerator / denominator
