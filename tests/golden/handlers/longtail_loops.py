"""SimPro, ACR and ACR_d as whole training loops: a tiny network, optimiser, schedule and averaged weights driven through our updater."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.engine.clock import Clock, LearningRate
from fastssl.engine.draws import MethodDraws
from fastssl.engine.meters import Meters
from fastssl.engine.optim import build_optimizer
from fastssl.engine.step import TrainModule, Updater
from fastssl.functional import log_prior
from fastssl.methods.base import Method
from fastssl.models.ema import Teacher
from fastssl.schema import OptimConfig, ScheduleConfig, TeacherConfig
from fastssl.types import Loss, Out, RawBatch, Views
from tests.golden.handlers.longtail import ACR_VIEWS, LABELED_DUPLICATE, SIMPRO_VIEWS, Stacks, batches, check, epochs, task_of
from tests.golden.identity import build_method
from tests.golden.recorder import Recorder

PARAMETERS = 1e-5  # absolute, documented beside the files
RATES = 1e-9
PUBLISHED_NO_DECAY = ["bias", r"(^|\.)bn\d*\."]


class TinyNetwork(nn.Module):
    """BatchNorm, then linear heads side by side: the recorded network with its published names."""

    def __init__(self, width: int, classes: int, bn_momentum: float, second_head: bool):
        super().__init__()
        self.bn1 = nn.BatchNorm1d(width, momentum=bn_momentum)
        self.fc = nn.Linear(width, classes)
        self.fc1 = nn.Linear(width, classes) if second_head else None

    def forward(self, x_ND: Tensor) -> Out:
        feat = self.bn1(x_ND)
        return Out(self.fc(feat), feat, {} if self.fc1 is None else {"balanced": self.fc1(feat)})


def _train(
    rec: Recorder, method: Method, views: dict[str, Tensor], raws: Callable[[int], dict[str, RawBatch]], seen: Callable[[Loss], None], after: Callable[[], None]
) -> None:
    """Drive our updater over the recorded views and check weights, averaged weights and rates after every step.

    ``seen`` is called after each step, ``after`` after each epoch's end.
    """
    total, lr = rec.hp("hp_total_steps"), rec.hp("hp_lr")
    second_head = "init_fc1.weight" in rec.arrays
    network = TinyNetwork(rec.hp("hp_D"), rec.hp("hp_C"), rec.hp("hp_bn_momentum"), second_head).to(rec.device)
    network.load_state_dict({name.removeprefix("init_"): rec.input(name) for name in rec.names("init_") if name.removeprefix("init_") in network.state_dict()})
    optim = OptimConfig(lr=lr, momentum=rec.hp("hp_momentum"), nesterov=True, weight_decay=rec.hp("hp_wd"), no_decay=PUBLISHED_NO_DECAY)
    teacher = Teacher(network, TeacherConfig(momentum=rec.hp("hp_ema_decay"), buffers="copy"), total)
    now: dict[str, int] = {}
    device = torch.device(rec.device)
    module = TrainModule(network, method).train()
    updater = Updater(
        accelerator=SimpleNamespace(scaler=None, backward=lambda loss: loss.backward()),  # type: ignore[arg-type]
        module=module,
        train_module=module,
        optimizer=build_optimizer(network, optim, torch.tensor(lr, device=device)),
        learning_rate=LearningRate(ScheduleConfig("cosine_7_16"), lr, total, rec.hp("hp_steps_per_epoch")),
        clock=Clock(rec.hp("hp_steps_per_epoch"), device),
        renderer=lambda raw: Views({name: x[now["t"]] for name, x in views.items()}),  # type: ignore[arg-type]
        meters=Meters(device),
        teacher=teacher,
        teacher_when="after_step",
        teacher_forward=None,
        draws=MethodDraws(method.draws(method.config, method.task), method.views(method.config), seed=0, device=device),
        clip_norm=0.0,
    )
    out: Stacks = defaultdict(list)

    def step(t: int, epoch: int) -> None:
        now["t"] = t
        loss = updater(raws(t), t)
        out["lr"].append(updater.learning_rate(t))
        for prefix, source in (("param", network), ("ema", teacher.network)):
            for name, value in source.state_dict().items():
                out[f"{prefix}_{name}"].append(value.clone())
        seen(loss)

    def end(epoch: int) -> None:
        method.on_epoch_end(epoch)
        after()

    epochs(rec, method, step, end)
    for name, values in out.items():
        stack = np.stack([np.asarray(value.cpu() if isinstance(value, Tensor) else value) for value in values])
        largest = float(np.abs(rec.arrays[name]).max())  # what the recorder measures against with a floor of 1
        rec.check(name, stack, *((RATES,) if name == "lr" else (PARAMETERS / max(1.0, largest), 1.0)))


def _raw(label_B: Tensor, is_labeled_B: Tensor | None = None) -> RawBatch:
    """Rows with these labels; ``is_labeled_B``: those that have one, unless given."""
    raw = RawBatch.allocate(len(label_B), 1, 1, device=label_B.device)
    raw.label_B.copy_(label_B)
    raw.is_labeled_B.copy_(label_B >= 0 if is_labeled_B is None else is_labeled_B)
    return raw


def simpro_e2e(rec: Recorder) -> None:
    views = {view: rec.input(f"x_{name}") for view, name in SIMPRO_VIEWS.items()}
    labels = rec.input("y_l")
    task = task_of(rec, *batches(rec, views["x"], views["u_w"]), lists=True)
    options = {"threshold": rec.hp("hp_threshold"), "prior_exponent": rec.hp("hp_tau"), "prior_momentum": rec.hp("hp_ema_u"), "unnormalized_prior": True}
    method: Any = build_method("simpro", options, task).to(rec.device)
    out: Stacks = defaultdict(list)

    def seen(loss: Loss) -> None:
        assert loss.pseudo is not None
        for name, value in (("Lx", loss.parts["sup_loss"]), ("Lu", loss.parts["unsup_loss"]), ("loss", loss.total), ("mask", loss.pseudo.mask_B)):
            out[name].append(value)

    def after() -> None:
        out["epoch_est"].append(method.unlabeled_prior.clone())
        out["epoch_adapt"].append(method.mixture_prior.clone())

    unknown = torch.full_like(views["u_w"][0, :, 0], -1).long()
    _train(rec, method, views, lambda t: {"labeled": _raw(labels[t]), "unlabeled": _raw(unknown)}, seen, after)
    check(rec, out)


def acr_e2e(rec: Recorder) -> None:
    _acr_e2e(rec, "acr", {"float64_prior": True})


def acr_d_e2e(rec: Recorder) -> None:
    _acr_e2e(rec, "acr_d", {})


def _acr_e2e(rec: Recorder, name: str, extra: dict[str, Any]) -> None:
    views = {view: rec.input(f"x_{'l' if view == 'x' else n}") for view, n in ACR_VIEWS.items()}
    labels, markers, tau = rec.input("y_l"), rec.input("u_real"), rec.hp("hp_tau")
    options = {"threshold": rec.hp("hp_threshold"), "prior_momentum": rec.hp("hp_ema_u"), "estimate_after_epoch": rec.hp("hp_est_epoch")}
    options |= {key: tau for key in ("adaptive_exponent", "label_exponent", "balanced_exponent")} | {"class_presence": "last"} | extra
    method: Any = build_method(name, options, task_of(rec, *batches(rec, labels, markers), lists=True)).to(rec.device)
    out: Stacks = defaultdict(list)

    def raws(t: int) -> dict[str, RawBatch]:
        return {"labeled": _raw(labels[t]), "unlabeled": _raw(torch.full_like(markers[t], -1), markers[t] == LABELED_DUPLICATE)}

    def seen(loss: Loss) -> None:
        assert loss.pseudo is not None
        parts = {"Lx": "sup_loss", "Lx_b": "sup_loss_balanced", "Lu": "unsup_loss", "Lu_b": "unsup_loss_balanced"}
        for recorded, part in parts.items():
            out[recorded].append(loss.parts[part])
        for recorded, value in {"loss": loss.total, "mask_ss_t": loss.pseudo.mask_B, "mask_ss_b_h2": method.kept("mask_balanced")}.items():
            out[recorded].append(value)

    def after() -> None:
        out["epoch_adj_l1"].append(log_prior(method.anchors[0], method.exponent if name == "acr" else tau))
        out["epoch_u_py"].append(method.unlabeled_prior.clone())

    _train(rec, method, views, raws, seen, after)
    check(rec, out)


HANDLERS = {"simpro_e2e_": simpro_e2e, "acr_e2e_": acr_e2e, "acr_d_e2e_": acr_d_e2e}
