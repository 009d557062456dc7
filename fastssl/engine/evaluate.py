"""Evaluate a finished or unfinished run from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastssl.engine import checkpoint
from fastssl.engine.assemble import build_evaluator, build_network_and_method, build_task, open_data
from fastssl.engine.launch import launch
from fastssl.engine.scoring import as_line
from fastssl.engine.state import load_module
from fastssl.errors import CheckpointError
from fastssl.models.ema import Teacher
from fastssl.recipe import load_recipe


def evaluate_run(run: str | Path, checkpoint_name: str = "best", split: str | None = None) -> dict[str, Any]:
    """Metrics of a run folder's ``best`` or ``last`` checkpoint (or a named ``step-XXXXXXXX``) as a flat ``eval/*`` dict, with "step" and "split".

    ``split``: "validation" or a split of the dataset folder; default what the recipe evaluates on. Raises :class:`CheckpointError` if there is no
    such checkpoint or it is damaged, :class:`DataError` if the dataset is gone.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run} is no run folder: it has no config.yaml")
    recipe = load_recipe(run / "config.yaml", [])
    snapshot = checkpoint.load(checkpoint.find(run, checkpoint_name))
    accelerator = launch(recipe)
    data = open_data(recipe, accelerator.device)
    task = build_task(recipe, data)
    split = split or recipe.data.eval_on
    evaluator = build_evaluator(recipe, data.manifest, data.split, split, data.channels, accelerator.device)
    network, _ = build_network_and_method(recipe, data.manifest, data.channels, task, accelerator.num_processes)
    networks = {"raw": network}
    if "teacher" in snapshot.tensors:
        teacher = Teacher(network, recipe.teacher, task.total_steps)
        load_module(teacher, snapshot.tensors["teacher"], "teacher")
        networks["ema"] = teacher.network
    load_module(network, snapshot.tensors["student"], "student")
    for which in networks.values():
        which.to(accelerator.device)
    line = as_line(evaluator(networks, accelerator), recipe.eval.headline)
    data.source.close()
    evaluator.source.close()
    return {"run": str(run), "checkpoint": checkpoint_name, "step": snapshot.state["step"], "split": split, **line}
