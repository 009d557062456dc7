"""A trained run as a teacher: images in, the best P classes with log-odds out; the same transform as its evaluation, head and score in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.augment import draw, render
from fastssl.engine import checkpoint
from fastssl.engine.assemble import build_evaluator, build_network_and_method, build_slot, build_task, open_data
from fastssl.engine.state import load_module
from fastssl.errors import CheckpointError, DataError
from fastssl.methods import get as get_method
from fastssl.models.ema import Teacher as Average
from fastssl.recipe import load_recipe
from fastssl.schema import Recipe
from fastssl.sources.feed import eval_batches
from fastssl.sources.manifest import Manifest
from fastssl.types import STREAM_IDS, Out

PRECISIONS = ("auto", "bf16", "no")


def log_odds(logits_NC: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """(cls int64 [N, p], score float32 [N, p]), best first: score of class c = z_c - log sum over j != c of exp z_j, from float32 logits [N, C], C > 1.

    It is a strictly growing function of the softmax probability and does not saturate: the best class is compared with the others' sum, never with 1.
    """
    logits_NC = logits_NC.float()
    top_NP, cls_NP = logits_NC.topk(p, dim=1)
    others_N1 = logits_NC.scatter(1, cls_NP[:, :1], float("-inf")).logsumexp(dim=1, keepdim=True)
    first_N1 = top_NP[:, :1] - others_N1
    log_share_NP = top_NP[:, 1:] - logits_NC.logsumexp(dim=1, keepdim=True)  # at most a half: log1p is exact
    rest_NP = log_share_NP - torch.log1p(-log_share_NP.exp())
    return cls_NP, torch.cat([first_N1, torch.minimum(rest_NP, first_N1)], dim=1)


@dataclass
class Scorer:
    """A teacher on a device, ready to score. ``identity`` says which weights see which transform; ``batch`` images at a time."""

    recipe: Recipe
    manifest: Manifest
    network: Any
    policy: Any
    identity: dict[str, Any]
    device: torch.device
    batch: int
    precision: str

    @torch.no_grad()
    def logits(self, x_NCHW: Tensor) -> Tensor:
        """float32 logits [N, C]: backbone in the precision asked for, head in float32."""
        network = self.network
        half = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with half:
            feat_ND = network.neck(network.backbone(x_NCHW))
        feat_ND = feat_ND.float()
        heads = {name: head(feat_ND) for name, head in network.heads.items() if name not in network.on_request}
        predict = partial(get_method(self.recipe.method.name).predict, self.recipe.method.config)
        return predict(Out(network.classifier(feat_ND), feat_ND, heads)).float()

    @torch.no_grad()
    def score(self, source: Any, rows_N: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray]:
        """(cls uint16 [N, p], score float32 [N, p]) of rows of a source, in order. Results leave the device once."""
        cls_NP = torch.empty(len(rows_N), p, dtype=torch.int64, device=self.device)
        score_NP = torch.empty(len(rows_N), p, dtype=torch.float32, device=self.device)
        at = 0
        for logits_BC in self._batches(source, rows_N):
            here = slice(at, min(at + len(logits_BC), len(rows_N)))
            cls, score = log_odds(logits_BC, p)
            cls_NP[here], score_NP[here] = cls[: here.stop - at], score[: here.stop - at]
            at = here.stop
        return cls_NP.cpu().numpy().astype(np.uint16), score_NP.cpu().numpy()

    def _batches(self, source: Any, rows_N: np.ndarray) -> Iterator[Tensor]:
        size, channels = self.recipe.augment.size, self.manifest.channels
        views = torch.zeros(self.batch, channels, size, size, device=self.device).to(memory_format=torch.channels_last)
        none = np.full(len(rows_N), -1, dtype=np.int64)
        for raw in eval_batches(source, rows_N, none, self.batch, device=self.device, stall_timeout_s=self.recipe.data.stall_timeout_s):
            plan = draw(
                self.policy,
                seed=self.recipe.seed,
                stream=STREAM_IDS["eval"],
                view=0,
                draw_B=raw.draw_B.clamp(min=0),
                extent_B2=raw.extent_B2,
                size_B2=raw.size_B2,
            )
            render(self.policy, plan, raw.pixels_BHWC, raw.extent_B2, views, backend=self.recipe.augment.backend)
            yield self.logits(views)

    def accuracy(self) -> float:
        """Top-1 in percent on the run's own evaluation images, measured through this very path: it must be what evaluation says."""
        split = self.recipe.data.eval_on
        data = open_data(self.recipe, torch.device("cpu"))
        evaluator = build_evaluator(self.recipe, self.manifest, data.split, split, self.manifest.channels, self.device)
        try:
            cls_NP, _ = self.score(evaluator.source, evaluator.rows_N, 1)
        finally:
            data.source.close()
            evaluator.source.close()
        return float(100.0 * (cls_NP[:, 0].astype(np.int64) == evaluator.labels_N).mean())


def load_scorer(run: str | Path, checkpoint_name: str = "last", *, device: torch.device, batch: int = 256, precision: str = "auto") -> Scorer:
    """The teacher of a run folder: the weights that its headline accuracy is about. Raises CheckpointError or DataError where that cannot be."""
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run} is no run folder: it has no config.yaml; train a teacher with `fastssl train RECIPE`")
    if precision not in PRECISIONS:
        raise DataError(f"precision {precision!r} must be one of {', '.join(PRECISIONS)}")
    if batch < 1:
        raise DataError(f"a batch of {batch} images cannot be scored; at least 1")
    recipe = load_recipe(run / "config.yaml")
    snapshot = checkpoint.load(checkpoint.find(run, checkpoint_name))
    data = open_data(recipe, torch.device("cpu"))
    data.source.close()
    start_free = replace(recipe, model=replace(recipe.model, weights="", start=""), teacher=replace(recipe.teacher, start="copy"))
    task = build_task(recipe, data)
    network, _ = build_network_and_method(start_free, data.manifest, data.manifest.channels, task, 1)
    averaged = "teacher" in snapshot.tensors and recipe.eval.headline == "ema"
    group = "teacher" if averaged else "student"
    chosen: nn.Module = network
    if averaged:
        average = Average(network, start_free.teacher, task.total_steps)
        load_module(average, snapshot.tensors[group], group)
        chosen = average.network
    else:
        load_module(network, snapshot.tensors[group], group)
    chosen.to(device).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = ("bf16" if device.type == "cuda" else "no") if precision == "auto" else precision
    a = recipe.augment
    mean, std = (list(measured if wish == "dataset" else wish) for wish, measured in ((a.mean, data.manifest.mean), (a.std, data.manifest.std)))
    identity = {
        "teacher": {
            "weights_sha256": snapshot.state["files"][f"{group}.safetensors"]["sha256"],
            "weights": group,
            "step": snapshot.state["step"],
            "model": recipe.model.name,
            "method": recipe.method.name,
        },
        "transform": {"eval": a.eval, "size": a.size, "mean": mean, "std": std, "geometry": a.geometry},
        "precision": precision,
        "batch": batch,
        "classes": list(data.manifest.classes),
    }
    policy = build_slot(recipe, "eval", data.manifest, data.manifest.channels)
    return Scorer(recipe, data.manifest, chosen, policy, identity, device, batch, precision)
