"""What recipes exist: names, titles and results, read from the files' text without importing a method.

A recipe file begins with comment lines ``# Paper:``, ``# Split:``, ``# Command:``, ``# Expected:`` and ``# Measured:``; ``# Measured @VARIANT:`` is about
one variant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastssl.errors import RecipeError
from fastssl.recipe_text import Given, read_layer
from fastssl.recipe_variants import layers_of, pop_variants, public

_NOTE = re.compile(r"^#\s*(expected|measured)(?:\s+@(\S+))?[^:@]*:\s*(.+?)\s*$", re.IGNORECASE)
NOT_RECIPES = ("published.yaml",)


@dataclass(frozen=True)
class Runnable:
    """One thing that ``fastssl train`` accepts: a recipe, or a variant of one. ``measured`` is "" where the header has nothing for it."""

    name: str
    title: str
    method: str
    measured: str

    @property
    def command(self) -> str:
        return f"fastssl train {self.name}"


@dataclass(frozen=True)
class RecipeEntry:
    """One recipe file. ``short`` is what ``fastssl train`` accepts; ``expected`` and ``measured`` are lines of the header ("" when absent).

    ``runnables``: the file itself, or its variants. ``hidden``: names of layers that only other variants of the file can use, with whether one does.
    """

    path: Path
    short: str
    title: str
    method: str
    expected: str
    measured: str
    runnables: tuple[Runnable, ...] = ()
    hidden: dict[str, bool] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(r.name.partition("@")[2] for r in self.runnables if "@" in r.name)


def recipe_paths(root: str | Path = "recipes") -> list[RecipeEntry]:
    """Every recipe below ``root``, sorted by short name; files that start with ``_`` are bases for ``extends`` and not listed."""
    root = Path(root)
    files = sorted(p for p in root.rglob("*.yaml") if not p.name.startswith("_") and p.name not in NOT_RECIPES and not is_plan(p))
    return [_entry(path, root) for path in files]


def is_plan(path: Path) -> bool:
    """Whether the file is a plan of several recipes for ``fastssl selftrain``: its top-level key is ``selftrain``."""
    return re.search(r"^selftrain:", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def runnables(entries: Sequence[RecipeEntry]) -> list[Runnable]:
    """Everything that can be trained, in the order of the files."""
    return [runnable for entry in entries for runnable in entry.runnables]


def _entry(path: Path, root: Path) -> RecipeEntry:
    layer = read_layer(path, "recipe")
    own = pop_variants(layer)
    notes = {(m[1].lower(), m[2] or ""): m[3] for m in map(_NOTE.match, path.read_text(encoding="utf-8").splitlines()) if m}
    method, base_variants = _method_name(layer), {}
    base = layer.get("extends")
    if base is not None and isinstance(base.value, str) and (path.parent / base.value).is_file():
        lower = read_layer(path.parent / base.value, "extends")
        base_variants = {name: v for name, v in pop_variants(lower).items() if name.startswith("_")}
        method = method or _method_name(lower)
    title = str(layer["title"].plain() if "title" in layer else "")
    short = path.relative_to(root).with_suffix("").as_posix()
    known, used = {**base_variants, **own}, set()
    found = []
    for name in public(own):
        layers = layers_of(name, known, short)
        used |= _likes(name, known)
        named = [each for each in layers if "title" in each]
        of_variant = [m for m in map(_method_name, layers) if m]
        own_title = str(named[-1]["title"].plain()) if named else f"{title}, {name}"
        found.append(Runnable(f"{short}@{name}", own_title, of_variant[-1] if of_variant else method, notes.get(("measured", name), "")))
    measured = notes.get(("measured", ""), "")
    if not found:
        found = [Runnable(short, title, method, measured)]
    hidden = {name: name in used for name in own if name.startswith("_")}
    for variant in [v for _, v in notes if v]:
        if variant not in own:
            raise RecipeError(f"{path}: its header has a result of {variant!r}, which is none of its variants: {', '.join(public(own)) or 'it has none'}")
    return RecipeEntry(path, short, title, method, notes.get(("expected", ""), ""), measured, tuple(found), hidden)


def _likes(name: str, known: dict[str, Given]) -> set[str]:
    """Names of the layers below variant ``name``."""
    like = (known[name].value or {}).get("like")
    names = [] if like is None else like.plain()
    below: set[str] = set()
    for other in [names] if isinstance(names, str) else names:
        below |= {other} | _likes(other, known)
    return below


def _method_name(layer: dict[str, Given]) -> str:
    method = layer.get("method.name") or layer.get("method")
    value = method.plain() if method else ""
    name = value.get("name", "") if isinstance(value, dict) else value or ""
    if not isinstance(name, str):
        raise RecipeError(f"{method.where if method else ''}: method.name = {name!r} must be text")
    return name
