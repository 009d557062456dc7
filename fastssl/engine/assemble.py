"""From a recipe to the parts of a run: data streams, policies, task, network, method. Pure construction; no folder is written, no step taken."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fastssl.augment import build_policy, check_backend
from fastssl.engine.launch import cores_per_process
from fastssl.engine.optim import freeze
from fastssl.engine.scoring import Evaluator
from fastssl.errors import DataError, RecipeError
from fastssl.methods import get as get_method
from fastssl.methods.base import Method
from fastssl.models.zoo import build_network
from fastssl.schema import Recipe
from fastssl.sources.base import open_source
from fastssl.sources.feed import Stream
from fastssl.sources.manifest import LabelSplit, Manifest, load_labels, load_manifest, load_split
from fastssl.sources.order import parse_order
from fastssl.sources.selection import check_classes, load_selection
from fastssl.types import Task, View

SLOTS = ("weak", "strong", "eval")  # the policies every recipe has; augment.extra adds more
MAX_WORKERS = 8
RESIDENT_SHARE = 0.25  # of the device's memory that a dataset may take under data.device_resident: auto


@dataclass(frozen=True)
class SelectedRows:
    """Rows of a selection (fastssl/sources/selection.py), which take the place of ``stream``'s own: labels from its lists, truth from its pool (-1 unknown)."""

    stream: str
    source: Any
    rows_N: np.ndarray
    labels_N: np.ndarray
    truth_N: np.ndarray


@dataclass
class Data:
    """An opened dataset with its label split, and with what was selected from it or from another one."""

    manifest: Manifest
    split: LabelSplit
    source: Any  # of the train rows
    unlabeled_rows: np.ndarray  # rows of the unlabelled stream, int64
    device: torch.device
    selected: SelectedRows | None = None

    def selected_as(self, stream: str) -> SelectedRows | None:
        return self.selected if self.selected is not None and self.selected.stream == stream else None

    def close(self) -> None:
        """Close every source of training rows."""
        self.source.close()
        if self.selected is not None:
            self.selected.source.close()

    @property
    def labels_N(self) -> np.ndarray:
        return self.source.labels_N

    @property
    def channels(self) -> int:
        return self.source.canvas[2]


def workers_of(recipe: Recipe) -> int:
    """Decoding threads of this process."""
    return recipe.data.workers or min(MAX_WORKERS, cores_per_process())


def open_data(recipe: Recipe, device: torch.device) -> Data:
    """Open the dataset folder and the label split of a recipe. Raises :class:`DataError` / :class:`RecipeError` for what cannot be trained on."""
    for name in ("path", "split"):
        if not getattr(recipe.data, name):
            raise RecipeError(f"data.{name} is empty; name {'a converted dataset folder' if name == 'path' else 'a label split of the dataset'}")
    manifest = load_manifest(recipe.data.path)
    split = load_split(manifest, recipe.data.split)
    if len(split.labeled) == 0:
        raise DataError(f"label split {split.name!r} has no labeled rows; there is nothing to learn classes from")
    if get_method(recipe.method.name).labeled_rows == "all":
        every = np.sort(np.concatenate([split.labeled, split.unlabeled]))
        split = replace(split, labeled=every[load_labels(manifest, split.of)[every] >= 0])
    unlabeled = np.sort(np.concatenate([split.labeled, split.unlabeled])) if recipe.data.include_labeled else np.asarray(split.unlabeled)
    views = get_method(recipe.method.name).views(recipe.method.config).values()
    view_size = max((view.size or recipe.augment.size for view in views), default=recipe.augment.size)
    source = open_rows(recipe, manifest, split.of, device, view_size=view_size)
    data = Data(manifest, split, source, unlabeled.astype(np.int64), device)
    if recipe.data.selection:
        _add_selection(recipe, data, view_size)
    return data


