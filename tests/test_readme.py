"""The README's pictures and links exist; the list of modules is what the files say, and every module says something."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_list_of_modules_is_what_the_files_say():
    made = runpy.run_path(str(ROOT / "docs" / "modules.py"))["page"]()
    assert (ROOT / "docs" / "modules.md").read_text(encoding="utf-8") == made, "run: python docs/modules.py > docs/modules.md"
    silent = re.findall(r"^\| `(\S+)` \|  \|$", made, flags=re.MULTILINE)
    assert not silent, f"modules without a docstring: {silent}"


def test_pictures_and_links_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
