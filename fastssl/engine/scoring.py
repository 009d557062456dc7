"""Accuracy of a network on rows of a dataset: deterministic, every image counted exactly once over all ranks.

Accuracies are in percent, 0..100. Counts are integers until the last division, so no number of ranks or batch size changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassStatScores

from fastssl.augment import draw, render
from fastssl.parallel import sum_over_ranks
from fastssl.sources.feed import eval_batches
from fastssl.types import STREAM_IDS, Out

PADDING = -1  # label of slots behind the end of the list; never counted


def _logits(out: Out) -> Tensor:
    return out.logits_NC


@contextmanager
def _plain_counting() -> Iterator[None]:
    """Counts are integers, so their order cannot matter; told to be deterministic, torchmetrics would compare every row with every pair of classes."""
    wish, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wish, warn_only=warns)


@dataclass
class Evaluator:
    """Evaluates networks on fixed rows. ``batch`` is images per batch over all ranks; ``policy`` renders them (no randomness expected)."""

    source: Any
    rows_N: np.ndarray
    labels_N: np.ndarray
    policy: Any
    size: int
    channels: int
    num_classes: int
    batch: int
    seed: int = 0
    backend: str = "auto"
    ahead: int = 2
    stall_timeout_s: float = 120.0
    predict: Callable[[Out], Tensor] = _logits  # which of a network's answers is scored
    replayed: Callable[[Any, Callable[[], Tensor]], Tensor] | None = None  # does a forward pass, by key, instead of simply calling it
    _views: Tensor | None = field(default=None, init=False, repr=False)

    @torch.no_grad()
    def __call__(self, networks: Mapping[str, nn.Module], accelerator: Accelerator) -> dict[str, dict[str, Any]]:
        """``networks`` by name -> {name: {top1, top5, balanced_acc, loss, per_class [K, None where a class has no image], num_images}}.

        Images are rendered once for all networks. Networks are evaluated in eval mode and returned to the mode they were in. Collective: every
        rank must call it.
        """
        device, world = accelerator.device, accelerator.num_processes
        per_rank = max(1, -(-min(self.batch, max(1, len(self.rows_N))) // world))
        scores = {name: self._scores(device) for name in networks}
        losses = {name: torch.zeros((), dtype=torch.float64, device=device) for name in networks}
        views = self._buffer(per_rank, device)
        was_training = {name: network.training for name, network in networks.items()}
        try:
            for network in networks.values():
                network.eval()
            where = {"device": device, "ahead": self.ahead, "stall_timeout_s": self.stall_timeout_s}
            for raw in eval_batches(self.source, self.rows_N, self.labels_N, per_rank, world, accelerator.process_index, **where):
                plan = draw(
                    self.policy, seed=self.seed, stream=STREAM_IDS["eval"], view=0, draw_B=raw.draw_B.clamp(min=0), extent_B2=raw.extent_B2, size_B2=raw.size_B2
                )
                render(self.policy, plan, raw.pixels_BHWC, raw.extent_B2, views, backend=self.backend)
                label_B = torch.where(raw.index_B >= 0, raw.label_B, PADDING)
                for name, network in networks.items():
                    forward = partial(self._forward, network, views, accelerator)
                    logits_BK = forward() if self.replayed is None else self.replayed((name, id(network), views.data_ptr()), forward)
                    losses[name] += F.cross_entropy(logits_BK, label_B, ignore_index=PADDING, reduction="none").double().sum()
                    with _plain_counting():
                        scores[name].update(logits_BK, label_B)
        finally:
            for name, network in networks.items():
                network.train(was_training[name])
        return {name: self._result(scores[name], losses[name]) for name in networks}

    def _buffer(self, rows: int, device: torch.device) -> Tensor:
        """Where views are rendered: one tensor for all evaluations."""
        if self._views is None or (len(self._views), self._views.device) != (rows, device):
            self._views = torch.zeros(rows, self.channels, self.size, self.size, device=device).to(memory_format=torch.channels_last)
        return self._views

    def _forward(self, network: nn.Module, views: Tensor, accelerator: Accelerator) -> Tensor:
        with accelerator.autocast():
            return self.predict(network(views)).float()

    def _scores(self, device: torch.device) -> MetricCollection:
        """Integer counts; torchmetrics sums them over ranks when they are computed."""
        k = self.num_classes
        per_class = MulticlassStatScores(k, average="none", ignore_index=PADDING, validate_args=False)
        in_top5 = MulticlassStatScores(k, average="micro", top_k=min(5, k), ignore_index=PADDING, validate_args=False)
        return MetricCollection({"per_class": per_class, "in_top5": in_top5}, compute_groups=False).to(device)

    def _result(self, scores: MetricCollection, loss: torch.Tensor) -> dict[str, Any]:
        counts = scores.compute()
        right_K, images_K = counts["per_class"][:, 0].double(), counts["per_class"][:, 4].double()
        right5 = float(counts["in_top5"][0])
        images = float(images_K.sum())
        recalls = [100.0 * r / n if n else None for r, n in zip(right_K.tolist(), images_K.tolist(), strict=True)]
        seen = [r for r in recalls if r is not None]
        return {
            "top1": 100.0 * float(right_K.sum()) / images,
            "top5": 100.0 * right5 / images,
            "balanced_acc": sum(seen) / len(seen),
            "loss": float(sum_over_ranks(loss)) / images,
            "per_class": recalls,
            "num_images": int(images),
        }


def as_line(results: Mapping[str, Mapping[str, Any]], headline: str) -> dict[str, Any]:
    """Results by weights -> one flat ``eval/*`` line; the plain names repeat the ``headline`` weights (raw if there are no such)."""
    head = results.get(headline) or results["raw"]
    line: dict[str, Any] = {f"eval/{name}": head[name] for name in ("top1", "top5", "balanced_acc", "loss", "num_images")}
    for which, result in results.items():
        line.update({f"eval/{which}/{name}": value for name, value in result.items() if name != "num_images"})
    return line
