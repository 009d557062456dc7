"""What must hold between and within recipe values, beyond their types; every rule names the key that breaks it.

Existence of files, policies, networks and order laws is checked by the part that opens them, before the first step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from fastssl.schema import Recipe

Fail = Callable[[str, str], None]
"""``fail(key, why)`` raises RecipeError with the key's value and place."""

AT_LEAST_ONE = (
    "train.steps", "train.steps_per_epoch", "data.labeled_batch", "data.ahead", "augment.size", "eval.batch", "checkpoint.keep", "log.every",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "data.unlabeled_batch", "data.workers", "train.threads", "eval.every", "checkpoint.every", "optim.weight_decay", "optim.clip_norm",
    "schedule.warmup_steps", "schedule.warmup_epochs", "schedule.warmup_from", "schedule.gamma", "schedule.decay",
)  # fmt: skip
ABOVE_ZERO = ("optim.lr", "data.stall_timeout_s")


def value_of(recipe: Recipe, key: str) -> Any:
    """The value behind a dotted key of the schema (``method.*`` reads the method's Config)."""
    section, _, name = key.partition(".")
    if section == "method":
        return recipe.method.name if name == "name" else getattr(recipe.method.config, name)
    return getattr(getattr(recipe, section), name) if name else getattr(recipe, section)


def check(recipe: Recipe, method: Any, fail: Fail) -> None:
    """Run every rule; ``method`` is the method's class (or None when unknown)."""
    for keys, ok, why in (
        (AT_LEAST_ONE, lambda v: v >= 1, "must be at least 1"),
        (NOT_NEGATIVE, lambda v: v >= 0, "must not be negative"),
        (ABOVE_ZERO, lambda v: v > 0, "must be greater than 0"),
    ):
        for key in keys:
            if not ok(value_of(recipe, key)):
                fail(key, why)
    if recipe.seed >= 2**63:
        fail("seed", "must be below 2**63")
    name = PurePosixPath(recipe.name)
    if not recipe.name.strip() or name.is_absolute() or ".." in name.parts or "\\" in recipe.name:
        fail("name", "names a folder under runs_dir: a relative path without '..'")
    reads_unlabeled = method is None or bool(method.needs_unlabeled)
    _check_data(recipe, fail, reads_unlabeled)
    _check_augment(recipe, fail)
    _check_batchnorm(recipe, fail, reads_unlabeled)
    _check_teacher(recipe, method, fail)
    _check_optim(recipe, fail)
    _check_schedule(recipe, fail)
    trackers = recipe.log.trackers
    if not _list_of(trackers, str) or not set(trackers) <= {"tensorboard", "wandb"}:
        fail("log.trackers", "must be a list of tensorboard and wandb, or [] for none")


def _check_data(recipe: Recipe, fail: Fail, reads_unlabeled: bool) -> None:
    if reads_unlabeled and recipe.data.unlabeled_batch < 1:
        fail("data.unlabeled_batch", f"must be at least 1: {recipe.method.name} reads unlabelled images")
    if recipe.data.device_resident == "yes" and recipe.data.source not in ("auto", "arrays"):
        fail("data.device_resident", f"only the arrays source can keep a dataset on the device, not data.source={recipe.data.source}")


def _check_augment(recipe: Recipe, fail: Fail) -> None:
    for slot in ("weak", "strong", "eval"):
        policy = getattr(recipe.augment, slot)
        listed = isinstance(policy, list) and all(isinstance(law, str) or isinstance(law, dict) and len(law) == 1 for law in policy)
        if not (isinstance(policy, str) and policy or listed and policy):
            fail(f"augment.{slot}", "must be a policy name, or a list of law names and {law: options} entries")
    for name, low in (("mean", 0.0), ("std", math.nextafter(0.0, 1.0))):
        value = getattr(recipe.augment, name)
        if value != "dataset" and not (_list_of(value, float) and value and all(low <= v <= 1 for v in value)):
            fail(f"augment.{name}", f"must be 'dataset' or one number per channel in {'[' if low == 0 else '('}0, 1]")


