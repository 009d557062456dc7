"""Proof that recipes can be trained as far as that shows without data: every name and key in them means something.

Read are: every key and type, the method and its options, the policies of its views and of evaluation, the network with the method's heads, the patterns of
the optimiser, order laws and schedule. Not read are datasets, label splits and weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from fastssl import methods
from fastssl.engine.assemble import build_method, build_network_and_method, build_slot, build_view_policies
from fastssl.engine.clock import LearningRate
from fastssl.engine.optim import build_optimizer
from fastssl.errors import FastSSLError
from fastssl.published import PublishedRow
from fastssl.recipe import load_recipe
from fastssl.recipe_list import RecipeEntry, runnables
from fastssl.schema import Recipe
from fastssl.sources.order import parse_order
from fastssl.types import Task

CLASSES, ROWS = 10, 1_000_000  # of a dataset that nobody has opened
STATISTICS: Any = SimpleNamespace(mean=[0.5] * 3, std=[0.25] * 3)


@dataclass(frozen=True)
class Fault:
    """What is wrong with one recipe, variant or published row."""

    name: str
    why: str


def prove(entries: Sequence[RecipeEntry], published: Sequence[PublishedRow] = ()) -> Iterator[Fault]:
    """Faults of all recipes with their variants, of layers that no variant uses, and of published rows that name a recipe that is not there."""
    known = runnables(entries)
    built: set[str] = set()
    for entry in entries:
        for layer, used in entry.hidden.items():
            if not used:
                yield Fault(entry.short, f"no variant is like {layer!r}, which cannot be trained by itself")
        for runnable in entry.runnables:
            try:
                path, at, variant = str(entry.path), *runnable.name.partition("@")[1:]
                check_recipe(load_recipe(path + at + variant), built)
            except FastSSLError as error:
                yield Fault(runnable.name, str(error))
    names = {runnable.name for runnable in known}
    for row in published:
        if row.recipe and row.recipe not in names:
            yield Fault(f"{row.table}, {row.method}, {row.setting}", f"names the recipe {row.recipe!r}, which does not exist")
        elif row.overrides:
            try:
                load_recipe(row.recipe, row.overrides)
            except FastSSLError as error:
                yield Fault(f"{row.table}, {row.method}, {row.setting}", str(error))


def check_recipe(recipe: Recipe, built: set[str] | None = None) -> None:
    """FastSSLError for what cannot work in a resolved recipe. ``built`` remembers networks that were built, so that equal ones are not built again."""
    method_class, config = methods.get(recipe.method.name), recipe.method.config
    built = set() if built is None else built
    for law, stream, batch in (
        (recipe.data.labeled_law, "labeled", recipe.data.labeled_batch),
        (recipe.data.unlabeled_law, "unlabeled", recipe.data.unlabeled_batch),
    ):
        if stream == "labeled" or method_class.needs_unlabeled:
            parse_order(law, length=ROWS, seed=recipe.seed, batch=batch, stream=stream)
    rate = LearningRate(recipe.schedule, recipe.optim.lr, recipe.train.steps, recipe.train.steps_per_epoch)
    rate(0), rate(recipe.train.steps)
    views = method_class.views(config)
    build_view_policies(recipe, views, STATISTICS, 3)
    sizes = {view.policy: view.size for view in views.values()}
    for slot in ("weak", "strong", "eval", *recipe.augment.extra):
        build_slot(recipe, slot, STATISTICS, 3, sizes.get(slot))
    task = any_task(recipe)
    weightless = replace(recipe, model=replace(recipe.model, weights=""))
    build_method(recipe, task)
    optim = replace(recipe.optim, name="sgd", momentum=0.0, nesterov=False, lr=1.0, weight_decay=1.0)  # its patterns matter, not its state
    key = repr((weightless.model, recipe.batchnorm, method_class.heads(config, task), method_class.frozen(config), optim))
    if key not in built:
        with torch.device("meta"):
            network, _ = build_network_and_method(weightless, STATISTICS, 3, task, 1)
        build_optimizer(network.to_empty(device="cpu"), optim, torch.tensor(1.0))
        built.add(key)


def any_task(recipe: Recipe) -> Task:
    """A task of the recipe's batches on a small dataset that nobody has opened."""
    d, t = recipe.data, recipe.train
    return Task(
        num_classes=CLASSES,
        num_labeled=4 * CLASSES,
        num_unlabeled=10 * CLASSES,
        labeled_class_counts=(4,) * CLASSES,
        labeled_batch=d.labeled_batch,
        unlabeled_batch=d.unlabeled_batch,
        total_steps=t.steps,
        steps_per_epoch=t.steps_per_epoch,
        labeled_labels=tuple(range(CLASSES)) * 4,
    )
