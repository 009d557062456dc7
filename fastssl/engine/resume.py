"""Which run folder a start means: a new one, the newest unfinished one, or the one a path names. Decided on the main rank, told to all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from fastssl.engine import checkpoint
from fastssl.engine.checkpoint import Snapshot
from fastssl.engine.runfolder import broken_disk, find_unfinished, hold, new_run_path, read_json
from fastssl.engine.runlock import RunLock
from fastssl.errors import CheckpointError, FastSSLError
from fastssl.parallel import rank, world_size
from fastssl.schema import Recipe

T = TypeVar("T")


def on_main(action: Callable[[], T]) -> T:
    """Do something on rank 0 only; every rank gets its result or raises its error, so that none is left waiting."""
    if world_size() == 1:
        return action()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = action()
        except (FastSSLError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def choose_run(recipe: Recipe, digest: str, resume: str | None, run_dir: str | Path | None, lock: RunLock) -> tuple[Path, Snapshot | None, str]:
    """(run folder, snapshot to go on from or None, a sentence on the choice). The main rank's ``lock`` then holds a run to go on with.

    Raises :class:`CheckpointError` if what was asked for cannot be loaded: a resume never silently becomes a fresh start.
    """
    path, found, why = on_main(lambda: _choose(recipe, digest, resume, run_dir, lock))
    if found is None:
        return Path(path), None, why
    snapshot = checkpoint.load(Path(found))  # every rank reads the (shared) run folder
    if snapshot.state.get("config_digest") != digest:
        raise CheckpointError(
            f"checkpoint {found} was written by another configuration (recipe {snapshot.state.get('recipe')!r}, method {snapshot.state.get('method')!r}, "
            f"seed {snapshot.state.get('seed')}); compare {Path(path) / 'config.yaml'} with this recipe"
        )
    # A run that died between its last checkpoint and its summary still gets the summary.
    if snapshot.state["step"] >= recipe.train.steps and read_json(Path(path) / "summary.json").get("status") == "finished":
        raise CheckpointError(f"{found} is the end of a finished run ({snapshot.state['step']} updates); there is nothing to go on with")
    return Path(path), snapshot, why


def _choose(recipe: Recipe, digest: str, resume: str | None, run_dir: str | Path | None, lock: RunLock) -> tuple[str, str | None, str]:
    try:
        return _look(recipe, digest, resume, run_dir, lock)
    except OSError as cause:
        raise broken_disk(Path(recipe.runs_dir) if run_dir is None else Path(run_dir), cause) from cause


def _look(recipe: Recipe, digest: str, resume: str | None, run_dir: str | Path | None, lock: RunLock) -> tuple[str, str | None, str]:
    why = "a new run"
    if resume == "auto":
        found, why = find_unfinished(recipe, digest, lock)
        if found is not None:
            return str(found), str(checkpoint.find(found, "last")), why
    elif resume is not None:
        at = checkpoint.find(Path(resume), "last")
        if at.parent.name != "checkpoints":
            raise CheckpointError(f"{at} does not lie in a run folder's checkpoints/; name the run folder")
        hold(at.parent.parent, lock)
        return str(at.parent.parent), str(checkpoint.find(Path(resume), "last")), f"resuming {at}"  # the link may have moved until we held it
    path = Path(run_dir) if run_dir is not None else new_run_path(recipe)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"run folder {path} exists already; run folders are never overwritten (use --resume {path} to go on)")
    return str(path), None, why
