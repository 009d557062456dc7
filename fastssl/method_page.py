"""docs/methods.md: one page about all methods, written from their files, the recipes and the published numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastssl import methods
from fastssl.method_facts import Cost, Facts, facts_of
from fastssl.published import PublishedRow, by_recipe
from fastssl.recipe import load_recipe
from fastssl.recipe_list import RecipeEntry, Runnable

COMMAND = "fastssl methods --markdown > docs/methods.md"
NONE_YET = "none yet"
HEAD = f"""\
# Methods

Written from the methods' files, the recipes and recipes/published.yaml by

    {COMMAND}

**Cost** is in forwards per image of the batch at each update, counted on one step of each method: `1 / 2` means one forward of every labelled and two of
every unlabelled image. *student* forwards carry a gradient, *free* ones are the student's without one, *teacher* ones are those of the averaged network.
A joint forward of several views counts every view. Whoever perturbs or mixes images counts the images that it makes.

**State** is saved with checkpoints: K classes, N_l and N_u images of the labelled and unlabelled list, B_u unlabelled images of a batch.
"""


def write_page(entries: Sequence[RecipeEntry], published: Sequence[PublishedRow]) -> str:
    """The whole page, Markdown."""
    facts = [facts_of(name) for name in methods.names()]
    parts = [HEAD, _overview(facts), *(_section(each, entries, published) for each in facts)]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _overview(facts: Sequence[Facts]) -> str:
    rows = [(f"[{f.name}](#{f.name})", _paper(f), *_cost(f.cost), ", ".join(f"`{name}` {shape}" for name, shape in f.state.items()) or "-") for f in facts]
    return _table(("method", "paper", "student", "free", "teacher", "state"), rows)


def _section(f: Facts, entries: Sequence[RecipeEntry], published: Sequence[PublishedRow]) -> str:
    parts = [f"## {f.name}", "```text\n" + f.text + "\n```"]
    views = [(f"`{name}`", text) for name, text in f.views.items()]
    heads = ", ".join(f"`{name}` ({kind})" for name, kind in f.heads.items())
    parts.append("Views: " + "; ".join(f"{name} {text}" for name, text in views) + "." + (f" Extra heads: {heads}." if heads else ""))
    if f.cost.once:
        parts.append(f"Once before training: {f.cost.once} teacher forward of every unlabelled image.")
    if f.moves_teacher:
        parts.append("Moves the teacher itself (`teacher.when: by_method`).")
    if f.options:
        parts.append(
            _table(("option", "takes", "default", "meaning"), [(f"`{o.name}`", o.type, f"`{o.default}`", o.meaning or "see the text") for o in f.options])
        )
    own = [(entry, [r for r in entry.runnables if r.method == f.name]) for entry in entries]
    own = [(entry, found) for entry, found in own if found]
    if own:
        rows = [_recipe_row(entry, found, f, by_recipe(published)) for entry, found in own]
        parts.append(_table(("recipe", "variants", "student", "free", "teacher", "published figures", "measured"), rows))
        parts += _figures([r for _, found in own for r in found], published)
    else:
        parts.append("No recipe.")
    return "\n\n".join(parts)


def _recipe_row(entry: RecipeEntry, found: Sequence[Runnable], f: Facts, published: dict[str, list[PublishedRow]]) -> tuple[str, ...]:
    first = found[0]
    variant = first.name.partition("@")[2]
    config = load_recipe(f"{entry.path}@{variant}" if variant else entry.path).method.config
    figures = sum(len(published.get(r.name, ())) for r in found)
    measured = "; ".join(dict.fromkeys(r.measured for r in found if r.measured and r.measured != NONE_YET)) or NONE_YET
    return (f"`{entry.short}`", str(len(entry.variants)) if entry.variants else "-", *_cost(facts_of(f.name, config).cost), str(figures or "none"), measured)


def _figures(found: Sequence[Runnable], published: Sequence[PublishedRow]) -> list[str]:
    """One line per table and row of it, in the order of the tables."""
    results = {r.name: r.measured for r in found}
    lines: dict[tuple[str, str, str], list[str]] = {}
    for row in published:
        if row.recipe in results:
            measured = f" (measured {results[row.recipe]})" if results[row.recipe] not in ("", NONE_YET) and not row.overrides else ""
            lines.setdefault((row.table, row.method, row.metric), []).append(f"{row.setting} {row.number}{measured}")
    if not lines:
        return []
    return ["Published:\n\n" + "\n".join(f"- {table}, {method} ({metric}): {'; '.join(cells)}" for (table, method, metric), cells in lines.items())]


def _paper(f: Facts) -> str:
    return re.sub(r":\w+:`([^<`]+?)\s*<[^>`]*>`", r"\1", f.paper).rstrip(":.")


def _cost(cost: Cost) -> tuple[str, str, str]:
    pairs = (
        (cost.student_labeled, cost.student_unlabeled),
        (cost.student_free_labeled, cost.student_free_unlabeled),
        (cost.teacher_labeled, cost.teacher_unlabeled),
    )
    student, free, teacher = (f"{a:g} / {b:g}" if a or b else "-" for a, b in pairs)
    return student, free, teacher


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(heads), "|" + "---|" * len(heads), *map(line, rows)])
