"""The house rules, read from the syntax trees: import arrows, no method names outside methods/, no host syncs in methods, short files.

Each rule is a function from source text to a list of complaints, and each is shown to catch a planted violation.
What a syntax tree cannot show (``if tensor:``, indexing with a mask whose name does not say so) is left to tests that run the methods.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fastssl import methods

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400

BOTTOM = {"types", "schema", "errors", ""}  # "" is the package itself (its version)
LOW = BOTTOM | {"kernels", "functional", "parallel"}
RECIPE = {"recipe", "recipe_text", "recipe_values", "recipe_checks", "recipe_list", "recipe_notes", "recipe_variants"}
MIDDLE = {"methods", "augment", "sources", "models"}
ENGINE = LOW | MIDDLE | RECIPE | {"engine", "launch_check"}
ALLOWED: dict[str, set[str]] = {
    # unit -> what it may import besides itself; a unit that is not listed here is an error, so that a new one gets its place on purpose
    "": set(), "errors": set(), "types": set(), "schema": set(),
    "parallel": BOTTOM, "functional": BOTTOM | {"parallel"}, "kernels": LOW,
    "methods": LOW, "augment": LOW, "sources": LOW, "models": LOW,
    "launch_check": BOTTOM, "console": set(),
    **{name: LOW | {"methods"} | RECIPE for name in RECIPE},
    "published": LOW | RECIPE, "recipe_proof": ENGINE | {"published"}, "method_facts": ENGINE,
    "method_page": ENGINE | {"published", "method_facts"},
    "catalogue": ENGINE | {"published", "recipe_proof", "method_facts", "method_page", "console"},
    "engine": ENGINE, "report": ENGINE | {"report"}, "selftrain": ENGINE,
    "doctor": BOTTOM,
    "cli": ENGINE | {"report", "selftrain", "doctor", "console", "catalogue"}, "__main__": {"cli"},
}  # fmt: skip
METHOD_MAY_IMPORT = {"functional", "kernels", "parallel", "types", "methods.base"}
NAMELESS = set(ALLOWED) - {"methods"}
SYNCS = {
    "item", "cpu", "tolist", "nonzero", "numpy", "unique", "unique_consecutive", "argwhere", "masked_select", "is_nonzero", "equal", "allclose", "synchronize",
}  # fmt: skip


def unit_of(module: str) -> str:
    """``fastssl.engine.train`` -> ``engine``; ``fastssl`` -> ``""``."""
    return module.split(".")[1] if "." in module else ""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, module: str, package: bool = False) -> list[str]:
    """Every module that ``module`` imports, absolute; ``from a import b`` counts as ``a.b`` where that is a unit or file, else ``a``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")[: len(module.split(".")) - node.level + (1 if package else 0)]
                base = ".".join([*here, *([base] if base else [])])
            found += [f"{base}.{alias.name}" if _is_module(f"{base}.{alias.name}") else base for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            found += [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return found


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def arrow_faults(source: str, module: str, package: bool = False) -> list[str]:
    """Imports of ``module`` (in fastssl) that the layers do not allow."""
    unit = unit_of(module)
    if unit not in ALLOWED:
        return [f"{module}: the unit {unit!r} has no place in the layers"]
    faults = []
    for name in imported(ast.parse(source), module, package):
        top, other = name.split(".")[0], unit_of(name)
        if top == "data_tools":
            faults.append(f"{module} imports {name}: nothing imports data_tools")
        elif top == "fastssl" and other != unit and other not in ALLOWED[unit]:
            faults.append(f"{module} imports {name}: {unit or 'the package'} stands below or beside {other}")
    return faults


def method_import_faults(source: str, module: str) -> list[str]:
    """A method knows its paper, and nothing of the house but pure functions."""
    faults = []
    for name in imported(ast.parse(source), module):
        inner = name.partition("fastssl.")[2]
        if name.split(".")[0] in ("fastssl", "data_tools") and not any(inner == ok or inner.startswith(ok + ".") for ok in METHOD_MAY_IMPORT):
            faults.append(f"{module} imports {name}")
    return faults


def name_branch_faults(source: str, module: str, names: set[str]) -> list[str]:
    """Places that decide by a method's name: comparisons, match cases, dict keys, subscripts, string tests, getattr and defaults of get()."""
    faults = []

    def is_name(node: ast.AST | None) -> bool:
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return any(is_name(e) for e in node.elts)
        return isinstance(node, ast.Constant) and node.value in names

    for node in ast.walk(ast.parse(source)):
        hit = (
            isinstance(node, ast.Compare) and (is_name(node.left) or any(map(is_name, node.comparators)))
            or isinstance(node, ast.MatchValue) and is_name(node.value)
            or isinstance(node, ast.Dict) and any(map(is_name, node.keys))
            or isinstance(node, ast.Subscript) and is_name(node.slice)
            or isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and any(map(is_name, node.args))
        )  # fmt: skip
        if hit:
            faults.append(f"{module}:{node.lineno} decides by a method's name: {ast.unparse(node)[:80]}")
    return faults


def sync_faults(source: str, module: str) -> list[str]:
    """Calls and subscripts in a method that make the host wait for the device, or that have a data-dependent shape."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in SYNCS:
            faults.append(f"{module}:{node.lineno} .{node.attr}")
        elif isinstance(node, ast.Call):
            to_cpu = [a for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant) and a.value == "cpu"]
            one_argument_where = getattr(node.func, "attr", "") == "where" and len(node.args) + len(node.keywords) == 1
            if to_cpu or one_argument_where:
                faults.append(f"{module}:{node.lineno} {ast.unparse(node)[:60]}")
        elif isinstance(node, ast.Subscript) and any(_is_mask(part) for part in (node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice])):
            faults.append(f"{module}:{node.lineno} boolean-mask indexing {ast.unparse(node)[:60]}")
    return faults


def _is_mask(index: ast.AST) -> bool:
    """``x[y > 0]``, ``x[~m]``, ``x[a & b]``, ``x[mask]``, ``x[self.keep_mask]``, ``x[m.bool()]``, ``x[mask_B]``."""
    if isinstance(index, (ast.Compare, ast.BoolOp)):
        return True
    if isinstance(index, ast.UnaryOp):
        return isinstance(index.op, (ast.Invert, ast.Not))
    if isinstance(index, ast.BinOp):
        return isinstance(index.op, (ast.BitAnd, ast.BitOr))
    if isinstance(index, ast.Call):
        return getattr(index.func, "attr", "") in ("bool", "logical_and", "logical_or", "logical_not", "eq", "ne", "gt", "ge", "lt", "le", "isfinite", "isnan")
    name = index.id if isinstance(index, ast.Name) else index.attr if isinstance(index, ast.Attribute) else ""
    stem = name.rsplit("_", 1)[0] if name.rsplit("_", 1)[-1].isupper() else name  # mask_B: the shape suffix is no part of the name
    return stem.endswith("mask") or stem.startswith("is_")


def length_fault(source: str, module: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{module} has {lines} lines; at most {MAX_LINES}: split it"] if lines > MAX_LINES else []


FASTSSL = sorted((ROOT / "fastssl").rglob("*.py"))
DATA_TOOLS = sorted((ROOT / "data_tools").rglob("*.py"))
METHODS = [p for p in FASTSSL if p.parent.name == "methods" and p.stem in methods.names()]


def _complaints(check, paths, *args) -> list[str]:
    return [fault for path in paths for fault in check(path.read_text(encoding="utf-8"), module_of(path), *args)]


def test_there_is_something_to_check():
    assert len(FASTSSL) > 20 and DATA_TOOLS and METHODS
    assert set(ALLOWED) >= {unit_of(module_of(p)) for p in FASTSSL}


def test_import_arrows():
    faults = [f for p in FASTSSL for f in arrow_faults(p.read_text(encoding="utf-8"), module_of(p), p.name == "__init__.py")]
    assert not faults, "\n".join(faults)


def test_arrows_have_no_circle_between_units():
    """The table itself only points down: following it never comes back, except inside the recipe family."""
    family = {name: "recipe" if name in RECIPE else name for name in ALLOWED}
    edges = {(family[a], family[b]) for a, below in ALLOWED.items() for b in below if family[a] != family[b]}
    done: set[str] = set()
    while len(done) < len(set(family.values())):
        free = {u for u in set(family.values()) - done if all(b in done for a, b in edges if a == u)}
        assert free, f"circle among {sorted(set(family.values()) - done)}"
        done |= free


def test_data_tools_import_only_the_formats():
    allowed = {"sources", "errors", "types", "schema", "parallel", "functional", "console", ""}
    for path in DATA_TOOLS:
        for name in imported(ast.parse(path.read_text(encoding="utf-8")), module_of(path), path.name == "__init__.py"):
            assert name.split(".")[0] != "fastssl" or unit_of(name) in allowed, f"{path} imports {name}"


def test_methods_import_only_pure_parts():
    faults = _complaints(method_import_faults, METHODS)
    assert not faults, "\n".join(faults)


def test_nothing_outside_methods_decides_by_a_methods_name():
    paths = [p for p in FASTSSL if unit_of(module_of(p)) in NAMELESS]
    faults = _complaints(name_branch_faults, paths, set(methods.names()))
    assert not faults, "\n".join(faults)


def test_methods_never_wait_for_the_device():
    faults = _complaints(sync_faults, METHODS)
    assert not faults, "\n".join(faults)


def test_files_are_short():
    faults = _complaints(length_fault, [*FASTSSL, *DATA_TOOLS])
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fastssl.methods.x", "from fastssl.engine.step import run"),
        ("fastssl.methods.x", "from fastssl import engine"),
        ("fastssl.augment.x", "import fastssl.sources.feed"),
        ("fastssl.models.x", "from ..engine import step"),
        ("fastssl.engine.x", "def f():\n    from fastssl.report import write_report"),
        ("fastssl.engine.x", "import data_tools"),
        ("fastssl.types", "from fastssl import functional"),
        ("fastssl.functional", "from fastssl.kernels import ce"),
        ("fastssl.recipe", "from fastssl.engine import train"),
        ("fastssl.report.x", "import importlib\nimportlib.import_module('fastssl.cli')"),
        ("fastssl.novelty", "import os"),
    ],
)
def test_arrow_checker_catches(module, line):
    assert len(arrow_faults(line, module)) == 1


def test_arrow_checker_lets_good_imports_pass():
    assert not arrow_faults("import torch\nfrom fastssl.types import Batch\nfrom . import base\nfrom fastssl.kernels.ce import ce", "fastssl.methods.x")
    assert not arrow_faults("from .base import Method\nfrom fastssl.errors import nearest", "fastssl.methods", package=True)
    assert not arrow_faults("from fastssl.recipe import load_recipe\nfrom fastssl.sources import feed", "fastssl.engine.x")


@pytest.mark.parametrize(
    "line", ["from fastssl.models import ema", "import fastssl.schema", "from fastssl.methods.fixmatch import FixMatch", "import data_tools.convert"]
)
def test_method_import_checker_catches(line):
    assert method_import_faults(line, "fastssl.methods.x")
    assert not method_import_faults("import torch\nfrom fastssl.functional import ramp\nfrom fastssl.methods.base import Method", "fastssl.methods.x")


@pytest.mark.parametrize(
    "line",
    [
        "x = name == 'alpha'",
        "x = 'alpha' != name",
        "x = name in ('beta', 'alpha')",
        "x = name in {'alpha'}",
        "match name:\n    case 'alpha':\n        pass",
        "table = {'alpha': 1}",
        "x = table['alpha']",
        "x = name.startswith('alpha')",
        "x = table.get('alpha', 3)",
    ],
)
def test_name_checker_catches(line):
    assert name_branch_faults(line, "m", {"alpha"})
    assert not name_branch_faults(line, "m", {"gamma"})


def test_name_checker_reads_no_prose():
    assert not name_branch_faults('"""alpha"""\nx = f"add method alpha"\ny = policy == "alpha_weak"', "m", {"alpha"})


@pytest.mark.parametrize(
    "line",
    [
        "x.item()", "x.cpu()", "x.to('cpu')", "x.to(device='cpu')", "x.tolist()", "x.nonzero()", "torch.unique(x)", "x.numpy()", "torch.where(x)",
        "torch.masked_select(x, m)", "torch.nonzero(x)", "x[y > 0]", "x[~keep]", "x[a & b]", "x[mask]", "x[mask_B]", "x[self.keep_mask]", "x[m.bool()]",
        "x[:, mask]", "x[mask_B] = 0", "x[is_labeled_B]", "torch.cuda.synchronize()", "torch.equal(a, b)", "f = x.item",
    ],
)  # fmt: skip
def test_sync_checker_catches(line):
    assert sync_faults(line, "m")


def test_sync_checker_lets_device_work_pass():
    for line in ("x[0]", "x[:, 1:]", "x[index_B]", "torch.where(x > 0, a, b)", "x.to(y.device)", "v['u_w']", "x[..., None]", "x[n + 1]", "(mask_B * x).sum()"):
        assert not sync_faults(line, "m"), line


def test_length_checker_catches():
    assert length_fault("x\n" * (MAX_LINES + 1), "m") and not length_fault("x\n" * MAX_LINES, "m")
