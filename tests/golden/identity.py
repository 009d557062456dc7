"""A method driven with recorded logits: the networks are the identity, so a view IS its logits and gradients are taken at the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl import methods
from fastssl.methods.base import Method
from fastssl.recipe import recipe_from_dict
from fastssl.types import Batch, ClockTensors, Loss, Out, StreamBatch, Task, Views


def build_method(name: str, options: dict[str, Any], task: Task) -> Method:
    """The method as a recipe builds it: the same register, the same Config, the same checks of its options."""
    spec = recipe_from_dict({"method": {"name": name, **options}}, []).method
    return methods.get(spec.name)(spec.config, task)


def make_task(num_classes: int, labeled_batch: int, unlabeled_batch: int, **sizes: Any) -> Task:
    """A task of the recorded sizes; what the file does not say is the smallest possible."""
    given: dict[str, Any] = {
        "num_labeled": labeled_batch,
        "num_unlabeled": unlabeled_batch,
        "labeled_class_counts": tuple([1] * num_classes),
        "total_steps": 1,
        "steps_per_epoch": 1,
    }
    return Task(num_classes=num_classes, labeled_batch=labeled_batch, unlabeled_batch=unlabeled_batch, **{**given, **sizes})


def identity(*views: Tensor) -> Any:
    """A network that answers with its input; several views are one joint forward."""
    rows = torch.cat(views)
    outs = tuple(Out(part, part) for part in rows.split([len(view) for view in views]))
    return outs[0] if len(outs) == 1 else outs


def make_batch(label_B: Tensor, unlabeled_rows: int, step: int = 0, epoch: int = 0) -> Batch:
    """Everything beside the views; rows are numbered from 0."""

    def stream(label_B: Tensor) -> StreamBatch:
        rows = torch.arange(len(label_B), device=label_B.device)
        return StreamBatch(rows, rows, rows, label_B, label_B >= 0)

    unknown = torch.full((unlabeled_rows,), -1, dtype=torch.int64, device=label_B.device)
    clock = ClockTensors(*(torch.tensor(n, device=label_B.device) for n in (step, epoch)))
    return Batch(stream(label_B), stream(unknown) if unlabeled_rows else None, clock)


def forward_backward(method: Method, logits: dict[str, Tensor], batch: Batch) -> tuple[Loss, dict[str, Tensor]]:
    """Loss and d(total)/d(logits) of every given view (zeros where no gradient arrives or the method does not read the view)."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in logits.items()}
    wanted = [name for name, view in method.views(method.config).items() if view.each_step]
    loss = method(Views({name: leaves[name] for name in wanted}), batch, identity, identity if method.needs_teacher(method.config) else None)
    loss.total.backward()
    return loss, {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
