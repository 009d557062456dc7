"""Variants inside a recipe file: layers, names, and errors that say what there is."""

import pytest

from fastssl.errors import RecipeError
from fastssl.recipe import dump_yaml, load_recipe, resolve

BASE = """
method: {name: fixmatch}
train: {steps: 100}
variants:
  _long: {train.steps: 5000}
  _slow: {train: {steps: 200}, optim: {lr: 0.001}}
  hidden_from_children: {seed: 9}
"""
FILE = """
extends: _base.yaml
title: FixMatch somewhere
data: {split: s}
variants:
  long: {like: [_slow, _long], method.threshold: 0.7}
  exp=0: {like: _slow, title: "first, with a title"}
  erm: {method: {name: erm}}
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "_base.yaml").write_text(BASE)
    (tmp_path / "fix.yaml").write_text(FILE)
    return "fix"


def test_layers_come_in_order_and_keep_their_origin(file):
    resolved = resolve("fix@long", ["seed=3"])
    recipe = resolved.recipe
    assert (recipe.train.steps, recipe.optim.lr, recipe.method.config.threshold, recipe.seed) == (5000, 0.001, 0.7, 3)
    assert resolved.origins["train.steps"] == "extends _base.yaml" and resolved.origins["method.threshold"] == "recipe fix.yaml"
    assert (recipe.name, recipe.title) == ("fix_long", "FixMatch somewhere, long")
    assert load_recipe("fix@long", ["train.steps=7"]).train.steps == 7


def test_a_variant_may_name_itself_and_another_method(file):
    first = load_recipe("fix@exp=0")
    assert (first.name, first.title, first.train.steps) == ("fix_exp0", "first, with a title", 200)
    assert load_recipe("fix@erm").method.name == "erm"


def test_a_resolved_variant_is_a_plain_recipe(file, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(load_recipe("fix@long")))
    assert load_recipe("config.yaml") == load_recipe("fix@long")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fix", "comes in variants; name one as fix@NAME: long, exp=0, erm"),
        ("fix@lng", "no variant 'lng' .did you mean 'long'.*known: long, exp=0, erm"),
        ("fix@_slow", "no variant '_slow'"),
        ("fix@hidden_from_children", "no variant"),
        ("_base@", "comes in variants"),
    ],
)
def test_errors_say_what_there_is(file, name, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(name)


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ("variants: [a]", "must be a mapping of names"),
        ("variants: {a: 3}", "variant 'a' = 3 must be a mapping"),
        ("variants: {a: {like: [b]}}", "like = 'b' is no variant"),
        ("variants: {a: {like: [b]}, b: {like: a}}", "built on itself"),
        ("variants: {a: {like: [a]}}", "built on itself"),
        ("variants: {a: {optim.lrr: 3}}", "optim.lrr"),
        ("variants: {a: {like: {}}}", "like"),
    ],
)
def test_faults_in_a_file(tmp_path, monkeypatch, variants, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("method: {name: erm}\n" + variants)
    with pytest.raises(RecipeError, match=words):
        load_recipe("r@a")


def test_default_is_taken_when_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("method: {name: erm}\nvariants: {default: {seed: 5}, other: {seed: 6}}")
    assert load_recipe("r").seed == 5 and load_recipe("r").name == "r" and load_recipe("r@other").seed == 6
