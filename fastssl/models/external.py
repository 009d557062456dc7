"""Backbones of timm and torchvision by name: the classifier is removed, the output is pooled features [N, feat_dim]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastssl.errors import RecipeError, nearest

_OURS = {"num_classes": "the dataset", "in_chans": "the dataset", "in_channels": "the dataset", "weights": "model.weights"}


def timm_names() -> list[str]:
    import timm

    return timm.list_models()


def torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def timm_backbone(name: str, in_channels: int, options: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """(backbone, feat_dim) of timm's ``name``; ``options`` go to ``timm.create_model``."""
    import timm

    _check_name("timm", name, timm_names())
    _check_options(options)
    try:
        backbone = timm.create_model(name, num_classes=0, in_chans=in_channels, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"model.options: timm/{name} does not work with {dict(options)}: {error}") from error
    feat_dim: Any = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    return backbone, int(feat_dim)


def torchvision_backbone(name: str, in_channels: int, options: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """(backbone, feat_dim) of torchvision's ``name`` without weights; ``options`` go to its builder.

    ``small_stem: true`` (ResNet family) gives the stem for small images: 3x3 stride 1 convolution, no max-pooling.
    """
    import torchvision

    _check_name("torchvision", name, torchvision_names())
    options = dict(options)
    small_stem = options.pop("small_stem", False)
    _check_options(options)
    if in_channels != 3:
        raise RecipeError(f"model.name: torchvision/{name} takes images with 3 channels, this dataset has {in_channels}; "
                          f"use a timm model (timm/resnet18, ...), which takes any number, or convert the dataset to 3 channels")  # fmt: skip
    try:
        backbone = torchvision.models.get_model(name, weights=None, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model.options: torchvision/{name} does not work with {options}: {error}") from error
    if getattr(backbone, "aux_logits", False):
        raise RecipeError(f"model.name: torchvision/{name} has auxiliary outputs; add model.options: {{aux_logits: false}}")
    if small_stem:
        if not isinstance(backbone, torchvision.models.ResNet):
            raise RecipeError(f"model.options: small_stem is for ResNets, not for torchvision/{name}")
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()  # type: ignore[assignment]
    linears = [path for path, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise RecipeError(f"model.name: torchvision/{name} has no linear classifier to replace; choose another model")
    owner, _, attribute = linears[-1].rpartition(".")
    feat_dim = backbone.get_submodule(linears[-1]).in_features
    setattr(backbone.get_submodule(owner), attribute, nn.Identity())
    return backbone, int(feat_dim)


def _check_name(library: str, name: str, names: list[str]) -> None:
    if name.partition(".")[0] not in names:  # timm names may carry a weights tag after a dot
        raise RecipeError(f"model.name: {library} has no model {name!r}{nearest(name, names)}")


def _check_options(options: Mapping[str, Any]) -> None:
    for name, owner in _OURS.items():
        if name in options:
            raise RecipeError(f"model.options: {name!r} is set by {owner}; leave it out")
