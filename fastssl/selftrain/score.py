"""The scoring worker: claims units of a pool one after the other, scores them, commits them; any number of workers, no communication but files."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastssl
from fastssl.engine.assemble import open_rows
from fastssl.engine.launch import cores_per_process
from fastssl.errors import DataError, nearest
from fastssl.selftrain.lease import Claims
from fastssl.selftrain.log import Log, Part, Unit, rows_digest
from fastssl.selftrain.teacher import Scorer
from fastssl.sources.manifest import load_manifest, load_split

ROWS = ("unlabeled", "all")
POLL_S = 0.5  # how often a worker without work looks whether others' units are done or given up


@dataclass(frozen=True)
class Pool:
    """What is scored: rows of a dataset folder. Empty ``path``: the teacher's own dataset; ``rows`` "unlabeled": those of label split ``label_split``."""

    path: str = ""
    split: str = "train"
    rows: str = "unlabeled"
    label_split: str = ""

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise DataError(f"pool.rows = {self.rows!r} must be one of {', '.join(ROWS)}{nearest(str(self.rows), ROWS)}")


def resolve_pool(pool: Pool, scorer: Scorer) -> Pool:
    """The pool with nothing left open. Another dataset than the teacher's has no label split of ours: all its rows are the pool."""
    own = scorer.recipe.data
    path = pool.path or own.path
    same = Path(path).resolve() == Path(own.path).resolve()
    label_split = pool.label_split or (own.split if same else "")
    if pool.rows == "unlabeled" and not label_split:
        raise DataError(f"pool.rows = unlabeled needs a label split of {path}; name one (pool.label_split), or score all rows (pool.rows = all)")
    return replace(pool, path=path, label_split=label_split if pool.rows == "unlabeled" else "")


def open_log(folder: str | Path, scorer: Scorer, pool: Pool, *, p: int = 10, unit_rows: int = 20_000) -> Log:
    """The log of this teacher on this pool, new or begun before. Raises DataError if ``folder`` holds scores of another teacher, pool or setting."""
    pool = resolve_pool(pool, scorer)
    manifest = load_manifest(pool.path)
    if manifest.channels != scorer.manifest.channels:
        raise DataError(f"{pool.path} has images of {manifest.channels} channel(s), the teacher learned from {scorer.manifest.channels}; convert it again")
    rows_N = None
    count = manifest.split(pool.split).count
    if pool.rows == "unlabeled":
        split = load_split(manifest, pool.label_split)
        if split.of != pool.split:
            raise DataError(f"label split {split.name!r} is about {split.of!r} of {pool.path}, not about {pool.split!r}; set pool.split={split.of}")
        rows_N = np.sort(split.unlabeled)
        count = len(rows_N)
    if count == 0:
        raise DataError(f"the pool is empty: {pool.path} has no {pool.rows} rows in {pool.split!r}")
    if unit_rows < 1:
        raise DataError(f"units of {unit_rows} rows cannot be scored; at least 1 row")
    rows = {"kind": pool.rows, "count": count, "digest": None if rows_N is None else rows_digest(rows_N)}
    identity = {
        **scorer.identity,
        "pool": {"dataset_digest": manifest.digest, "split": pool.split, "rows_digest": manifest.split(pool.split).rows_digest},
        "rows": rows,
        "unit_rows": unit_rows,
        "p": min(p, len(scorer.identity["classes"])),
    }
    versions = {"fastssl": fastssl.__version__, **{name: version(name) for name in ("torch", "timm", "pyarrow", "numpy")}}
    log = Log.create(folder, identity, {"pool": asdict(pool), "versions": versions, "device": scorer.device.type}, rows_N)
    log.check_rows()
    return log


@dataclass
class Work:
    """What one worker did."""

    units: int = 0
    images: int = 0
    bad: int = 0
    seconds: float = 0.0


def work(log: Log, scorer: Scorer, *, lease_s: float = 120.0, say: Callable[[str], None] = print, wait: bool = True) -> Work:
    """Score units until the log is complete; those of dead workers too. ``wait`` False: return when the rest is claimed by others.

    A worker that is killed loses its unit in hand.  Ctrl-C and errors give it back at once.
    """
    done = Work()
    source, began = None, time.monotonic()
    try:
        with Claims(log.folder / "claims", lease_s) as claims:
            while missing := log.missing():
                unit = _claim(log, claims, missing)
                if unit is None:
                    if not wait:
                        break
                    time.sleep(min(POLL_S, lease_s / 4))
                    continue
                source = source or _open_pool(log, scorer)
                try:
                    begun = time.monotonic()
                    part, bad = score_unit(log, scorer, source, unit)
                    if log.commit(unit, part, bad):
                        done.units, done.images, done.bad = done.units + 1, done.images + len(part.id_N), done.bad + len(bad)
                    rate = unit.count / max(time.monotonic() - begun, 1e-9)
                    left, of_bad = len(log.missing()), f", {len(bad)} bad" if bad else ""
                    say(f"unit {unit.name}: {unit.count} images, {rate:.0f} images/s{of_bad}; {left} of {len(log.units)} units left")
                finally:
                    claims.release(unit.name)
    finally:
        if source is not None:
            source.close()
    done.seconds = time.monotonic() - began
    return done


def score_unit(log: Log, scorer: Scorer, source: Any, unit: Unit) -> tuple[Part, list[tuple[int, str]]]:
    """A unit's scores, and (row, reason) of its images that have none. Raises DataError if not one image could be scored."""
    rows_N = log.rows(unit)
    cls_NP, score_NP = scorer.score(source, rows_N, log.p)
    broken = np.isin(rows_N, np.fromiter(getattr(source, "bad_row_ids", ()), dtype=np.int64))
    unusable = ~np.isfinite(score_NP).all(axis=1) & ~broken
    if unusable.all():
        raise DataError(f"unit {unit.name}: the teacher's scores of all {len(rows_N)} images are not finite; its weights or its precision are at fault")
    bad = [(row, "cannot be decoded") for row in rows_N[broken].tolist()] + [(row, "scores are not finite") for row in rows_N[unusable].tolist()]
    good = ~(broken | unusable)
    return Part(rows_N[good].astype(np.uint64), cls_NP[good], score_NP[good]), sorted(bad)


def worker_device() -> torch.device:
    """This process's device: under a launcher, the GPU of its local rank. No process group is joined."""
    if not torch.cuda.is_available():
        torch.set_num_threads(cores_per_process())
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _claim(log: Log, claims: Claims, missing: list[Unit]) -> Unit | None:
    """A unit that this worker now holds; workers begin at different places, so that they seldom want the same one."""
    first = int(hashlib.sha256(str(claims.owner["token"]).encode()).hexdigest(), 16) % len(missing)
    for unit in missing[first:] + missing[:first]:
        if claims.take(unit.name):
            if not log.is_committed(unit):
                return unit
            claims.release(unit.name)  # committed between our look and our claim
    return None


def _open_pool(log: Log, scorer: Scorer) -> Any:
    place = log.made_with["pool"]
    manifest = load_manifest(place["path"])
    if manifest.digest != log.identity["pool"]["dataset_digest"]:
        raise DataError(f"{place['path']} changed since {log.folder} was begun; score into a new folder")
    recipe = scorer.recipe
    same = Path(place["path"]).resolve() == Path(recipe.data.path).resolve()
    reader = recipe.data.source if same else "auto"
    there = replace(recipe, data=replace(recipe.data, path=place["path"], source=reader))
    return open_rows(there, manifest, place["split"], scorer.device)
