"""From a recipe and its opened data to the updater: network, method, teacher, optimiser, renderer, prepared for this process's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from fastssl.engine.assemble import Data, build_network_and_method
from fastssl.engine.clock import Clock, LearningRate
from fastssl.engine.draws import MethodDraws
from fastssl.engine.launch import seed_dropout, seed_weights
from fastssl.engine.meters import Meters
from fastssl.engine.optim import build_optimizer
from fastssl.engine.step import TrainModule, Updater, ViewRenderer
from fastssl.errors import RecipeError
from fastssl.methods import get as get_method
from fastssl.models.ema import Teacher
from fastssl.schema import Recipe
from fastssl.sources.feed import Stream
from fastssl.types import Task, View


def build_updater(
    recipe: Recipe, accelerator: Accelerator, data: Data, task: Task, streams: Sequence[Stream], views: Mapping[str, View], policies: Mapping[str, Any]
) -> Updater:
    """Everything an update needs, at update 0. Weights depend on the recipe's seed alone; what the network draws later also on the rank.

    Raises :class:`RecipeError` for a method that reads a teacher the recipe switches off.
    """
    device, world = accelerator.device, accelerator.num_processes
    seed_weights(recipe)
    network, method = build_network_and_method(recipe, data.manifest, data.channels, task, world)
    network.to(device)
    method.to(device)
    if recipe.train.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = Teacher(network, recipe.teacher, recipe.train.steps).bind(network) if recipe.teacher.enabled else None
    reads_teacher = get_method(recipe.method.name).needs_teacher(recipe.method.config)
    if teacher is None and reads_teacher:
        raise RecipeError(f"method {recipe.method.name} reads a teacher, but teacher.enabled is false")
    learning_rate = LearningRate(recipe.schedule, recipe.optim.lr, recipe.train.steps, recipe.train.steps_per_epoch)
    # Before prepare: what the recipe freezes must be frozen when DDP looks for parameters to reduce.
    optimizer = build_optimizer(network, recipe.optim, torch.tensor(learning_rate(0), device=device))
    train_module = TrainModule(network, method, recipe.train.compile == "student").train()
    rows = {stream.name: stream.global_batch // world for stream in streams}
    a = recipe.augment
    updater = Updater(
        accelerator=accelerator,
        module=accelerator.prepare(train_module),
        train_module=train_module,
        optimizer=optimizer,
        learning_rate=learning_rate,
        clock=Clock(recipe.train.steps_per_epoch, device),
        renderer=ViewRenderer(views, policies, rows, size=a.size, channels=data.channels, seed=recipe.seed, device=device, backend=a.backend),
        meters=Meters(device),
        teacher=teacher,
        teacher_when=recipe.teacher.when,
        teacher_forward=teacher if reads_teacher else None,
        draws=MethodDraws(method.draws(recipe.method.config, task), views, seed=recipe.seed, device=device),
        clip_norm=recipe.optim.clip_norm,
    )
    seed_dropout(recipe, accelerator.process_index)
    return updater
