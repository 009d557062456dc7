"""Plans: the YAML files behind ``fastssl selftrain``. A plan names the recipes of its training steps and what is scored and selected in between.

selftrain:
  teacher: {recipe: selftrain/mnist_net@teacher}      # or {run: runs/demo/..., checkpoint: last}
  pool: {rows: unlabeled}                             # fastssl/selftrain/score.py, Pool
  score: {p: 10}                                      # Scoring, below
  select: {k: 1000}                                   # fastssl/selftrain/rules.py, Rule
  student: {recipe: selftrain/mnist_net@student, images_seen: 1e9, epochs: 14, set: {optim.lr: 0.6}}
  finetune: {recipe: selftrain/mnist_net@finetune}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastssl.errors import FastSSLError, RecipeError, nearest
from fastssl.recipe import config_digest, find_recipe, load_recipe, schema_keys
from fastssl.recipe_text import parse_override, read_layer
from fastssl.schema import Recipe
from fastssl.selftrain.rules import Rule, rule_from
from fastssl.selftrain.score import Pool

TRAINING = ("teacher", "student", "finetune")
STEPS = ("teacher", "score", "select", "student", "finetune")


@dataclass(frozen=True)
class Training:
    """One training step.

    ``recipe``: file or short name, ``@VARIANT`` where it has some; ``set``: recipe keys over it.  ``run`` (teacher only): a finished run instead.
    ``checkpoint``: which weights are handed on.  ``images_seen`` > 0: sets train.steps to that many labelled images, in ``epochs`` equal parts
    (train.steps_per_epoch).
    ``selection_as`` (student only): whether the selection is its labelled stream, or the unlabelled one beside the labels.
    ``frozen_teacher``: the step's method also reads the teacher's weights (teacher.start).
    """

    recipe: str = ""
    run: str = ""
    checkpoint: str = "last"
    images_seen: float = 0
    epochs: int = 1
    selection_as: str = "labeled"
    frozen_teacher: bool = False
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scoring:
    """How the pool is scored: ``p`` classes per image, ``unit_rows`` images per unit, ``batch`` per forward pass, ``precision`` of the backbone."""

    p: int = 10
    unit_rows: int = 20_000
    batch: int = 256
    precision: str = "auto"
    lease_s: float = 120.0


@dataclass(frozen=True)
class Plan:
    """A whole plan. ``rounds`` > 1: the last network of a round is the teacher of the next. ``finetune`` None: the student is the end (Noisy Student)."""

    file: str
    teacher: Training
    student: Training
    finetune: Training | None = None
    name: str = ""
    title: str = ""
    seed: int = 0
    runs_dir: str = "runs"
    rounds: int = 1
    pool: Pool = field(default_factory=Pool)
    score: Scoring = field(default_factory=Scoring)
    select: Rule = field(default_factory=Rule)
    set: dict[str, Any] = field(default_factory=dict)  # recipe keys for every training step

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name / f"seed{self.seed}"

    def recipe(self, step: str, extra: Mapping[str, Any] | None = None) -> Recipe:
        """The resolved recipe of a training step, with ``extra`` keys over it (those that only the pipeline knows). Raises RecipeError."""
        stage: Training = getattr(self, step)
        where = _beside(self.file, stage.recipe)
        values = {**self.set, **stage.set, "seed": self.seed, "name": f"{self.name}-{step}", **(extra or {})}
        recipe = load_recipe(where, _words(values))
        if stage.images_seen:
            steps = max(1, round(stage.images_seen / recipe.data.labeled_batch))
            lengths = {"train.steps": steps, "train.steps_per_epoch": -(-steps // max(1, stage.epochs))}
            recipe = load_recipe(where, _words({**values, **lengths}))
        return recipe

    def identity(self) -> dict[str, Any]:
        """What must not change between two starts of one pipeline, by step; equal values promise equal work."""
        trained = {step: config_digest(self.recipe(step)) for step in TRAINING if getattr(self, step) is not None and not getattr(self, step).run}
        handed_on = {step: [s.run, s.checkpoint, s.selection_as, s.frozen_teacher] for step in TRAINING if (s := getattr(self, step)) is not None}
        score = {name: value for name, value in asdict(self.score).items() if name != "lease_s"}
        return {"pool": asdict(self.pool), "score": score, "select": self.select.as_dict(), **trained, "handed_on": handed_on}


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a plan and put KEY=VALUE over it. Raises RecipeError for whatever does not mean anything.

    ``teacher.KEY``, ``student.KEY``, ``finetune.KEY`` change that step (its fields, else its recipe's keys); ``pool.``, ``score.``, ``select.`` and the plan's
    own keys change the plan; any other recipe key goes to every training step.
    """
    file = find_recipe(path)
    layer = read_layer(file, "plan")
    if set(layer) != {"selftrain"} or not isinstance(layer["selftrain"].value, dict):
        raise RecipeError(f"{file} is no plan: it must hold one key, selftrain, a mapping; a single recipe is trained with `fastssl train`")
    values: dict[str, Any] = layer["selftrain"].plain()
    for text in overrides:
        key, given = parse_override(text)
        _put(values, key, given.plain())
    values.setdefault("name", file.stem)
    try:
        return _build(values, str(file))
    except FastSSLError as error:
        raise RecipeError(f"{file}: {error}") from None


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    section, dot, name = key.partition(".")
    own = {f.name for f in fields(Plan)} - {"file", "set"}
    if section in TRAINING and dot:
        stage = values.setdefault(section, {})
        if name in {f.name for f in fields(Training)} - {"set"}:
            stage[name] = value
        else:
            stage.setdefault("set", {})[name] = value
    elif section in ("pool", "score", "select") and dot:
        part, _, entry = name.partition(".")
        target = values.setdefault(section, {})
        if entry:
            target.setdefault(part, {})[entry] = value
        else:
            target[name] = value
    elif key in own:
        values[key] = value
    elif key in schema_keys() or key.rpartition(".")[0] in schema_keys() or section == "method":
        values.setdefault("set", {})[key] = value
    else:
        raise RecipeError(f"command line: {key} is neither a key of the plan nor of a recipe{nearest(key, [*own, *schema_keys()])}")


