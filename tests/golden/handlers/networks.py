"""Published networks under a deterministic fill: outputs in both modes, statistics of the first BatchNorm, parameter list, weight-decay rule."""

from __future__ import annotations

import ast
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.engine.optim import build_optimizer
from fastssl.models.zoo import build_network
from fastssl.schema import ModelConfig, OptimConfig
from fastssl.types import HeadSpec
from tests.golden.recorder import Recorder

TOLERANCE = 1e-3
FLOOR = 1.0  # sums of many terms that cancel: errors are measured against the array's largest entry
PUBLISHED_NO_DECAY = ["bias", r"(^|\.)bn\d*\."]  # the long-tailed code goes by names; norms in ResNet shortcuts have none and are decayed


def fill(parameters: Sequence[Tensor], names: Sequence[str]) -> None:
    """The documented 32-bit mixing hash of tensor number and flat position."""
    for i, (parameter, name) in enumerate(zip(parameters, names, strict=True)):
        h = (2654435761 * np.arange(parameter.numel(), dtype=np.uint64) + 40503 * (i + 1)) % 2**32
        for _ in range(2):
            h = (h ^ (h >> 16)) * 0x45D9F3B % 2**32
        g = ((h ^ (h >> 16)) / 2**32 - 0.5) * np.sqrt(12)
        values = g / np.sqrt(parameter[0].numel()) if parameter.dim() >= 2 else 0.1 * g + name.endswith("weight")
        parameter.data.copy_(torch.from_numpy(values).view(parameter.shape))


def _replay(rec: Recorder, model: ModelConfig, heads: dict[str, str]) -> None:
    """``heads``: our head name -> the recorded name of its weight."""
    names = rec.raw("param_names").tolist()
    shapes = dict(zip(names, map(ast.literal_eval, rec.arrays["param_shapes"].tolist()), strict=True))
    specs = {head: HeadSpec("linear", {"out": shapes[weight][0]}) for head, weight in heads.items()}
    network = build_network(model, in_channels=3, num_classes=shapes["fc.weight"][0], heads=specs).to(rec.device)
    named = list(network.named_parameters())
    rec.check("param_shapes", np.array([str(tuple(parameter.shape)) for _, parameter in named]))
    rec.check("n_params", np.array(sum(parameter.numel() for _, parameter in named)))

    optimizer = build_optimizer(network, OptimConfig(no_decay=PUBLISHED_NO_DECAY), torch.tensor(0.1, device=rec.device))
    decayed = {name for group in optimizer.param_groups if group["weight_decay"] for name in group["param_names"]}
    rec.check("param_decay", np.array([name in decayed for name, _ in named]))

    fill([parameter for _, parameter in named], names)
    first_norm = next(module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    x = rec.input("x")
    with torch.no_grad():
        rec.check("logits_train", network.train()(x).logits_NC, TOLERANCE, FLOOR)
        rec.check("bn_first_mean", first_norm.running_mean, TOLERANCE, FLOOR)
        rec.check("bn_first_var", first_norm.running_var, TOLERANCE, FLOOR)
        rec.check("logits_eval_after_one_train_forward", network.eval()(x).logits_NC, TOLERANCE, FLOOR)


def wrn28_2(rec: Recorder) -> None:
    _replay(rec, ModelConfig("wrn_28_2"), {})


def resnet50(rec: Recorder) -> None:
    _replay(rec, ModelConfig("torchvision/resnet50", {"small_stem": True}), {"second": "fc1.weight", "rotation": "rot.weight"})


HANDLERS = {"longtail_counts_net_wrn28_2": wrn28_2, "longtail_counts_net_resnet50": resnet50}
