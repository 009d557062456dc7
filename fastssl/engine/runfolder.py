"""The folder of one run: its files, their names, how they are written, and how an unfinished one is found again.

Only the main process writes; every other rank holds the same object with ``writes=False``.
"""

from __future__ import annotations

import errno
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
from fastssl.engine.runlock import RunLock, holder
from fastssl.errors import CheckpointError, FastSSLError
from fastssl.schema import Recipe

NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
BROKEN_DISK = NO_SPACE | {errno.EROFS, errno.EIO}


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


def begin(path: Path, lock: RunLock) -> None:
    """Make and hold the folder of a new run. Raises :class:`CheckpointError` if that cannot be, or if another run took the name meanwhile."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        mine = lock.take(path)
    except OSError as cause:
        raise broken_disk(path, cause) from cause
    if not mine or (path / "config.yaml").exists():
        raise CheckpointError(f"run folder {path} was taken by another run meanwhile; choose another --run-dir")


def hold(path: Path, lock: RunLock) -> None:
    """Hold the folder of a run to go on with. Raises :class:`CheckpointError` while it is being trained, or if it cannot be written."""
    try:
        mine = lock.take(path)
    except OSError as cause:
        raise broken_disk(path, cause) from cause
    if not mine:
        raise CheckpointError(f"{path} is being trained right now by {holder(path)}; wait for its end or stop that process, then --resume again")


def find_unfinished(recipe: Recipe, digest: str, lock: RunLock) -> tuple[Path | None, str]:
    """The newest unfinished run of this very configuration that has a checkpoint and is not being trained, now held; and a sentence on the choice."""
    folder = Path(recipe.runs_dir) / recipe.name
    skipped, busy = 0, []
    runs = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    # Names start with the time in whole seconds; two runs of one second are told apart by when their folder was begun.
    for path in sorted(runs, key=lambda p: (p.name[:15], _started(p)), reverse=True):
        env, summary = read_json(path / "env.json"), read_json(path / "summary.json")
        if env.get("config_digest") != digest or summary.get("status") == "finished":
            continue
        if not (path / "checkpoints" / "last").exists():
            skipped += 1
            continue
        if not lock.take(path):
            busy.append(f"{path} is being trained right now by {holder(path)}")
            continue
        if read_json(path / "summary.json").get("status") == "finished":  # it came to its end since we looked
            lock.release()
            continue
        return path, "; ".join([f"resuming {path}, the newest unfinished run with this configuration", *busy])
    reasons = list(busy)
    if skipped:
        reasons.append(f"{skipped} unfinished run(s) with this configuration have no checkpoint yet")
    return None, f"starting fresh: {'; '.join(reasons) or f'no unfinished run with this configuration in {folder}'}"


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
    mend = "free space or choose another runs_dir, then --resume" if error.errno in NO_SPACE else "mend that or choose another runs_dir"
    return CheckpointError(f"cannot write {path}: {what_happened(error)}; {mend}")


def what_happened(error: OSError) -> str:
    """The system's words and the file that they are about."""
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")


def is_about(path: Path, error: OSError) -> bool:
    """Whether an OSError of a running training is about writing its folder ``path``."""
    return error.errno in BROKEN_DISK or isinstance(error.filename, str) and Path(error.filename).is_relative_to(path)


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
