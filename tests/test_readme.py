"""The README's file tree lists every module, and nothing that is not there; its pictures exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tree() -> dict[str, set[str]]:
    """Folder -> module names, read from the indented tree."""
    text = (ROOT / "README.md").read_text().split("## What stands where")[1]
    folders: dict[str, set[str]] = {}
    current = ""
    for line in text.splitlines():
        if folder := re.match(r"    (\w[\w/]*)/( |$)", line):
            current = folder[1]
            folders.setdefault(current, set()).update(re.findall(r"\b(\w+\.py)\b", line))
        elif line.startswith("      "):
            folders[current].update(re.findall(r"\b(\w+\.py)\b", line))
    return folders


def test_every_module_of_the_library_is_in_the_tree():
    listed = tree()
    for package in ("fastssl", "data_tools", "benchmarks"):
        for folder in sorted({path.parent for path in (ROOT / package).rglob("*.py")}):
            modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
            if package == "data_tools":
                modules -= {"__main__.py"}
            name = str(folder.relative_to(ROOT))
            assert listed.get(name, set()) == modules, name


def test_pictures_and_links_exist():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
