"""Writes docs/modules.md: every module of the project with the first sentence of its own description.

python docs/modules.py > docs/modules.md
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "fastssl": "recipes, commands, what all layers share",
    "fastssl/sources": "who delivers canvases, and when",
    "fastssl/augment": "views from canvases",
    "fastssl/kernels": "fused losses and optimiser steps",
    "fastssl/methods": "one file per method",
    "fastssl/models": "networks, heads, BatchNorm, teachers",
    "fastssl/engine": "the update and all around it",
    "fastssl/selftrain": "teacher scores, selection, student",
    "fastssl/report": "run folders to one HTML page",
    "data_tools": "`fastssl-data`: what sources read is written here",
    "data_tools/readers": "one file per kind of raw collection",
    "data_tools/verbs": "one file per command",
    "benchmarks": "measured beside peers in the same run",
}


def first_sentence(file: Path) -> str:
    """The start of a module's docstring, up to its first full stop or colon at a line's end."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    for end in (". ", ".\n"):
        paragraph = paragraph.split(end)[0]
    return paragraph.rstrip(".:").replace("|", "\\|")


def page() -> str:
    """The whole page. A folder with modules that PACKAGES does not name is an error."""
    lines = ["# Modules", "", "Made from the files by `python docs/modules.py > docs/modules.md`; a test holds it.", ""]
    for top in ("fastssl", "data_tools", "benchmarks"):
        for folder in sorted({file.parent for file in (ROOT / top).rglob("*.py")}):
            name = folder.relative_to(ROOT).as_posix()
            modules = sorted(file for file in folder.glob("*.py") if file.name not in ("__init__.py", "__main__.py"))
            if not modules:
                continue
            if name not in PACKAGES:
                raise SystemExit(f"{name} has modules but no line in docs/modules.py: say what it is for")
            lines += [f"## {name}: {PACKAGES[name]}", "", "| module | |", "|---|---|"]
            lines += [f"| `{file.name}` | {first_sentence(file)} |" for file in modules]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
