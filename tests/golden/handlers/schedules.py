"""Learning-rate laws, ramps and teacher-momentum laws."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import nn

from fastssl.engine.clock import LearningRate, sigmoid_ramp
from fastssl.engine.optim import build_optimizer, set_lr
from fastssl.models.ema import teacher_momentum
from fastssl.schema import OptimConfig, ScheduleConfig
from tests.golden.recorder import Recorder

TOLERANCE = 1e-12  # Python floats against Python floats
TLLIB_WARMUP = 100  # documented beside the files, not stored in them
TLLIB_MILESTONES = [12, 24, 36, 48]
FINETUNE_FACTOR = 0.1
STEP_FACTOR = 0.1


def tllib(rec: Recorder) -> None:
    """Rates per parameter group: read back from the optimiser after ``set_lr``."""
    for case in range(rec.hp("n_cases")):
        kind, lr, gamma, decay, finetune, epochs, per_epoch = (
            rec.hp(f"case{case}_{name}") for name in ("kind", "lr", "gamma", "decay", "finetune", "epochs", "iters_per_epoch")
        )
        schedule = {
            "exp": ScheduleConfig("exp", gamma=gamma, decay=decay),
            "cos": ScheduleConfig("cosine_7_16"),
            "cos_warm": ScheduleConfig("cosine_7_16", warmup_steps=TLLIB_WARMUP),
            "multistep": ScheduleConfig("multistep", gamma=gamma, milestones=TLLIB_MILESTONES),
        }[kind]
        law = LearningRate(schedule, lr, epochs * per_epoch, per_epoch)
        network = nn.ModuleDict({name: nn.Linear(1, 1) for name in ("backbone", "bottleneck", "head")})
        factors = {r"^backbone\.": FINETUNE_FACTOR} if finetune else {}
        optimizer = build_optimizer(network, OptimConfig(lr=lr, lr_factors=factors), torch.tensor(lr, dtype=torch.float64))
        rates = []
        for step in rec.raw(f"case{case}_steps").tolist():
            set_lr(optimizer, law(step * per_epoch if kind == "multistep" else step))
            by_name = {name: group["lr"].item() for group in optimizer.param_groups for name in group["param_names"]}
            rates.append([by_name[f"{part}.weight"] for part in network])
        rec.check(f"case{case}_group_lr", np.array(rates), TOLERANCE)
    epochs_run = rec.raw("ramp_epochs").tolist()
    for name in rec.names("ramp_warmup"):
        length = int(re.fullmatch(r"ramp_warmup(\d+)", name)[1])  # type: ignore[index]
        rec.check(name, np.array([sigmoid_ramp(epoch, length) for epoch in epochs_run]), TOLERANCE)


def simmatch(rec: Recorder) -> None:
    epochs, warmup, per_epoch, lr = (rec.hp(f"hp.{name}") for name in ("epochs", "warmup_epochs", "iters_per_epoch", "base_lr"))
    total = epochs * per_epoch

    cosine = LearningRate(ScheduleConfig("cosine_epoch", warmup_epochs=warmup), lr, total, per_epoch)
    rec.check("cos.lr", np.array([cosine(epoch * per_epoch + i) for epoch, i in rec.raw("cos.epoch_iter").tolist()]), TOLERANCE)

    milestones = rec.raw("step.milestones").tolist()
    multistep = LearningRate(ScheduleConfig("multistep", warmup_epochs=warmup, gamma=STEP_FACTOR, milestones=milestones), lr, total, per_epoch)
    rec.check("step.lr", np.array([multistep(epoch * per_epoch) for epoch in rec.raw("step.epoch").tolist()]), TOLERANCE)

    cifar = LearningRate(ScheduleConfig("cosine_7_16"), lr, rec.hp("hp.cifar_total_steps"), per_epoch)
    rec.check("cifar.lr", np.array([cifar(step) for step in rec.raw("cifar.step").tolist()]), TOLERANCE)

    base = rec.hp("hp.v2_ema_m")
    rec.check("v2_ema.m", np.array([teacher_momentum("cosine", base, k, total) for k in rec.raw("v2_ema.step").tolist()]), TOLERANCE)


HANDLERS = {"lr_schedule_": tllib, "simmatch_schedules_": simmatch}
