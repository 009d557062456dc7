"""The folder of one run: its files, their names, how they are written, and how an unfinished one is found again.

Only the main process writes; every other rank holds the same object with ``writes=False``.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastssl
from fastssl.errors import CheckpointError, FastSSLError
from fastssl.schema import Recipe


class RunFolder:
    """Paths and writers of ``runs/<recipe name>/<time>-<id>/``."""

    def __init__(self, path: Path, *, writes: bool):
        self.path = path
        self.writes = writes
        self.echo: Any = None  # where log lines go besides train.log; set by the progress display
        if writes:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def log(self, text: str) -> None:
        """One line for people: into train.log and onto the screen."""
        if not self.writes:
            return
        with open(self.path / "train.log", "a", encoding="utf-8") as f:
            f.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self.echo is not None:
            self.echo(text)

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.writes:
            with open(self.metrics, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl, 0 if there is none."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def sync_metrics(self) -> int:
        """Wait until the disk has metrics.jsonl (a checkpoint relies on its lines) and return its length."""
        if self.writes and self.metrics.exists():
            with open(self.metrics, "rb+") as f:
                os.fsync(f.fileno())
        return self.metrics_bytes() if self.writes else 0

    def cut_metrics(self, length: int) -> None:
        """Drop what was written after the checkpoint that recorded ``length`` bytes."""
        if not self.writes:
            return
        if self.metrics_bytes() < length:
            have = self.metrics_bytes()
            raise CheckpointError(f"{self.metrics} is shorter than when the checkpoint was written ({have} < {length} bytes): it was changed since")
        if self.metrics.exists():
            os.truncate(self.metrics, length)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file so that a reader sees the old or the new content, never a part."""
        if self.writes:
            write_atomically(self.path / name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        if self.writes:
            write_atomically(self.path / name, text)


def new_run_path(recipe: Recipe) -> Path:
    """A path under runs_dir that does not exist yet."""
    while True:
        path = Path(recipe.runs_dir) / recipe.name / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        if not path.exists():
            return path


def find_unfinished(recipe: Recipe, digest: str) -> tuple[Path | None, str]:
    """The newest unfinished run of this very configuration that has a checkpoint, and a sentence on the choice."""
    folder = Path(recipe.runs_dir) / recipe.name
    skipped = 0
    runs = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    # Names start with the time in whole seconds; two runs of one second are told apart by when their folder was begun.
    for path in sorted(runs, key=lambda p: (p.name[:15], _started(p)), reverse=True):
        env, summary = read_json(path / "env.json"), read_json(path / "summary.json")
        if env.get("config_digest") != digest or summary.get("status") == "finished":
            continue
        if not (path / "checkpoints" / "last").exists():
            skipped += 1
            continue
        return path, f"resuming {path}, the newest unfinished run with this configuration"
    why = f"{skipped} unfinished run(s) with this configuration have no checkpoint yet" if skipped else f"no unfinished run with this configuration in {folder}"
    return None, f"starting fresh: {why}"


def _started(path: Path) -> float:
    started = read_json(path / "env.json").get("started_at_s", 0.0)
    return float(started) if isinstance(started, (int, float)) else 0.0


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def broken_disk(path: Path, error: OSError) -> FastSSLError:
    """The one error for a run folder that cannot be written."""
    return CheckpointError(f"cannot write {path}: {error.strerror or error}; free space or choose another runs_dir, then --resume")


def environment(device: torch.device, world: int, precision: str, digest: str) -> dict[str, Any]:
    """What a run ran on and with: versions, device, commit, command."""
    import accelerate
    import numpy
    import timm
    import torchvision

    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "started_at_s": time.time(),
        "config_digest": digest,
        "command": sys.argv,
        "fastssl": fastssl.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "world": world,
        "precision": precision,
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with '-dirty' for local changes; None outside a checkout."""
    here = Path(fastssl.__file__).parent
    try:
        out = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None if out.returncode == 0 else None