def _build(values: dict[str, Any], file: str) -> Plan:
    known = [f.name for f in fields(Plan) if f.name != "file"]
    for name in values:
        if name not in known:
            raise RecipeError(f"selftrain.{name} is no key of a plan{nearest(name, known)}; there are: {', '.join(known)}")
    parts: dict[str, Any] = {name: value for name, value in values.items() if name in ("name", "title", "seed", "runs_dir", "rounds", "set")}
    for step in ("teacher", "student"):
        if not values.get(step):
            raise RecipeError(f"selftrain.{step} is missing: name its recipe")
    for step in TRAINING:
        if values.get(step):
            parts[step] = _typed(Training, values[step], step)
    parts["pool"] = _typed(Pool, values.get("pool"), "pool")
    parts["score"] = _typed(Scoring, values.get("score"), "score")
    parts["select"] = rule_from(values.get("select") or {})
    plan = Plan(file=file, **parts)
    if not isinstance(plan.rounds, int) or plan.rounds < 1:
        raise RecipeError(f"selftrain.rounds = {plan.rounds!r} must be a whole number, at least 1")
    if not isinstance(plan.seed, int) or plan.seed < 0:
        raise RecipeError(f"selftrain.seed = {plan.seed!r} must be a whole number, at least 0")
    for step in TRAINING:
        stage = getattr(plan, step)
        if stage is not None and step != "teacher" and stage.run:
            raise RecipeError(f"selftrain.{step}.run: only the teacher may be a run that exists already")
        if stage is not None and bool(stage.recipe) == bool(stage.run):
            raise RecipeError(f"selftrain.{step} needs a recipe{' or a run, one of the two' if step == 'teacher' else ''}")
        if stage is not None and not stage.run:
            plan.recipe(step)
    select = replace(plan.select, seed=plan.select.seed or plan.seed)
    return replace(plan, select=select)


def _typed(kind: Any, values: Any, where: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    if values is not None and not isinstance(values, Mapping):
        raise RecipeError(f"selftrain.{where} = {values!r} must be a mapping of keys: {', '.join(known)}")
    for name, value in (values or {}).items():
        if name not in known:
            raise RecipeError(f"selftrain.{where}.{name} is no key of this part{nearest(name, known)}; there are: {', '.join(known)}")
        wanted = str(known[name].type).partition("[")[0]
        kinds: Any = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict": dict}[wanted]
        if not isinstance(value, kinds) or (isinstance(value, bool) and wanted != "bool"):
            raise RecipeError(f"selftrain.{where}.{name} = {value!r} must be of type {wanted}")
    return kind(**(values or {}))


def _beside(file: str, recipe: str) -> str:
    """A recipe's name, which may be a file beside the plan."""
    text, at, variant = recipe.partition("@")
    for name in (text, f"{text}.yaml"):
        if (Path(file).parent / name).is_file():
            return f"{Path(file).parent / name}{at}{variant}"
    return recipe


def _words(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
