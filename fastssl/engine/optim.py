"""The optimiser of a recipe: fused SGD or AdamW over named parameter groups, its rate on the device, its state as named tensors.

No host sync in a step. Rates are device scalars that :func:`set_lr` overwrites, and the state exists from the start, so that a captured update never
meets a new tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastssl.errors import CheckpointError, RecipeError
from fastssl.schema import OptimConfig

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def build_optimizer(network: nn.Module, config: OptimConfig, lr: Tensor) -> torch.optim.Optimizer:
    """Freeze what the recipe freezes, then build the optimiser over what is left.

    ``lr`` is a float scalar on the parameters' device (float32 on CUDA) with the initial base rate; each group gets its own tensor ``lr * lr_factor``.
    Groups are formed by (lr factor, decayed or not); ``group["param_names"]`` names their parameters. Call it once, after the network has its final
    device, dtype and memory format. Raises :class:`RecipeError` for a pattern that matches no parameter, or when nothing is left to train.
    """
    freeze(network, config.freeze)
    exempt = _exempt_from_decay(network, config.no_decay)
    factors = [(pattern, factor, _matching(network, pattern, "lr_factors")) for pattern, factor in config.lr_factors.items()]
    grouped: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            factor = next((factor for _, factor, names in factors if name in names), 1.0)
            grouped.setdefault((float(factor), 0.0 if name in exempt else config.weight_decay), []).append((name, parameter))
    if not grouped:
        raise RecipeError("optim.freeze: no parameter is left to train; freeze fewer of them")
    groups = [{"params": named, "lr": lr * factor, "lr_factor": factor, "weight_decay": decay} for (factor, decay), named in grouped.items()]
    optimizer: torch.optim.Optimizer
    if config.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
        slots = ["momentum_buffer"] if config.momentum else []
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(float(config.betas[0]), float(config.betas[1])), fused=True)
        slots = ["exp_avg", "exp_avg_sq"]
    for parameter in _parameters(optimizer):
        # A first update from zeros is the update that these optimisers make from nothing: SGD's m 0 + g, AdamW's moments.
        optimizer.state[parameter] = {slot: torch.zeros_like(parameter, memory_format=torch.preserve_format) for slot in slots}
        if config.name == "adamw":
            optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return optimizer


def freeze(network: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Turn off gradients of every parameter whose name one of the regular expressions matches (``re.search``); returns their names."""
    frozen = sorted(set().union(*(_matching(network, pattern, "freeze") for pattern in patterns)))
    for name in frozen:
        network.get_parameter(name).requires_grad_(False)
    return frozen


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Write base rate ``lr`` times each group's factor into the group's tensor. No sync, no new tensor."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr * group["lr_factor"])


def clip_grad(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most ``max_norm``; returns the norm before clipping, on the device. No sync."""
    return nn.utils.clip_grad_norm_(_parameters(optimizer), max_norm)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The whole state as ``"<slot>/<parameter name>"`` -> tensor (the live tensors, not copies). Rates are not state: the clock knows them."""
    return {f"{slot}/{name}": tensor for name, parameter in _named(optimizer) for slot, tensor in optimizer.state[parameter].items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Copy a saved state back in place, by name: order of parameters and groups may differ.

    Raises :class:`CheckpointError` for missing or unknown names and for shapes that differ; nothing has been written then.
    """
    own = optimizer_tensors(optimizer)
    for what, names in (("lacks", own.keys() - tensors.keys()), ("has unknown", tensors.keys() - own.keys())):
        if names:
            raise CheckpointError(f"optimizer state {what} {_some(names)}; it belongs to another network or optimiser")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(f"optimizer state {name} has shape {tuple(tensors[name].shape)}, the network needs {tuple(tensor.shape)}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)]


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for _, parameter in _named(optimizer)]


def _exempt_from_decay(network: nn.Module, wishes: Iterable[str]) -> set[str]:
    """Names of parameters without decay: 'bias' by last name part, 'norm' by the type of the owning module, anything else as a pattern."""
    exempt: set[str] = set()
    for wish in wishes:
        if wish == "bias":
            exempt |= {name for name, _ in network.named_parameters() if name.rpartition(".")[2] == "bias"}
        elif wish == "norm":
            for prefix, module in network.named_modules():
                if _is_norm(module):
                    exempt |= {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters(recurse=False)}
        else:
            exempt |= _matching(network, wish, "no_decay")
    return exempt


def _is_norm(module: nn.Module) -> bool:
    """By type; normalisations of other libraries are known by their class name."""
    return isinstance(module, _NORMS) or re.search(r"norm(2d|act|act2d)?$", type(module).__name__, re.IGNORECASE) is not None


def _matching(network: nn.Module, pattern: str, key: str) -> set[str]:
    names = [name for name, _ in network.named_parameters()]
    found = {name for name in names if re.search(pattern, name)}
    if not found:
        raise RecipeError(f"optim.{key}: {pattern!r} matches none of the {len(names)} parameter names (such as {_some(names)})")
    return found


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(sorted(names)[:limit]) + (", ..." if len(names) > limit else "")
