"""Training steps in the form that published semi-supervised code gives them, for comparison in the same run.

Written from the methods' descriptions, in the habits of that code: views arrive as float tensors in pinned host memory, tensors are concatenated, losses and
mask rates go to Python numbers at every step for the progress bar, the rate is a Python float, the average is a loop over the state dict.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Step = Callable[[], None]
QUEUE = 128_000  # entries at most: SimMatch's bank is the labelled set, 10 % of ImageNet at its largest


def _start(run: Any, device: torch.device) -> tuple[Any, Any, Any, dict[str, Tensor]]:
    """Network, its average, torch's optimiser, and the views of one batch on the host."""
    network = run.updater.train_module.network
    average = copy.deepcopy(network).eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)
    views = {name: view.detach().cpu() for name, view in run.updater.renderer(run.raw).items()}
    if device.type == "cuda":
        views = {name: view.pin_memory() for name, view in views.items()}
    return network, average, optimizer, views


def _finish(network: Any, average: Any, optimizer: Any, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        theirs = network.state_dict()
        for name, mine in average.state_dict().items():
            if mine.dtype.is_floating_point:
                mine.mul_(0.999).add_(theirs[name].detach(), alpha=0.001)


def fixmatch(run: Any, device: torch.device) -> Step:
    network, average, optimizer, host = _start(run, device)
    meters: dict[str, list[float]] = {"loss": [], "mask": []}

    def step() -> None:
        x, u_w, u_s = (host[name].to(device, non_blocking=True) for name in ("x", "u_w", "u_s"))
        target = run.raw["labeled"].label_B
        with torch.autocast(device.type, torch.bfloat16):
            logits = network(torch.cat([x, u_w, u_s])).logits_NC
            logits_x = logits[: len(x)]
            logits_w, logits_s = logits[len(x) :].chunk(2)
            supervised = F.cross_entropy(logits_x, target)
            score, label = torch.softmax(logits_w.detach(), -1).max(-1)
            mask = score.ge(0.95).float()
            unsupervised = (F.cross_entropy(logits_s, label, reduction="none") * mask).mean()
            loss = supervised + unsupervised
        _finish(network, average, optimizer, loss)
        meters["loss"].append(loss.item())
        meters["mask"].append(mask.mean().item())

    return step


def simmatch(run: Any, device: torch.device) -> Step:
    network, average, optimizer, host = _start(run, device)
    method = run.updater.train_module.method
    classes, width = run.trainer.task.num_classes, method.config.embed_dim
    entries = min(QUEUE, max(64, run.trainer.task.num_labeled))
    bank = F.normalize(torch.randn(width, entries, device=device), dim=0)
    labels = torch.arange(entries, device=device) % classes
    head = next(iter(network.heads))
    meters: dict[str, list[float]] = {"loss": [], "mask": []}

    def step() -> None:
        x, u_w, u_s = (host[name].to(device, non_blocking=True) for name in ("x", "u_w", "u_s"))
        target = run.raw["labeled"].label_B
        with torch.autocast(device.type, torch.bfloat16):
            out = network(torch.cat([x, u_s]))
            logits_x, logits_s = out.logits_NC.split([len(x), len(u_s)])
            feat_s = F.normalize(out.heads[head][len(x) :].float(), dim=1)
            with torch.no_grad():
                seen = average(torch.cat([x, u_w]))
                feat_x, feat_w = F.normalize(seen.heads[head].float(), dim=1).split([len(x), len(u_w)])
                prob = torch.softmax(seen.logits_NC[len(x) :].float(), 1)
                weights = torch.softmax((feat_w @ bank).float() / 0.1, 1)
                spread = prob.gather(1, labels.expand(len(prob), -1))
                weights = weights * spread
                weights = weights / weights.sum(1, keepdim=True)
                votes = torch.zeros(len(prob), classes, device=device).scatter_add(1, labels.expand(len(prob), -1), weights)
                prob = prob * 0.9 + votes * 0.1
            similarity = torch.softmax((feat_s @ bank).float() / 0.1, 1)
            instance = -(weights * torch.log(similarity + 1e-7)).sum(1).mean()
            score, _ = prob.max(1)
            mask = score.ge(0.95).float()
            unsupervised = (-(prob * F.log_softmax(logits_s, 1)).sum(1) * mask).mean()
            loss = F.cross_entropy(logits_x, target) + unsupervised + instance
        _finish(network, average, optimizer, loss)
        place = run.raw["labeled"].index_B % entries
        bank[:, place] = feat_x.t().detach()
        labels[place] = target
        meters["loss"].append(loss.item())
        meters["mask"].append(mask.mean().item())

    return step


PEERS: dict[str, Callable[[Any, torch.device], Step]] = {"fixmatch": fixmatch, "simmatch": simmatch}
