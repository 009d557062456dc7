"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastssl.errors import RecipeError, nearest
from fastssl.models.checkpoints import load_backbone, load_network
from fastssl.models.external import timm_backbone, timm_names, torchvision_backbone, torchvision_names
from fastssl.models.heads import build_head, call_builder
from fastssl.models.named import NAMED, published_network
from fastssl.models.network import Network
from fastssl.models.norm import convert_batchnorm
from fastssl.models.small import small_cnn, small_resnet
from fastssl.models.wrn import wrn_28_2, wrn_28_8, wrn_var_37_2
from fastssl.schema import BatchNormConfig, ModelConfig
from fastssl.types import HeadSpec

__all__ = ["Network", "build_network", "list_models"]

BUILDERS: dict[str, Callable[..., Any]] = {
    "wrn_28_2": wrn_28_2,
    "wrn_28_8": wrn_28_8,
    "wrn_var_37_2": wrn_var_37_2,
    "small_resnet": small_resnet,
    "small_cnn": small_cnn,
}
LIBRARIES: dict[str, tuple[Callable[..., tuple[nn.Module, int]], Callable[[], list[str]]]] = {
    "timm": (timm_backbone, timm_names),
    "torchvision": (torchvision_backbone, torchvision_names),
}


def list_models() -> list[str]:
    """All model names: our own first, then published networks, then ``timm/<name>`` and ``torchvision/<name>``."""
    return [*dict.fromkeys([*BUILDERS, *NAMED]), *(f"{library}/{name}" for library, (_, names) in LIBRARIES.items() for name in names())]


def build_network(
    model: ModelConfig,
    *,
    in_channels: int,
    num_classes: int,
    heads: Mapping[str, HeadSpec] | None = None,
    batchnorm: BatchNormConfig | None = None,
    world: int = 1,
) -> Network:
    """The network of a recipe on the CPU, weights drawn from torch's global generator.

    ``model.name`` may be one of the published networks of models/named.py, which stand for a builder and options.
    ``model.options`` go to the backbone's builder, except these that every model takes:
    ``classifier_init``  "default" (PyTorch's) or "xavier" (normal, zero bias);
    ``neck``             {kind: bottleneck | layer_norm | ..., its options}: sits between backbone and classifier, heads and features.
    ``model.weights`` is loaded into the backbone, ``model.start`` into the whole network.  Raises RecipeError for names and options, CheckpointError
    for weights.
    """
    if in_channels not in (1, 3):
        raise RecipeError(f"networks take images with 1 or 3 channels, this dataset has {in_channels}")
    if num_classes < 1:
        raise RecipeError(f"num_classes is {num_classes}; it must be at least 1")
    name, options = published_network(model.name, model.options)
    classifier_init = options.pop("classifier_init", "default")
    neck_options = options.pop("neck", None)
    backbone, feat_dim = _backbone(name, in_channels, options)
    neck = None
    if neck_options is not None:
        neck, feat_dim = _neck(neck_options, feat_dim)
    classifier = build_head("linear", feat_dim, {"out": num_classes, "init": classifier_init}, "model.options.classifier_init")
    extra = {name: build_head(spec.kind, feat_dim, spec.options, f"head {name!r}") for name, spec in (heads or {}).items()}
    network = Network(backbone, feat_dim, classifier, extra, neck, [name for name, spec in (heads or {}).items() if spec.on_request])
    if model.weights:
        load_backbone(network.backbone, model.weights)
    if model.start:
        load_network(network, model.start)
    convert_batchnorm(network, batchnorm or BatchNormConfig(), world)
    return network


def _backbone(name: str, in_channels: int, options: dict[str, Any]) -> tuple[nn.Module, int]:
    library, slash, rest = name.partition("/")
    if slash and library in LIBRARIES:
        return LIBRARIES[library][0](rest, in_channels, options)
    if name not in BUILDERS:
        raise RecipeError(f"model.name: there is no model {name!r}{nearest(name, list_models())}; own models: {', '.join(dict.fromkeys([*BUILDERS, *NAMED]))}; "
                          "others as timm/<name> or torchvision/<name>")  # fmt: skip
    backbone = call_builder(BUILDERS[name], (in_channels,), options, f"model.options of {name}")
    return backbone, backbone.feat_dim


def _neck(options: Any, feat_dim: int) -> tuple[nn.Module, int]:
    if not isinstance(options, Mapping) or "kind" not in options:
        raise RecipeError(f"model.options.neck is {options!r}; it must be a mapping with 'kind', for example {{kind: bottleneck, out: 1024}}")
    rest = {name: value for name, value in options.items() if name != "kind"}
    neck = build_head(options["kind"], feat_dim, rest, "model.options.neck")
    for module in reversed(list(neck.modules())):
        if isinstance(module, nn.Linear):
            return neck, module.out_features
    return neck, feat_dim
