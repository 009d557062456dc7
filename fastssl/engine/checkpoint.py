"""Checkpoints on disk: a folder of safetensors files and one state.json, complete or absent, verified when read.

``checkpoints/step-00001024/`` is written under a temporary name, synced and renamed; ``last`` and ``best`` are symbolic links that are replaced
in one move. A crash at any moment leaves the links on complete checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from fastssl.engine.runfolder import NO_SPACE, what_happened
from fastssl.errors import CheckpointError

FORMAT_VERSION = 1
TEMPORARY = ".tmp-"
RETIRED = ".old-"


@dataclass
class Snapshot:
    """A run at the end of an update: ``tensors[group][name]`` (one .safetensors file per group) and plain ``state``."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def save(folder: Path, snapshot: Snapshot, *, step: int, best: bool, keep: int) -> Path:
    """Write ``folder/step-XXXXXXXX``, point ``last`` (and ``best``) at it, remove all but the ``keep`` newest and those two.

    Raises :class:`CheckpointError` if the disk refuses; nothing but the temporary folder has changed then, and that is removed.
    """
    final = folder / step_name(step)
    temporary = folder / f"{TEMPORARY}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        files = {}
        for group, tensors in snapshot.tensors.items():
            content = tensors_to_bytes({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
            write_synced(temporary / f"{group}.safetensors", content)
            files[f"{group}.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        state = {"format_version": FORMAT_VERSION, "step": step, "files": files, **snapshot.state}
        write_synced(temporary / "state.json", _seal(state).encode())
        _sync_folder(temporary)
        if final.exists():  # left by an interrupted run beyond the checkpoint it was resumed from
            os.rename(final, folder / f"{RETIRED}{final.name}")
        os.rename(temporary, final)
        point(folder, "last", final.name)
        if best:
            point(folder, "best", final.name)
        _sync_folder(folder)
        _remove_leftovers(folder)
        _prune(folder, keep)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        good = linked(folder, "last")
        kept = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
        mend = "free space, then --resume" if error.errno in NO_SPACE else "mend that, then --resume"
        raise CheckpointError(f"cannot write checkpoint {final}: {what_happened(error)}; {kept}; {mend}") from error
    return final


def load(path: Path) -> Snapshot:
    """Read and verify one checkpoint folder (a link is followed). Raises :class:`CheckpointError` for anything missing, damaged or unknown."""
    path = path.resolve()
    state = load_state(path)
    tensors = {}
    for name, facts in state["files"].items():
        file = path / name
        try:
            content = file.read_bytes()
        except OSError as error:
            raise _damaged(path, f"{name} cannot be read ({error.strerror})") from None
        if len(content) != facts["bytes"] or hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise _damaged(path, f"{name} is not what was written")
        try:
            tensors[name.removesuffix(".safetensors")] = tensors_from_bytes(content)
        except SafetensorError as error:
            raise _damaged(path, f"{name}: {error}") from None
    return Snapshot(tensors, state)


def load_state(path: Path) -> dict[str, Any]:
    """Only the verified state.json of a checkpoint folder."""
    file = path / "state.json"
    if not file.is_file():
        raise CheckpointError(f"{path} is no checkpoint: it has no state.json")
    try:
        sealed = json.loads(file.read_text(encoding="utf-8"))
        state, seal = sealed["state"], sealed["sha256"]
    except (ValueError, KeyError, TypeError):
        raise _damaged(path, "state.json is not readable") from None
    if _digest(state) != seal:
        raise _damaged(path, "state.json is not what was written")
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has checkpoint format {state.get('format_version')}; this version reads format {FORMAT_VERSION}")
    return state


def find(path: Path, which: str = "last") -> Path:
    """The checkpoint folder meant by ``path``: itself, or the one a run folder (or its checkpoints folder) links as ``which``."""
    for candidate in (path, path / which, path / "checkpoints" / which):
        if (candidate / "state.json").is_file():
            return candidate.resolve()
    if not path.exists():
        raise CheckpointError(f"no such checkpoint or run folder: {path}")
    raise CheckpointError(f"{path} holds no loadable {which!r} checkpoint; name a run folder or a checkpoints/step-* folder")


def linked(folder: Path, name: str) -> Path | None:
    """The checkpoint a link points to, or None."""
    link = folder / name
    return link.resolve() if (link / "state.json").is_file() else None


def point(folder: Path, name: str, target: str) -> None:
    """Make ``folder/name`` a symbolic link to ``target``, replacing an old link in one move."""
    temporary = folder / f".{name}.tmp"
    temporary.unlink(missing_ok=True)
    os.symlink(target, temporary)
    os.replace(temporary, folder / name)


def rewind(folder: Path, step: int, best_step: int | None) -> list[str]:
    """Before going on from ``step``: point the links at what was valid then and drop later checkpoints. Returns the dropped names."""
    later = [p for p in _steps(folder) if int(p.name[5:]) > step]
    point(folder, "last", step_name(step))
    for path in later:
        shutil.rmtree(path)
    if best_step is not None and (folder / step_name(best_step)).is_dir():
        point(folder, "best", step_name(best_step))
    elif not (folder / "best").exists():  # no link, or one to a folder that is gone
        (folder / "best").unlink(missing_ok=True)
    return [p.name for p in later]


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it. Every byte of a checkpoint passes here."""
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _steps(folder: Path) -> list[Path]:
    """Complete step folders, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit())


def _prune(folder: Path, keep: int) -> None:
    linked_names = {os.readlink(folder / name) for name in ("last", "best") if (folder / name).is_symlink()}
    steps = _steps(folder)
    for path in steps[: max(0, len(steps) - max(1, keep))]:
        if path.name not in linked_names:
            shutil.rmtree(path)


def _remove_leftovers(folder: Path) -> None:
    for path in [*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"{RETIRED}*")]:
        shutil.rmtree(path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _seal(state: dict[str, Any]) -> str:
    state = json.loads(json.dumps(state))  # what a reader will see (tuples become lists)
    return json.dumps({"sha256": _digest(state), "state": state}, indent=1) + "\n"


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, what: str) -> CheckpointError:
    others = [p.name for p in _steps(path.parent) if p.name != path.name]
    mend = f"other checkpoints beside it: {', '.join(others)} (--resume {path.parent / others[-1]})" if others else "there is no other checkpoint beside it"
    return CheckpointError(f"checkpoint {path} is damaged: {what}; {mend}")
