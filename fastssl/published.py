"""Published numbers: recipes/published.yaml as flat rows, each with its source and the recipe that should give it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastssl.errors import RecipeError, nearest
from fastssl.recipe_text import read_layer

FILE = "published.yaml"
PUBLISHED_ONLY = "published only"
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)(?:\s*\+-\s*(\d+(?:\.\d+)?))?")
_TABLE_KEYS = ("title", "source", "metric", "note", "columns", "rows")
_ROW_KEYS = ("method", "recipe", "recipes", "values", "overrides", "note")


@dataclass(frozen=True)
class PublishedRow:
    """One published number, in percent; ``number`` is its text (``62.9 +- 0.36``), ``deviation`` None where none is given.

    ``recipe``: what trains it ("" = published only), with ``overrides`` beside it.
    """

    table: str
    method: str
    setting: str
    number: str
    value: float
    deviation: float | None
    metric: str
    source: str
    note: str
    recipe: str
    overrides: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command line that trains it, or "published only"."""
        return " ".join(["fastssl train", self.recipe, *self.overrides]) if self.recipe else PUBLISHED_ONLY


def load_published(root: str | Path = "recipes") -> list[PublishedRow]:
    """All rows of ``<root>/published.yaml`` in the file's order, [] if there is no such file. RecipeError says what is wrong with a table."""
    path = Path(root) / FILE
    if not path.is_file():
        return []
    content = {name: given.plain() for name, given in read_layer(path, "published").items()}
    tables = content.get("tables")
    if set(content) != {"tables"} or not isinstance(tables, dict):
        raise RecipeError(f"{path}: it holds one key, tables, a mapping of names to tables")
    return [row for name, table in tables.items() for row in _rows(name, table, f"{path}: table {name!r}")]


def table_names(rows: Sequence[PublishedRow]) -> list[str]:
    """Names of the tables in order."""
    return list(dict.fromkeys(row.table for row in rows))


def of_table(rows: Sequence[PublishedRow], table: str) -> list[PublishedRow]:
    """The rows of one table; RecipeError names the nearest for a table that does not exist."""
    if table not in table_names(rows):
        raise RecipeError(f"no table {table!r} of published numbers{nearest(table, table_names(rows))}; there are: {', '.join(table_names(rows))}")
    return [row for row in rows if row.table == table]


def by_recipe(rows: Sequence[PublishedRow]) -> dict[str, list[PublishedRow]]:
    """Recipe name -> its rows, those that need no override first."""
    found: dict[str, list[PublishedRow]] = {}
    for row in sorted(rows, key=lambda row: len(row.overrides)):
        if row.recipe:
            found.setdefault(row.recipe, []).append(row)
    return found


def _rows(name: str, table: Any, where: str) -> list[PublishedRow]:
    _check_keys(table, _TABLE_KEYS, ("title", "source", "metric", "columns", "rows"), where)
    found = []
    for row in table["rows"]:
        _check_keys(row, _ROW_KEYS, ("method", "values"), where)
        here = f"{where}, row {row['method']!r}"
        columns: Mapping[str, str] = table["columns"]
        variants, values = list(columns.values()), row["values"]
        if "recipe" in row and "recipes" in row:
            raise RecipeError(f"{here} has recipe and recipes; keep one")
        recipes = row.get("recipes", [f"{row['recipe']}@{v}" if v else "" for v in variants] if "recipe" in row else [""] * len(variants))
        if not len(variants) == len(values) == len(recipes):
            raise RecipeError(f"{here} has {len(values)} values and {len(recipes)} recipes for {len(variants)} columns")
        note = "; ".join(n for n in (table.get("note", ""), row.get("note", "")) if n)
        for setting, variant, value, recipe in zip(columns, variants, values, recipes, strict=True):
            if value is not None:
                number, deviation = _number(value, here)
                overrides = tuple(o.replace("{labels}", variant.rpartition("_")[2]) for o in row.get("overrides", ())) if recipe else ()
                found.append(
                    PublishedRow(name, row["method"], setting, str(value), number, deviation, table["metric"], table["source"], note, recipe, overrides)
                )
    return found


def _check_keys(entry: Any, known: Sequence[str], needed: Sequence[str], where: str) -> None:
    if not isinstance(entry, Mapping):
        raise RecipeError(f"{where}: {entry!r} must be a mapping with {', '.join(needed)}")
    for key in entry:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{nearest(key, known)}; known: {', '.join(known)}")
    for key in needed:
        if key not in entry:
            raise RecipeError(f"{where}: {key} is missing in {entry.get('method', 'the table')!r}")


def _number(value: Any, where: str) -> tuple[float, float | None]:
    match = _NUMBER.fullmatch(str(value))
    if not match or isinstance(value, bool):
        raise RecipeError(f"{where}: {value!r} must be a number, or text such as '62.9 +- 0.36'")
    number, deviation = float(match[1]), None if match[2] is None else float(match[2])
    if not 0 <= number <= 100:
        raise RecipeError(f"{where}: {value!r} must be in percent")
    return number, deviation
