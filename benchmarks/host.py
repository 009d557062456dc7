"""What a benchmark says about where it ran: machine, commit, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, object]:
    """Processor, cores, load when asked, threads of torch."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model)
    return {"cpu": model, "cores": os.cpu_count(), "load_1min_at_start": round(os.getloadavg()[0], 2), "threads_used": torch.get_num_threads()}


def commit() -> str:
    """The commit, with "+changes" where code differs from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "fastssl", "benchmarks/*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, "none" for what is missing."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = installed(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