def _add_selection(recipe: Recipe, data: Data, view_size: int) -> None:
    """Open ``data.selection`` and let its rows stand for a stream; the data's identity then covers the selection too."""
    selection = load_selection(recipe.data.selection)
    check_classes(selection, data.manifest.classes)
    pool, of = selection.pool(), selection.info["pool"]["split"]
    if pool.channels != data.manifest.channels:
        raise DataError(f"{pool.root} has images of {pool.channels} channel(s), {data.manifest.root} of {data.manifest.channels}; convert one of them again")
    rows_N, labels_N = selection.rows_and_labels()
    if len(rows_N) == 0:
        raise DataError(f"selection {selection.folder} has no rows; select more, or train without data.selection")
    same = pool.digest == data.manifest.digest and of == data.split.of
    there = replace(recipe, data=replace(recipe.data, path=str(pool.root), source=recipe.data.source if pool.format == data.manifest.format else "auto"))
    source = data.source if same else open_rows(there, pool, of, data.device, view_size=view_size)
    truth_N = source.labels_N[rows_N] if pool.classes == data.manifest.classes else np.full(len(rows_N), -1, dtype=np.int64)
    data.selected = SelectedRows(recipe.data.selection_as, source, rows_N, labels_N, truth_N)
    data.split = replace(data.split, digest=hashlib.sha256(f"{data.split.digest} {selection.digest}".encode()).hexdigest())


def open_rows(recipe: Recipe, manifest: Manifest, split: str, device: torch.device, view_size: int = 0) -> Any:
    """A source of one dataset split, kept on the device where ``data.device_resident`` says so.

    ``view_size``: side of the largest view, for ``data.scaled_decode``; 0 = decode in full, as evaluation does.
    """
    wish = recipe.data.device_resident
    info = manifest.split(split)
    size = info.count * info.max_height * info.max_width * manifest.channels
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" and manifest.format == "arrays" else 0
    fits = size < memory * RESIDENT_SHARE
    if wish == "yes" and memory and size >= memory:
        raise DataError(
            f"data.device_resident=yes: {split!r} of {str(manifest.root)!r} takes {size / 1e9:.1f} GB, the device has {memory / 1e9:.1f} GB; "
            "use data.device_resident=auto, which streams it from the disk"
        )
    decodes = recipe.data.source == "dali" and device.type == "cuda"  # DALI's decoder writes where the trainer reads
    resident = device if wish == "yes" or (wish == "auto" and fits) or decodes else None
    return open_source(
        recipe.data.path,
        split,
        kind=recipe.data.source,
        workers=workers_of(recipe),
        device=resident,
        engine=recipe.data.engine,
        view_size=view_size,
        scaled_decode=recipe.data.scaled_decode,
    )


def build_task(recipe: Recipe, data: Data) -> Task:
    """The sizes that a method may depend on."""
    classes = len(data.manifest.classes)
    labeled, unlabeled = data.selected_as("labeled"), data.selected_as("unlabeled")
    labels_N = data.labels_N[data.split.labeled] if labeled is None else labeled.labels_N
    counts = np.bincount(labels_N, minlength=classes)
    return Task(
        num_classes=classes,
        num_labeled=len(labels_N),
        num_unlabeled=len(data.unlabeled_rows) if unlabeled is None else len(unlabeled.rows_N),
        labeled_labels=tuple(labels_N.tolist()),
        labeled_class_counts=tuple(int(n) for n in counts),
        labeled_batch=recipe.data.labeled_batch,
        unlabeled_batch=recipe.data.unlabeled_batch,
        total_steps=recipe.train.steps,
        steps_per_epoch=recipe.train.steps_per_epoch,
    )


def build_streams(recipe: Recipe, data: Data, *, unlabeled: bool) -> list[Stream]:
    """The labelled stream and, for methods that read it, the unlabelled one. Hidden labels go to ``truth_N`` only."""
    labels_N, labeled = data.labels_N, np.asarray(data.split.labeled, dtype=np.int64)
    d = recipe.data
    own = SelectedRows("labeled", data.source, labeled, labels_N[labeled], labels_N[labeled])
    first = data.selected_as("labeled") or own
    count = len(first.rows_N)
    order = parse_order(d.labeled_law, length=count, seed=recipe.seed, batch=d.labeled_batch, stream="labeled")
    streams = [Stream("labeled", first.source, first.rows_N, first.labels_N, first.truth_N, np.ones(count, dtype=bool), order, d.labeled_batch)]
    if unlabeled:
        chosen = data.selected_as("unlabeled")
        source, rows = (data.source, data.unlabeled_rows) if chosen is None else (chosen.source, chosen.rows_N)
        if len(rows) == 0:
            raise DataError(f"label split {data.split.name!r} leaves no unlabeled rows; use data.include_labeled=true or another split")
        order = parse_order(d.unlabeled_law, length=len(rows), seed=recipe.seed, batch=d.unlabeled_batch, stream="unlabeled")
        unknown = np.full(len(rows), -1, dtype=np.int64)
        truth_N = labels_N[rows] if chosen is None else chosen.truth_N
        also_labeled = np.isin(rows, labeled) if source is data.source else np.zeros(len(rows), dtype=bool)
        streams.append(Stream("unlabeled", source, rows, unknown, truth_N, also_labeled, order, d.unlabeled_batch))
    return streams


