"""Accelerate's trackers (TensorBoard, W&B) for a run: which can be had, how they start, what they are sent."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from fastssl.errors import RecipeError, nearest

NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb"}  # tracker -> importable package


def check_trackers(names: Sequence[str]) -> None:
    """Refuse unknown trackers and those whose package is missing, before anything is built."""
    for name in names:
        if name not in NEEDS:
            raise RecipeError(f"log.trackers: unknown tracker {name!r}{nearest(name, NEEDS)}; known: {sorted(NEEDS)}")
        if importlib.util.find_spec(NEEDS[name]) is None:
            raise RecipeError(f"log.trackers: {name} needs a package that is not installed: pip install {NEEDS[name]}, or log.trackers=[]")


def open_trackers(accelerator: Accelerator, names: Sequence[str], *, project: str, run: Path, config: dict[str, Any], start_step: int) -> None:
    """Start the trackers of a run folder; event files lie under ``run/tb``. A resumed run hides what it had written beyond ``start_step``."""
    if not names:
        return
    logging.getLogger("accelerate.tracking").setLevel(logging.ERROR)
    accelerator.project_configuration.set_directories(str(run / "tb"))
    accelerator.log_with = filter_trackers(list(names), str(run / "tb"))
    options: dict[str, Any] = {}
    if start_step:
        options["tensorboard"] = {"purge_step": start_step + 1}
    options["wandb"] = {"id": run.name, "name": f"{run.parent.name}/{run.name}", "dir": str(run), "resume": "allow"}
    accelerator.init_trackers(project, config=_flat(config), init_kwargs={name: options.get(name, {}) for name in names})


def send(accelerator: Accelerator, line: dict[str, Any], step: int) -> None:
    """Send a metric line's numbers."""
    if not accelerator.trackers:
        return
    numbers = {k: float(v) for k, v in line.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and k not in ("step", "epoch")}
    accelerator.log(numbers, step=step)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names with plain values (what TensorBoard's hparams accept)."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
