"""What is in a label split, in lines of text: its header, counts, class histogram and what it shares with another split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_tools.histogram import bars
from fastssl.errors import DataError
from fastssl.sources.manifest import LabelSplit, Manifest, find_split, load_labels, load_manifest, load_split
from fastssl.sources.split_text import read_split_text

_HEADER = ("law", "seed", "arguments", "dataset", "dataset_digest", "rows_digest", "of", "digest")


def describe(dataset: str | Path, name: str, other: str = "") -> list[str]:
    """Lines about a split (name or file), and with ``other`` about the rows that the two share.  DataError as ``load_split`` raises it."""
    manifest = load_manifest(dataset)
    split, file = load_split(manifest, name), find_split(manifest.root, name)
    raw = read_split_text(file) if file.suffix == ".txt" else json.loads(file.read_text(encoding="utf-8"))
    lines = [str(file)]
    for key in _HEADER:
        value = raw.get(key, "")
        lines.append(f"  {key:15} {json.dumps(value) if isinstance(value, dict) else value}")
    labels = load_labels(manifest, split.of)
    total, unknown = len(labels), int((labels[split.unlabeled] < 0).sum())
    left = total - len(split.labeled) - len(split.unlabeled) - len(split.validation)
    lines.append(f"  labelled        {len(split.labeled)} of {total} images ({100 * len(split.labeled) / total:.3g} %)")
    lines.append(f"  unlabelled      {len(split.unlabeled)}, and {len(split.unlabeled) + len(split.labeled)} with data.include_labeled=true")
    if unknown:
        lines.append(f"                  the class of {unknown} of them is not known to anybody")
    lines.append(f"  validation      {len(split.validation)}")
    if left:
        lines.append(f"  in neither      {left}")
    counts = np.bincount(labels[split.labeled], minlength=manifest.num_classes)
    lines.append(f"labelled images per class: {counts.min()}..{counts.max()}")
    lines += [f"  {line}" for line in bars(manifest.classes, counts)]
    return lines + (_overlap(manifest, split, other) if other else [])


def _overlap(manifest: Manifest, split: LabelSplit, name: str) -> list[str]:
    other = load_split(manifest, name)
    if other.of != split.of:
        raise DataError(f"splits {split.name!r} and {other.name!r} are of different parts of the dataset ({split.of}, {other.of})")
    common = np.intersect1d(split.labeled, other.labeled).size
    lines = [f"compared with {find_split(manifest.root, name)} ({other.law}, seed {other.seed}, {len(other.labeled)} labelled)"]
    lines.append(
        f"  labelled in both        {common}: {100 * common / len(split.labeled):.3g} % of this, {100 * common / len(other.labeled):.3g} % of the other"
    )
    if common == len(split.labeled) == len(other.labeled):
        lines.append("  the same labelled images" + ("" if np.array_equal(split.labeled, other.labeled) else " in another order"))
    elif common == min(len(split.labeled), len(other.labeled)):
        lines.append("  nested: the smaller labelled side lies within the larger one")
    for side, theirs in (("labelled here, unlabelled there", other.unlabeled), ("labelled here, validation there", other.validation)):
        lines.append(f"  {side} {np.intersect1d(split.labeled, theirs).size}")
    lines.append(f"  validation here, labelled there {np.intersect1d(split.validation, other.labeled).size}")
    return lines