def build_slot(recipe: Recipe, slot: str, manifest: Manifest, channels: int, size: int | None = None) -> Any:
    """The compiled policy of a recipe slot ("weak", "strong", "eval", or a name in ``augment.extra``) at ``size`` pixels (default: the recipe's)."""
    a = recipe.augment
    if slot not in SLOTS and slot not in a.extra:
        have = ", ".join([*SLOTS, *a.extra])
        raise RecipeError(f"the method asks for a view policy {slot!r}; this recipe has {have}: name one under augment.extra")
    mean, std = (list(measured) if wish == "dataset" else list(wish) for wish, measured in ((a.mean, manifest.mean), (a.std, manifest.std)))
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise RecipeError(f"augment.{key} has {len(values)} numbers, but the images have {channels} channel(s)")
    laws = getattr(a, slot) if slot in SLOTS else a.extra[slot]
    policy = build_policy(laws, size=size or a.size, channels=channels, mean=mean, std=std, geometry=a.geometry)
    check_backend(policy, a.backend)
    return policy


def build_view_policies(recipe: Recipe, views: Mapping[str, View], manifest: Manifest, channels: int) -> dict[str, Any]:
    """View name -> its compiled policy; ``augment.extra`` may hold another one for a stream, named ``labeled_weak``."""

    def slot(view: View) -> str:
        of_stream = f"{view.stream}_{view.policy}"
        return of_stream if of_stream in recipe.augment.extra else view.policy

    return {name: build_slot(recipe, slot(view), manifest, channels, view.size) for name, view in views.items()}


def build_network_and_method(recipe: Recipe, manifest: Manifest, channels: int, task: Task, world: int) -> tuple[nn.Module, Method]:
    """The student network (with the heads its method declares) and the method, on the CPU. Draws weights from torch's current seed."""
    method_class, config = get_method(recipe.method.name), recipe.method.config
    network = build_network(
        recipe.model,
        in_channels=channels,
        num_classes=task.num_classes,
        heads=method_class.heads(config, task),
        batchnorm=recipe.batchnorm,
        world=world,
    )
    frozen = method_class.frozen(config)
    if frozen:
        freeze(network, frozen)
        network.eval_backbone = not any(p.requires_grad for p in network.backbone.parameters())
    return network, build_method(recipe, task)


def build_method(recipe: Recipe, task: Task) -> Method:
    """The method on the CPU; RecipeError for options that do not fit the task."""
    try:
        return get_method(recipe.method.name)(recipe.method.config, task)
    except ValueError as error:
        raise RecipeError(f"method = {recipe.method.name}: {error}") from error


def build_evaluator(recipe: Recipe, manifest: Manifest, split: LabelSplit | None, rows_of: str, channels: int, device: torch.device) -> Evaluator:
    """Evaluation on ``rows_of``: "validation" (train rows that the label split holds out) or the name of a split of the dataset folder."""
    if rows_of == "validation":
        if split is None or len(split.validation) == 0:
            raise DataError("evaluation on 'validation': the label split holds out no validation rows; use data.eval_on=test or a split with validation rows")
        dataset_split, rows_N = split.of, np.asarray(split.validation, dtype=np.int64)
    else:
        if rows_of not in manifest.splits:
            have = ", ".join(sorted(manifest.splits))
            raise DataError(f"the dataset has no split {rows_of!r}; it has {have} (and 'validation' if the label split holds rows out)")
        dataset_split, rows_N = rows_of, None
    source = open_rows(recipe, manifest, dataset_split, device)
    if rows_N is None:
        rows_N = np.arange(source.num_rows, dtype=np.int64)
    rows_N = rows_N[source.labels_N[rows_N] >= 0]  # nobody can say whether an unknown class was hit
    if len(rows_N) == 0:
        raise DataError(f"nothing to evaluate: {rows_of!r} has no rows whose class is known")
    return Evaluator(
        source,
        rows_N,
        source.labels_N[rows_N],
        build_slot(recipe, "eval", manifest, channels),
        size=recipe.augment.size,
        channels=channels,
        num_classes=len(manifest.classes),
        batch=recipe.eval.batch,
        seed=recipe.seed,
        backend=recipe.augment.backend,
        stall_timeout_s=recipe.data.stall_timeout_s,
        predict=partial(get_method(recipe.method.name).predict, recipe.method.config),
    )