def _check_batchnorm(recipe: Recipe, fail: Fail, reads_unlabeled: bool) -> None:
    groups, momentum, eps = recipe.batchnorm.groups, recipe.batchnorm.momentum, recipe.batchnorm.eps
    if groups != "global" and not (isinstance(groups, int) and not isinstance(groups, bool) and groups >= 1):
        fail("batchnorm.groups", "must be a whole number of at least 1, or global")
    if isinstance(groups, int):
        for key in ("labeled_batch", "unlabeled_batch") if reads_unlabeled else ("labeled_batch",):
            batch = getattr(recipe.data, key)
            if batch % groups:
                fail("batchnorm.groups", f"must divide data.{key}={batch}, so that every group holds equal shares of every view")
    if momentum is not None and not 0 < momentum <= 1:
        fail("batchnorm.momentum", "must be in (0, 1]: the weight of the NEW statistics (TensorFlow's 0.999 is 0.001 here)")
    if eps is not None and eps <= 0:
        fail("batchnorm.eps", "must be greater than 0")


def _check_teacher(recipe: Recipe, method: Any, fail: Fail) -> None:
    teacher = recipe.teacher
    if not 0 <= teacher.momentum <= 1:
        fail("teacher.momentum", "must be in [0, 1]: the weight of the OLD average")
    if not teacher.enabled:
        if recipe.eval.headline == "ema":
            fail("eval.headline", "needs teacher.enabled=true; set eval.headline=raw to report the student")
        if method is not None and method.needs_teacher(recipe.method.config):
            fail("teacher.enabled", f"must be true: {recipe.method.name} asks the teacher in its loss")
    elif teacher.when == "by_method" and method is not None and not method.moves_teacher:
        fail("teacher.when", f"{recipe.method.name} never moves the teacher, which would stay at its start; use after_step or before_forward")
    if teacher.shuffle and teacher.mode != "train":
        fail("teacher.shuffle", "needs teacher.mode=train: in eval mode no row depends on the others")
    if teacher.shuffle and recipe.batchnorm.groups in (1, "global"):
        fail("teacher.shuffle", "needs batchnorm.groups of at least 2: one group has the same rows in any order")
    if (teacher.buffers == "copy_matching") != bool(teacher.buffers_matching):
        fail("teacher.buffers_matching", "is a regular expression for teacher.buffers=copy_matching: give both or neither")
    if not _is_pattern(teacher.buffers_matching):
        fail("teacher.buffers_matching", "is not a valid regular expression")


def _check_optim(recipe: Recipe, fail: Fail) -> None:
    optim = recipe.optim
    if not 0 <= optim.momentum < 1:
        fail("optim.momentum", "must be in [0, 1)")
    if optim.name == "sgd" and optim.nesterov and optim.momentum == 0:
        fail("optim.nesterov", "needs optim.momentum > 0; set optim.nesterov=false for plain SGD")
    if not (_list_of(optim.betas, float) and len(optim.betas) == 2 and all(0 <= b < 1 for b in optim.betas)):
        fail("optim.betas", "must be two numbers in [0, 1)")
    for key, patterns in (("no_decay", optim.no_decay), ("freeze", optim.freeze), ("lr_factors", list(optim.lr_factors))):
        if not _list_of(patterns, str) or not all(_is_pattern(p) for p in patterns):
            fail(f"optim.{key}", "must hold valid regular expressions on parameter names")
    if any(factor < 0 for factor in optim.lr_factors.values()):
        fail("optim.lr_factors", "must hold factors that are not negative")


def _check_schedule(recipe: Recipe, fail: Fail) -> None:
    schedule = recipe.schedule
    if schedule.warmup_steps and schedule.warmup_epochs:
        fail("schedule.warmup_epochs", f"cannot be combined with schedule.warmup_steps={schedule.warmup_steps}")
    if schedule.warmup_epochs and schedule.name not in ("cosine_epoch", "multistep"):
        fail("schedule.warmup_epochs", f"only cosine_epoch and multistep read it, not {schedule.name}; use schedule.warmup_steps")
    if schedule.warmup_steps >= recipe.train.steps and schedule.warmup_steps:
        fail("schedule.warmup_steps", f"must be less than train.steps={recipe.train.steps}")
    milestones = schedule.milestones
    if not _list_of(milestones, float) or sorted(set(milestones)) != list(milestones):
        fail("schedule.milestones", "must be a list of ascending epochs")
    if (schedule.name == "multistep") != bool(milestones):
        fail("schedule.milestones", "go with schedule.name=multistep: give both or neither")


def _list_of(value: Any, kind: type) -> bool:
    """A list of ``kind``; ``float`` also takes whole numbers, never bools."""
    kinds = (int, float) if kind is float else (kind,)
    return isinstance(value, (list, tuple)) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
