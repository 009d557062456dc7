"""The recipes that ship: each one resolves, says where it comes from, and no schema key is decoration."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from fastssl.recipe import config_digest, dump_yaml, load_recipe, resolve, schema_keys
from fastssl.recipe_list import recipe_paths

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = recipe_paths(ROOT / "recipes")
# Knowing a key is not using it:
CHECKS_ONLY = {"recipe.py", "recipe_checks.py", "recipe_text.py", "recipe_values.py", "recipe_list.py", "recipe_notes.py", "schema.py", "cli.py"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.short)
def test_recipe_resolves_and_explains_itself(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # short names work from anywhere
    recipe = load_recipe(entry.short)
    assert recipe == load_recipe(entry.path)
    assert recipe.method.name == entry.method and recipe.title == entry.title != ""
    (tmp_path / "config.yaml").write_text(dump_yaml(recipe))
    assert load_recipe(tmp_path / "config.yaml") == recipe


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.short)
def test_header_of_a_published_recipe(entry):
    text = entry.path.read_text(encoding="utf-8")
    assert text.startswith("# Paper:") and f"\n# Command:  fastssl train {entry.short}\n" in text
    assert f"--name {load_recipe(entry.path).data.split} " in text, "the header's split command makes the split that the recipe reads"
    assert entry.expected and entry.measured
    assert entry.measured == "none yet" or "runs/" in entry.measured or "benchmarks/" in entry.measured, "a measured result names its evidence"


def test_recipes_are_distinct():
    recipes = [load_recipe(e.path) for e in ENTRIES]
    assert len({config_digest(r) for r in recipes}) == len({r.title for r in recipes}) == len(ENTRIES) > 0


def test_cifar10_recipes_carry_the_papers_settings():
    """FixMatch, arXiv:2001.07685, table 4 and section 4: B = 64, mu = 7, K = 2^20, eta = 0.03, beta = 0.9, L2 5e-4, tau = 0.95, 7/16 cosine."""
    for labels in (40, 250, 4000):
        r = resolve(f"cifar10/fixmatch_{labels}").recipe
        assert (r.method.config.threshold, r.data.labeled_batch, r.data.unlabeled_batch, r.data.include_labeled) == (0.95, 64, 448, True)
        assert (r.train.steps, r.train.steps_per_epoch, r.schedule.name, r.schedule.warmup_steps) == (2**20, 1024, "cosine_7_16", 0)
        assert (r.optim.name, r.optim.lr, r.optim.momentum, r.optim.nesterov, r.optim.weight_decay) == ("sgd", 0.03, 0.9, True, 5e-4)
        assert (r.model.name, r.augment.size, r.augment.weak, r.augment.strong) == ("wrn_28_2", 32, "fixmatch_weak", "fixmatch_strong")
        assert (r.teacher.enabled, r.teacher.momentum, r.eval.headline, r.batchnorm.momentum) == (True, 0.999, "ema", 0.001)
        assert r.data.split == f"fixmatch_{labels}_seed0"


@functools.cache
def _nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def reads(source: str, section: str, name: str) -> bool:
    """Whether the text reads ``<anything>.section.name``; in a file that names the section or its dataclass also ``variable.name``,
    ``self.config.name`` and ``getattr(variable, ...)`` beside the text "name".
    """
    nodes = _nodes(source)
    config = {"batchnorm": "BatchNormConfig"}.get(section, f"{section.capitalize()}Config")
    knows = any(isinstance(n, (ast.Name, ast.Attribute, ast.alias)) and (getattr(n, "id", None) or getattr(n, "attr", None) or getattr(n, "name", None)) in
                ({config} | ({section} if section else set())) for n in nodes)  # fmt: skip

    def is_config(owner: ast.AST) -> bool:
        return isinstance(owner, ast.Name) or isinstance(owner, ast.Attribute) and owner.attr in ("config", "cfg")

    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Load):
            owner = node.value
            if not section:
                if isinstance(owner, ast.Name) and owner.id == "recipe" or isinstance(owner, ast.Attribute) and owner.attr == "recipe":
                    return True
            elif isinstance(owner, ast.Attribute) and owner.attr == section or knows and is_config(owner):
                return True
    by_name = [n.args[0] for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "getattr" and n.args]
    listed = any(isinstance(n, ast.Constant) and n.value == name for n in nodes)
    return listed and any(isinstance(owner, ast.Attribute) and owner.attr == section or knows and isinstance(owner, ast.Name) for owner in by_name)


def test_reads_tells_use_from_mention():
    assert reads("x = recipe.data.ahead", "data", "ahead")
    assert reads("def f(cfg: DataConfig): return cfg.ahead", "data", "ahead")
    assert reads("d = recipe.data\nx = d.ahead", "data", "ahead")
    assert reads("s = self.recipe.seed", "", "seed")
    assert reads("for n in ('weak', 'strong'): getattr(recipe.augment, n)", "augment", "weak")
    assert not reads("getattr(recipe.augment, n)", "augment", "weak")
    assert not reads("x = recipe.train.every", "log", "every")
    assert reads("def f(self, cfg: DataConfig): self.config = cfg; return self.config.ahead", "data", "ahead")
    assert not reads("x = thing.ahead", "data", "ahead")
    assert not reads("x = self.config.ahead", "data", "ahead")
    assert not reads("'recipe.data.ahead'  # recipe.data.ahead", "data", "ahead")
    assert not reads("recipe.data.ahead = 3", "data", "ahead")


def name_of(key: str) -> str:
    return key.rpartition(".")[2]


def test_every_schema_key_is_read_somewhere():
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "fastssl").rglob("*.py") if p.name not in CHECKS_ONLY]
    dead = [key for key in schema_keys() if not any(name_of(key) in s and reads(s, key.rpartition(".")[0], name_of(key)) for s in sources)]
    assert not dead, f"schema keys that nothing reads: {dead}"
