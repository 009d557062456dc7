"""Moving averages of a network's weights and buffers, step by step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.models.ema import Teacher
from fastssl.schema import TeacherConfig
from tests.golden.recorder import Recorder

TOLERANCE = 1e-9
BUFFERS = {"params": "leave", "eman": "average", "cifar": "copy"}  # recorded mode -> teacher.buffers
BUFFER_NAMES = ("running_mean", "running_var", "num_batches_tracked")


def network_of(state: dict[str, Tensor]) -> nn.Module:
    """A module tree with exactly these parameters and buffers under their dotted names."""
    root = nn.Module()
    for name, value in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        if leaf in BUFFER_NAMES:
            module.register_buffer(leaf, value.clone())
        else:
            module.register_parameter(leaf, nn.Parameter(value.clone()))
    return root


def ema(rec: Recorder) -> None:
    momentum = rec.hp("hp.momentum")

    def state(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): rec.input(name) for name in rec.names(prefix)}

    for mode, buffers in BUFFERS.items():
        steps = sorted({int(name.split(".")[1][1:]) for name in rec.names(f"{mode}.s")})
        student = network_of(state(f"{mode}.main0."))
        teacher = Teacher(student, TeacherConfig(momentum=momentum, buffers=buffers), len(steps))
        teacher.network.load_state_dict(state(f"{mode}.ema0."))
        for step in steps:
            student.load_state_dict(state(f"{mode}.s{step}.main."))
            teacher.update(student)
            now = teacher.network.state_dict()
            for name in rec.names(f"{mode}.s{step}.ema."):
                value: Tensor = now[name.removeprefix(f"{mode}.s{step}.ema.")]
                rec.check(name, value, TOLERANCE if torch.is_floating_point(value) else 0.0)


HANDLERS = {"simmatch_ema_": ema}
