"""Published networks by name: which builder stands behind a name, and with which options.

"WRN-28-2" is the name of several networks; the ones that published code trains differ in biases, BatchNorm epsilon and the classifier's start:

    wrn_28_2            ShrinkMatch (CIFAR): convolutions without bias, eps 1e-5, PyTorch's start of the classifier
    wrn_28_2_longtail   SimPro, ACR: the same network, classifier from Xavier's normal law with zero bias
    wrn_28_2_torchssl   TorchSSL and what is built on it (ShrinkMatch on SVHN): convolutions with bias, eps 1e-3, Xavier

All three let the first blocks of stages 2 and 3 read their raw input (``transition: raw``); ``transition: preact`` is the wide-ResNet paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_TORCHSSL = {"conv_bias": True, "bn_eps": 1e-3, "classifier_init": "xavier"}


@dataclass(frozen=True)
class Named:
    """``network``: a builder's name; ``options``: what a recipe need not write; ``any_backbone``: takes the option ``backbone``, another builder's name."""

    network: str
    options: dict[str, Any] = field(default_factory=dict)
    any_backbone: bool = False


NAMED: dict[str, Named] = {
    "wrn_28_2_longtail": Named("wrn_28_2", {"classifier_init": "xavier"}),
    "wrn_28_2_torchssl": Named("wrn_28_2", _TORCHSSL),
    "wrn_28_8_torchssl": Named("wrn_28_8", _TORCHSSL),
    "wrn_var_37_2": Named("wrn_var_37_2", {"classifier_init": "xavier"}),  # the builder has TorchSSL's biases and eps already
    # The long-tailed small ImageNets (32 and 64 pixels): 3x3 stem, no max-pooling. Published code also carries a second and a rotation classifier.
    "resnet50_cifar": Named("torchvision/resnet50", {"small_stem": True, "classifier_init": "xavier"}),
    # SimMatch, ShrinkMatch, FixMatch-EMAN: ResNet-50 v1.5 (stride on the 3x3 convolution), all starts PyTorch's and torchvision's.
    "simmatch_resnet50": Named("torchvision/resnet50"),
    # SimMatchV2 (norm_feat): LayerNorm on the features, before classifier and projection.
    "simmatchv2_resnet50": Named("torchvision/resnet50", {"neck": {"kind": "layer_norm"}}),
    # Transfer-Learning-Library: any backbone, a bottleneck of 1024 with dropout 0.5, a linear head.
    "tllib_classifier": Named("torchvision/resnet50", {"neck": {"kind": "bottleneck", "out": 1024}}, any_backbone=True),
}


def published_network(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(builder's name, options) behind ``model.name`` and ``model.options``; what the recipe says wins. Other names come back as they are."""
    named = NAMED.get(name)
    if named is None:
        return name, dict(options)
    merged = {**named.options, **options}
    return str(merged.pop("backbone", named.network)) if named.any_backbone else named.network, merged
