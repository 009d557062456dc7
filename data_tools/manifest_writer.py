"""dataset.json of a new dataset: counts, sizes, measured mean and std, files, checksums and digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.collection import Collection
from data_tools.plan import SplitPlan
from fastssl.sources.manifest import FORMAT_VERSION

TABLES = ("rows.parquet", "bad.parquet")
OWN = "manifest_digest"


def build_manifest(
    folder: Path,
    plans: list[SplitPlan],
    data: dict[str, tuple[dict[str, Any], bool]],
    records: dict[str, tuple[str, dict[str, str], str, str]],
    *,
    raw: Collection,
    name: str,
    known: str | None,
    classes: tuple[str, ...],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of the files in ``folder``: ``data`` and ``records`` as assembly wrote them.

    ``checksums`` has the sha256 of every content file, except data files whose every image is in ``rows``: the sha256 over the hashes of the stored rows,
    in order, under ``<split> rows``.  ``tables`` has the sha256 of the row tables; it is no part of the dataset's digest, since another release of the
    Parquet library may write the same rows as other bytes.  Times, machine and paths do not occur: the same conversion gives the same manifest.
    """
    splits: dict[str, dict[str, Any]] = {}
    checksums: dict[str, str] = {}
    for plan in plans:
        files, covered = data[plan.name]
        labels, extra, stored, content = records[plan.name]
        hashed = [labels, *extra.values(), *(() if covered else every_file(files))]
        checksums |= {file: file_digest(folder / file) for file in hashed}
        checksums[rows_entry(plan.name)] = stored
        splits[plan.name] = {
            "count": plan.count,
            "class_counts": plan.class_counts.tolist(),
            "unlabeled": plan.unlabeled,
            "bad": plan.bad,
            "max_height": plan.max_height,
            "max_width": plan.max_width,
            "files": {**files, **extra},
            "labels": labels,
            "rows_digest": content,
            "sizes": plan.sizes(),
        }
    measured = max(plans, key=lambda plan: plan.measured)
    mean, std = moments(measured.histogram)
    manifest = {
        "format_version": FORMAT_VERSION,
        "format": options["format"],
        "name": name or known or raw.name,
        "classes": list(classes),
        "channels": raw.channels,
        "mean": mean,
        "std": std,
        "measured": {"split": measured.name, "images": measured.measured, "of": measured.count},
        "splits": splits,
        "source": {"kind": raw.kind, "known_as": known, "digest": combine({k: v["rows_digest"] for k, v in splits.items()})},
        "options": options,
        "checksums": checksums,
        "tables": {file: file_digest(folder / file) for file in TABLES if (folder / file).is_file()},
        "digest": combine(checksums),
    }
    return {**manifest, OWN: own_digest(manifest)}


def own_digest(manifest: dict[str, Any]) -> str:
    """sha256 (hex) of everything that a dataset.json says, but for this digest itself, in whatever order and spacing."""
    said = {key: value for key, value in manifest.items() if key != OWN}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def rows_entry(split: str) -> str:
    """Under which name the hash over a split's stored rows stands among the checksums."""
    return f"{split} rows"


def every_file(files: dict[str, Any]) -> list[str]:
    """All names in a split's ``files``, lists included."""
    return [file for names in files.values() for file in (names if isinstance(names, list | tuple) else [names])]


def moments(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in [0, 1] over all counted pixels; histogram int64 [C, 256]."""
    values, total = np.arange(256, dtype=np.float64), np.maximum(histogram.sum(axis=1), 1)
    mean = histogram @ values / total
    variance = histogram @ values**2 / total - mean**2
    return [round(float(m) / 255, 8) for m in mean], [round(float(np.sqrt(max(v, 0.0))) / 255, 8) for v in variance]


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def combine(parts: dict[str, str]) -> str:
    """sha256 over sorted names and digests: the dataset's digest from its checksums, the source's from its splits."""
    return hashlib.sha256("".join(f"{name} {value}\n" for name, value in sorted(parts.items())).encode()).hexdigest()
