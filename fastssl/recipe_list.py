"""What recipes exist: names, titles and expected results, read from the files' text without importing a method."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fastssl.errors import RecipeError
from fastssl.recipe_text import Given, read_layer

_EXPECTED = re.compile(r"^#\s*(expected|measured)[^:]*:\s*(.+?)\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class RecipeEntry:
    """One recipe file. ``short`` is what ``fastssl train`` accepts; ``expected`` and ``measured`` are lines of the header ("" when absent)."""

    path: Path
    short: str
    title: str
    method: str
    expected: str
    measured: str


def recipe_paths(root: str | Path = "recipes") -> list[RecipeEntry]:
    """Every recipe below ``root``, sorted by short name; files that start with ``_`` are bases for ``extends`` and not listed."""
    root = Path(root)
    files = sorted(p for p in root.rglob("*.yaml") if not p.name.startswith("_"))
    return [_entry(path, root) for path in files]


def _entry(path: Path, root: Path) -> RecipeEntry:
    layer = read_layer(path, "recipe")
    notes = {m[1].lower(): m[2] for m in map(_EXPECTED.match, path.read_text(encoding="utf-8").splitlines()) if m}
    method = _method_name(layer)
    base = layer.get("extends")
    if not method and base is not None and isinstance(base.value, str) and (path.parent / base.value).is_file():
        method = _method_name(read_layer(path.parent / base.value, "extends"))
    title = layer["title"].plain() if "title" in layer else ""
    return RecipeEntry(path, path.relative_to(root).with_suffix("").as_posix(), str(title), method, notes.get("expected", ""), notes.get("measured", ""))


def _method_name(layer: dict[str, Given]) -> str:
    method = layer.get("method")
    value = method.plain() if method else ""
    name = value.get("name", "") if isinstance(value, dict) else value or ""
    if not isinstance(name, str):
        raise RecipeError(f"{method.where if method else ''}: method.name = {name!r} must be text")
    return name
