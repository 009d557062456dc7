"""Builders of the small modules that sit on features, by name: classifiers, projections, auxiliary heads, bottlenecks.

Layers are numbered in an ``nn.Sequential`` without gaps for absent ones, so an embedding head has the keys ``0`` and ``2``, an auxiliary
head with BatchNorm ``0 1 3 4 6``, as in published checkpoints.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fastssl.errors import RecipeError, nearest

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.1, inplace=True),
    "gelu": nn.GELU,
}
INITS = ("default", "xavier")


def linear(feat_dim: int, *, out: int, bias: bool = True, init: str = "default") -> nn.Linear:
    """[N, feat_dim] -> [N, out].  ``init``: "default" = PyTorch's, "xavier" = Xavier normal weights and zero bias."""
    if init not in INITS:
        raise RecipeError(f"init is {init!r}; it must be one of {', '.join(INITS)}")
    layer = nn.Linear(feat_dim, out, bias)
    if init == "xavier":
        nn.init.xavier_normal_(layer.weight)
        if bias:
            nn.init.zeros_(layer.bias)
    return layer


def mlp(
    feat_dim: int,
    *,
    out: int,
    hidden: int | Sequence[int] | None = None,
    layers: int = 2,
    bn: bool = False,
    activation: str = "relu",
    dropout: float = 0.0,
    bn_momentum: float = 0.1,
    bn_eps: float = 1e-5,
) -> nn.Sequential:
    """(Linear, [BatchNorm], activation, [dropout]) for each hidden layer, then Linear to ``out``.

    ``hidden``: one width for all ``layers - 1`` hidden layers (default ``feat_dim``), or a list with each width (``layers`` is then ignored).
    """
    if activation not in ACTIVATIONS:
        raise RecipeError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}{nearest(activation, ACTIVATIONS)}")
    widths = list(hidden) if isinstance(hidden, Sequence) else [feat_dim if hidden is None else hidden] * (layers - 1)
    modules: list[nn.Module] = []
    for c_in, c_out in zip([feat_dim, *widths], widths, strict=False):
        modules.append(nn.Linear(c_in, c_out))
        if bn:
            modules.append(nn.BatchNorm1d(c_out, bn_eps, bn_momentum))
        modules.append(ACTIVATIONS[activation]())
        if dropout > 0:
            modules.append(nn.Dropout(dropout))
    modules.append(nn.Linear(widths[-1] if widths else feat_dim, out))
    return nn.Sequential(*modules)


def bottleneck(feat_dim: int, *, out: int = 1024, dropout: float = 0.5) -> nn.Sequential:
    """Linear (weights N(0, 0.005), bias 0.1), BatchNorm, ReLU, dropout: the feature bottleneck of transfer-learning code (TLlib)."""
    layer = nn.Linear(feat_dim, out)
    nn.init.normal_(layer.weight, std=0.005)
    nn.init.constant_(layer.bias, 0.1)
    return nn.Sequential(layer, nn.BatchNorm1d(out), nn.ReLU(inplace=True), nn.Dropout(dropout))


def layer_norm(feat_dim: int, *, eps: float = 1e-5) -> nn.LayerNorm:
    """LayerNorm on the features (SimMatchV2's ``norm_feat``, as a neck)."""
    return nn.LayerNorm(feat_dim, eps)


KINDS: dict[str, Callable[..., nn.Module]] = {"linear": linear, "mlp": mlp, "bottleneck": bottleneck, "layer_norm": layer_norm}


def build_head(kind: str, feat_dim: int, options: Mapping[str, Any], where: str) -> nn.Module:
    """The module of ``kind`` on ``feat_dim`` features; ``where`` names the recipe key or head in errors (RecipeError)."""
    if kind not in KINDS:
        raise RecipeError(f"{where}: there is no head kind {kind!r}{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
    return call_builder(KINDS[kind], (feat_dim,), options, where)


def call_builder(builder: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any], where: str) -> Any:
    """``builder(*args, **options)`` where options that it does not take, or values that it refuses, become a RecipeError."""
    parameters = inspect.signature(builder).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise RecipeError(f"{where}: there is no option {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    missing = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in options]
    if missing:
        raise RecipeError(f"{where}: the option {missing[0]!r} must be given")
    try:
        return builder(*args, **options)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: these options do not work: {error}") from error
