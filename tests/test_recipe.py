"""Recipes: typing, layers, origins, errors that name place, key, value and the nearest valid one; digest; round trip."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from fastssl import methods, recipe_text, schema
from fastssl.errors import RecipeError
from fastssl.recipe import NOT_IN_DIGEST, config_digest, describe, describe_config, dump_yaml, load_recipe, recipe_from_dict, resolve, schema_keys, to_dict
from fastssl.recipe_list import recipe_paths
from fastssl.recipe_values import coerce


@dataclass(frozen=True)
class _MatchConfig:
    threshold: float = field(default=0.95, metadata={"help": "confidence that selects a pseudo-label"})
    law: typing.Literal["hard", "soft"] = "hard"
    widths: tuple[int, ...] = (1, 2)
    bound: float | None = None  # upper end; "#" is no comment in text

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold = {self.threshold} must be in [0, 1]")


class _Match:
    """A stand-in that reads unlabelled images and no teacher."""

    Config = _MatchConfig
    needs_unlabeled = True
    moves_teacher = False

    @staticmethod
    def needs_teacher(config):
        return config.law == "soft"


class _Plain:
    @dataclass(frozen=True)
    class Config:
        pass

    needs_unlabeled = False
    moves_teacher = True

    @staticmethod
    def needs_teacher(config):
        return False


@pytest.fixture(autouse=True)
def two_methods(monkeypatch):
    """Recipes are tested against two small methods, so that these tests do not move with the real ones."""
    known = {"match": _Match, "plain": _Plain}
    monkeypatch.setattr(methods, "names", lambda: sorted(known))
    monkeypatch.setattr(methods, "get", known.__getitem__)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def _write(text: str, name: str = "r.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return _write


def error(path, *overrides) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_defaults_are_the_schemas(write):
    recipe = load_recipe(write("method: plain\n"))
    assert recipe == schema.Recipe(method=schema.MethodSpec("plain", _Plain.Config()), name="r")


def test_layers_and_origins(write):
    write("method: {name: match, threshold: 0.8}\noptim: {lr: 0.1, momentum: 0.5}\ntrain: {steps: 10}\nname: base\ntitle: Base\n", "sub/base.yaml")
    path = write("extends: base.yaml\noptim:\n  lr: 0.2\ntrain: {steps: 20}\n", "sub/child.yaml")
    resolved = resolve(path, ["train.steps=30", "seed=7"])
    recipe, origins = resolved.recipe, resolved.origins
    assert (recipe.optim.lr, recipe.optim.momentum, recipe.train.steps, recipe.seed) == (0.2, 0.5, 30, 7)
    assert recipe.method == schema.MethodSpec("match", _MatchConfig(threshold=0.8))
    assert (recipe.name, recipe.title) == ("child", ""), "name and title describe one file and are not inherited"
    assert origins["optim.momentum"] == origins["method.threshold"] == "extends sub/base.yaml"
    assert origins["optim.lr"] == "recipe sub/child.yaml"
    assert origins["train.steps"] == origins["seed"] == "command line"
    assert origins["optim.nesterov"] == origins["method.law"] == "default"
    assert set(origins) == {i.key for i in describe(recipe)} == {*schema_keys(), "method.name", *(f"method.{f.name}" for f in dataclasses.fields(_MatchConfig))}


def test_a_layer_that_names_another_method_starts_from_its_defaults(write):
    write("method: {name: match, threshold: 0.8}\n", "base.yaml")
    assert load_recipe(write("extends: base.yaml\nmethod: plain\n")).method.name == "plain"
    assert load_recipe(write("extends: base.yaml\nmethod: {law: soft}\n")).method.config == _MatchConfig(threshold=0.8, law="soft")
    assert load_recipe("base.yaml", ["method=plain"]).method.name == "plain"
    assert load_recipe("base.yaml", ["method.name=match"]).method.config.threshold == 0.8
    assert load_recipe(write("method: plain\n"), ["method.threshold=0.5", "method.name=match"]).method.config.threshold == 0.5


def test_extends_is_one_level(write):
    write("method: plain\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    assert "one level" in error(write("seed: 1\nextends: b.yaml\n", "c.yaml"))
    message = error(write("seed: 1\nextends: aa.yaml\n", "c.yaml"))
    assert message == "c.yaml, line 2: extends = 'aa.yaml': no such file aa.yaml (did you mean 'a.yaml'?)"
    assert "one level" in error(write("method: plain\nextends: c.yaml\n", "c.yaml")), "a recipe that extends itself"
    assert "must be the path of one recipe" in error(write("extends: [a.yaml]\n", "c.yaml"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim:\n  nestrov: true", ("r.yaml, line 3", "'optim.nestrov'", "true", "'optim.nesterov'")),
        ("optmi: {lr: 1}", ("r.yaml, line 2", "'optmi'", "'optim'")),
        ("lr: 0.1", ("r.yaml, line 2", "'lr'", "'optim.lr'")),
        ("optim: {name: sgdd}", ("r.yaml, line 2", "optim.name = 'sgdd'", "sgd, adamw", "did you mean 'sgd'")),
        ("\n\ntrain:\n  steps: ten", ("r.yaml, line 5", "train.steps = 'ten'", "whole number")),
        ("train: {steps: 1.5}", ("train.steps = 1.5", "whole number")),
        ("train: {steps: true}", ("train.steps = true", "whole number")),
        ("train: {steps: 010}", ("train.steps = '010'", "whole number")),
        ("optim: {lr: .inf}", ("optim.lr = inf", "finite")),
        ("optim: {lr: .nan}", ("optim.lr = nan", "finite")),
        ("optim: {lr: false}", ("optim.lr = false", "number")),
        ("optim: {nesterov: yes}", ("optim.nesterov = 'yes'", "true or false")),
        ("optim: {nesterov: 1}", ("optim.nesterov = 1", "true or false")),
        ("title: 3", ("title = 3", "quotes")),
        ("data: {path: null}", ("data.path = null", "text")),
        ("batchnorm: {momentum: low}", ("batchnorm.momentum = 'low'", "number or null")),
        ("optim: {lr_factors: {head: big}}", ("optim.lr_factors", "'head'", "number")),
        ("model: {options: 3}", ("model.options = 3", "mapping")),
        ("optim: 3", ("r.yaml, line 2: optim = 3", "mapping")),
        ("seed: 1\nseed: 2", ("r.yaml, line 3", "'seed'", "twice", "line 2")),
        ("data: {ahead: 1, ahead: 2}", ("'ahead'", "twice")),
        ("1: 2", ("r.yaml, line 2", "must be text")),
        ("title: [", ("r.yaml, line", "not valid YAML")),
        ("title: !!python/object:os.system x", ("r.yaml, line 2", "not valid YAML")),
        ("data: &d {ahead: 1}\ntrain: *d", ("r.yaml, line 3", "alias")),
    ],
)
def test_errors_name_place_key_value_and_nearest(write, text, parts):
    message = error(write("method: plain\n" + text + "\n"))
    assert message.startswith("r.yaml")
    for part in parts:
        assert part in message, f"{part!r} not in {message!r}"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=1", ("'optim.lrr'", "'optim.lr'")),
        ("optim.lr=fast", ("optim.lr = 'fast'", "number")),
        ("optim.lr", ("is not an override", "key=value")),
        ("=3", ("is not an override",)),
        ("optim..lr=3", ("'optim..lr'", "did you mean 'optim.lr'")),
        ("optim.lr=[1", ("optim.lr=[1", "not valid YAML")),
        ("optim.lr.x=3", ("'optim.lr.x'",)),
        ("seed.x=3", ("'seed.x'",)),
        ("method.threshol=0.5", ("method.threshol = 0.5", "did you mean 'threshold'")),
        ("method.threshold=2", ("method = match", "threshold = 2", "[0, 1]")),
        ("method.law=softly", ("method.law = 'softly'", "one of hard, soft", "did you mean 'soft'")),
        ("method.name=mach", ("method.name = 'mach'", "did you mean 'match'")),
        ("method=[match]", ("method.name = ['match']", "not a method")),
    ],
)
def test_errors_of_the_command_line(write, override, parts):
    message = error(write("method: match\n"), override)
    assert message.startswith("command line: ") or "method = match" in message
    for part in parts:
        assert part in message, f"{part!r} not in {message!r}"


def test_missing_method_and_missing_file(write):
    assert "method.name is missing" in error(write("seed: 1\n"))
    assert "a recipe is a mapping" in error(write("- 1\n"))
    assert "a recipe is a mapping" in error(write("# nothing\n"))
    write("method: plain\n", "recipes/set/abc_40.yaml")
    assert "did you mean 'set/abc_40'" in error("set/abc_4")
    assert load_recipe("set/abc_40") == load_recipe("recipes/set/abc_40.yaml")


def test_values_are_read_as_they_are_spelled(write):
    """YAML 1.1 would read no/on/yes as booleans and 1e-3 as text."""
    recipe = load_recipe(
        write(
            "method: {name: match, widths: [3, 4], bound: 1}\n"
            "optim: {lr: 1e-3, weight_decay: '5e-4', momentum: 0, nesterov: false}\n"
            "train: {precision: no, capture: off, steps: 1_048_576, steps_per_epoch: 1e3}\n"
            "data: {device_resident: yes}\n"
            "model: {options: {width: 2, act: no}}\n"
            "batchnorm: {groups: global, momentum: null}\n"
        )
    )
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.momentum) == (1e-3, 5e-4, 0.0)
    assert type(recipe.optim.momentum) is float
    assert (recipe.train.precision, recipe.train.capture, recipe.data.device_resident) == ("no", "off", "yes")
    assert (recipe.train.steps, recipe.train.steps_per_epoch) == (2**20, 1000)
    assert type(recipe.train.steps_per_epoch) is int
    assert recipe.model.options == {"width": 2, "act": "no"}
    assert recipe.method.config == _MatchConfig(widths=(3, 4), bound=1.0)


def test_overrides(write):
    path = write("method: match\nmodel: {options: {dropout: 0.5, width: 1}}\n")
    recipe = load_recipe(
        path,
        ["model.options.dropout=0.1", "data.split=40", "title=a: b", "model.weights=", "seed=1", "seed=2", "optim.lr_factors.^back\\.=0.1", "log.trackers=[]",
         "train.precision=no"],
    )  # fmt: skip
    assert recipe.model.options == {"dropout": 0.1, "width": 1}
    assert (recipe.data.split, recipe.title, recipe.model.weights, recipe.seed) == ("40", "a: b", "", 2)
    assert recipe.optim.lr_factors == {"^back\\.": 0.1}
    assert recipe.log.trackers == [] and recipe.train.precision == "no"
    assert load_recipe(path, ["model.options={}"]).model.options == {}


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("train.steps", 0, "at least 1"),
        ("data.labeled_batch", 0, "at least 1"),
        ("data.unlabeled_batch", 0, "reads unlabelled"),
        ("data.stall_timeout_s", 0, "greater than 0"),
        ("optim.lr", -1, "greater than 0"),
        ("optim.weight_decay", -1, "not be negative"),
        ("optim.betas", "[0.9]", "two numbers"),
        ("optim.freeze", "['(']", "regular expressions"),
        ("optim.momentum", 1, "[0, 1)"),
        ("optim.momentum", 0, "optim.nesterov"),
        ("seed", -1, "not be negative"),
        ("seed", 2**63, "2**63"),
        ("name", "../x", "relative path"),
        ("name", "/x", "relative path"),
        ("batchnorm.groups", 0, "at least 1"),
        ("batchnorm.groups", 3, "must divide data.labeled_batch=64"),
        ("batchnorm.groups", "all", "or global"),
        ("batchnorm.groups", "true", "or global"),
        ("batchnorm.momentum", 0, "(0, 1]"),
        ("teacher.enabled", "false", "eval.headline=raw"),
        ("teacher.momentum", 1.5, "[0, 1]"),
        ("teacher.when", "by_method", "never moves the teacher"),
        ("teacher.buffers", "copy_matching", "both or neither"),
        ("teacher.buffers_matching", "x", "both or neither"),
        ("augment.weak", "[]", "policy name"),
        ("augment.weak", "[{a: 1, b: 2}]", "policy name"),
        ("augment.mean", "[2]", "[0, 1]"),
        ("augment.std", "[0.0]", "(0, 1]"),
        ("log.trackers", "[mlflow]", "tensorboard and wandb"),
        ("schedule.milestones", "[1]", "both or neither"),
        ("schedule.name", "multistep", "both or neither"),
        ("schedule.warmup_epochs", 1, "schedule.warmup_steps"),
        ("schedule.warmup_steps", 1024, "less than train.steps"),
    ],
)
def test_cross_checks(write, key, value, why):
    message = error(write("method: match\n"), f"{key}={value}")
    assert why in message and ("command line" in message or "r.yaml" in message)


def test_cross_checks_know_the_method(write):
    path = write("method: match\nteacher: {enabled: false}\neval: {headline: raw}\n")
    assert load_recipe(path).teacher.enabled is False
    assert "teacher.enabled = false must be true: match asks the teacher" in error(path, "method.law=soft")
    assert error(path, "method.law=soft").startswith("r.yaml, line 2")
    assert load_recipe(write("method: plain\n"), ["data.unlabeled_batch=0"]).data.unlabeled_batch == 0
    assert load_recipe(path, ["batchnorm.groups=8"]).batchnorm.groups == 8


@pytest.mark.parametrize("overrides", [[], ["train.precision=no", "title='1e-3'", "optim.lr=1e-9", "model.options={a: [1, {b: 'off'}], c: null}", "name=x/y"]])
def test_dump_round_trips_and_plain_yaml_reads_it(write, overrides):
    recipe = load_recipe(write("method: {name: match, widths: [5]}\n"), overrides)
    again = load_recipe(write(dump_yaml(recipe), "config.yaml"))
    assert again == recipe and config_digest(again) == config_digest(recipe)
    assert recipe_from_dict(to_dict(recipe)) == recipe
    assert yaml.safe_load(dump_yaml(recipe)) == to_dict(recipe), "other YAML readers must not misread no/off/1e-3"


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)))
@example({"0:0": ""})
def test_dumped_values_read_back(values):
    assert recipe_text.parse(recipe_text.dump({"a": values}), "x", "x").plain() == {"a": values}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_spelling_is_a_number(x):
    for text in (repr(x), f"{x:e}", f"{x:g}"):
        assert coerce(recipe_text.parse(text, "x", "x").plain(), float) == float(text)
        assert coerce(text, float) == float(text)


def test_a_bool_is_no_number_even_among_choices():
    assert coerce(1, typing.Any, (1, 2)) == 1
    for value, choices in ((True, (1, 2)), (0, (True, False))):
        with pytest.raises(ValueError, match="must be one of"):
            coerce(value, typing.Any, choices)


def test_digest_moves_with_the_numbers_and_only_with_them(write):
    path = write("method: match\n")
    digest = config_digest(load_recipe(path))
    free = {
        "name": "other", "title": "t", "runs_dir": "elsewhere", "log.every": 17, "log.trackers": "[]", "log.project": "p", "checkpoint.every": 17,
        "checkpoint.keep": 17, "train.threads": 17, "data.ahead": 17, "data.workers": 17, "data.stall_timeout_s": 17, "data.device_resident": "no",
    }  # fmt: skip
    assert set(free) == set(NOT_IN_DIGEST)
    for key, value in free.items():
        assert config_digest(load_recipe(path, [f"{key}={value}"])) == digest, key
    changed = ["seed=1", "optim.lr=0.5", "data.path=x", "method.threshold=0.1", "train.steps=5", "data.split=s"]
    digests = {config_digest(load_recipe(path, [o])) for o in changed}
    assert len(digests | {digest}) == len(changed) + 1


def test_digest_does_not_depend_on_layers_or_spelling(write):
    one = load_recipe(write("method: match\noptim: {lr: 1}\nseed: 3\nmodel: {options: {a: 1, b: 2}}\n", "a.yaml"))
    two = load_recipe(write("seed: 0\nmethod: {name: match, threshold: 0.95}\nmodel: {options: {b: 2, a: 1}}\n", "b.yaml"), ["optim.lr=1.0", "seed=3"])
    assert config_digest(one) == config_digest(two)


def test_every_key_has_help_and_every_default_passes_its_own_type():
    for info in describe(schema.Recipe(method=schema.MethodSpec("match", _MatchConfig()))):
        assert info.type and (info.help or info.key.startswith("method."))
    assert recipe_from_dict(to_dict(schema.Recipe(method=schema.MethodSpec("match", _MatchConfig())))).name == "run"


def test_config_help_is_metadata_or_the_comment_behind_the_field():
    found = {i.key: i for i in describe_config(_MatchConfig(threshold=0.5))}
    assert (found["method.threshold"].value, found["method.threshold"].default) == (0.5, 0.95)
    assert found["method.threshold"].help == "confidence that selects a pseudo-label"
    assert found["method.bound"].help == 'upper end; "#" is no comment in text' and found["method.bound"].type == "number or null"
    assert found["method.widths"].help == "" and found["method.law"].type == "one of hard, soft"


def test_listing(write):
    write("method: plain\n", "recipes/s/_base.yaml")
    write("# Expected: 12.5 %\n# Measured: none yet\ntitle: One\nextends: _base.yaml\n", "recipes/s/one.yaml")
    write("method: {name: match}\n", "recipes/two.yaml")
    found = [(e.short, e.method, e.title, e.expected, e.measured) for e in recipe_paths()]
    assert found == [("s/one", "plain", "One", "12.5 %", "none yet"), ("two", "match", "", "", "")]
