"""What the verbs ``recipes`` and ``methods`` print: lists of recipes, variants, published numbers and methods, for people or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastssl.console import print_table
from fastssl.errors import FastSSLError, RecipeError, nearest
from fastssl.published import PublishedRow, by_recipe, load_published, of_table
from fastssl.recipe_list import RecipeEntry, recipe_paths, runnables


def print_recipes(root: Path) -> None:
    """One line per recipe file."""
    found = _entries(root)
    rows = [(e.short, e.method, e.title + (f" ({len(e.variants)} variants)" if e.variants else ""), e.expected) for e in found]
    print_table(("recipe", "method", "title", "expected"), rows)


def print_variants(root: Path, recipe: str) -> None:
    """One line per variant of a recipe (or of the recipes in a folder), with what was published and measured for it."""
    published = by_recipe(load_published(root))
    rows = [(r.command, r.title, _numbers(published.get(r.name, ())), r.measured or "none yet") for r in runnables(_entries(root, recipe))]
    print_table(("command", "title", "published", "measured"), rows)


def print_published(root: Path, recipe: str, table: str) -> None:
    """One line per published number: all, those of one table, those of one recipe."""
    measured = {r.name: r.measured for r in runnables(_entries(root))}
    rows = _published(root, recipe, table)
    if not rows:
        raise FastSSLError(f"no published numbers{f' for {recipe}' if recipe else ''} in {root}")
    cells = [(r.table, r.method, r.setting, r.number, r.metric, _measured(r, measured), r.command, r.source + (f" ({r.note})" if r.note else "")) for r in rows]
    print_table(("table", "method", "setting", "published", "metric", "measured", "command", "source"), cells)


def print_json(root: Path, recipe: str, table: str | None) -> None:
    """``{"recipes": [...], "published": [...]}``; ``table`` and ``recipe`` narrow it down."""
    entries = _entries(root)
    measured = {r.name: r.measured for r in runnables(entries)}
    rows = _published(root, recipe, table or "")
    wanted = runnables(_entries(root, recipe)) if recipe else runnables(entries)
    if table:
        wanted = [r for r in wanted if r.name in {row.recipe for row in rows}]
    published = by_recipe(rows)
    out = {
        "recipes": [
            {**asdict(r), "measured": _known(r.measured), "command": r.command, "published": [_flat(row, measured) for row in published.get(r.name, ())]}
            for r in wanted
        ],
        "published": [_flat(row, measured) for row in rows],
    }
    print(json.dumps(out, indent=1, ensure_ascii=False))


def check(root: Path, recipe: str) -> int:
    """Prove all recipes (or one) and the published rows; prints every fault, then a summary. 0 if there is none, else 1."""
    from fastssl.recipe_proof import prove

    entries, rows = _entries(root, recipe), [] if recipe else load_published(root)
    faults = 0
    for fault in prove(entries, rows):
        print(f"{fault.name}: {fault.why}", flush=True)
        faults += 1
    trainable = len(runnables(entries))
    print(f"{len(entries)} recipes, {trainable} with their variants, {len(rows)} published numbers: {f'{faults} faults' if faults else 'all good'}")
    return 1 if faults else 0


def print_methods(root: Path, name: str | None, *, markdown: bool) -> None:
    """Facts of all methods (or one) as JSON, or the page docs/methods.md."""
    from fastssl import methods

    if markdown:
        from fastssl.method_page import write_page

        if name is not None:
            raise FastSSLError(f"--markdown writes one page about all methods; leave out {name}")
        print(write_page(recipe_paths(root), load_published(root)), end="")
        return
    from fastssl.method_facts import facts_of

    if name is not None and name not in methods.names():
        raise FastSSLError(f"no method {name!r}{nearest(name, methods.names())}; there are: {', '.join(methods.names())}")
    wanted = methods.names() if name is None else [name]
    trained: dict[str, list[str]] = {}
    for runnable in runnables(recipe_paths(root)):
        trained.setdefault(runnable.method, []).append(runnable.name)
    out = [{**facts_of(method).to_dict(), "recipes": trained.get(method, [])} for method in wanted]
    print(json.dumps(out if name is None else out[0], indent=1, ensure_ascii=False))


def _entries(root: Path, recipe: str = "") -> list[RecipeEntry]:
    found = recipe_paths(root)
    if not found:
        raise FastSSLError(f"no recipes (*.yaml) in {root}; name the folder: fastssl recipes FOLDER")
    if not recipe:
        return found
    chosen = [entry for entry in found if entry.short == recipe or entry.short.startswith(f"{recipe}/")]
    if not chosen:
        raise RecipeError(f"{recipe} is a base for other recipes and cannot be trained by itself")
    return chosen


def _published(root: Path, recipe: str, table: str) -> Sequence[PublishedRow]:
    rows = load_published(root)
    rows = of_table(rows, table) if table else rows
    return [row for row in rows if not recipe or f"{row.recipe.partition('@')[0]}/".startswith(f"{recipe}/")]


def _numbers(rows: Sequence[PublishedRow]) -> str:
    return "; ".join(f"{r.number} ({r.method}, {r.metric})" for r in rows if not r.overrides) or "no published figure"


def _measured(row: PublishedRow, measured: dict[str, str]) -> str:
    """What was measured with the very command of a row."""
    return _known("" if row.overrides else measured.get(row.recipe, "")) or ("none yet" if row.recipe else "-")


def _known(measured: str) -> str:
    return "" if measured.startswith("none yet") else measured


def _flat(row: PublishedRow, measured: dict[str, str]) -> dict[str, Any]:
    return {**asdict(row), "command": row.command, "measured": _known("" if row.overrides else measured.get(row.recipe, ""))}
