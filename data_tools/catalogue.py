"""Proof that a raw collection is the published dataset: counts, class balance, channel statistics, and every pixel where its digest is known."""

from __future__ import annotations

import hashlib

import numpy as np

from data_tools.collection import ArraySplit, Collection, RawSplit
from data_tools.known import KNOWN, Known
from data_tools.manifest_writer import moments
from fastssl.errors import DataError

_STATS_TOLERANCE = 1e-3  # published statistics are rounded to the fourth digit, and not all in the same way


def content_digest(split: RawSplit) -> str:
    """sha256 of the decoded pixels of all rows in order, then the labels as bytes: independent of how a mirror packs them."""
    digest = hashlib.sha256()
    for row in range(split.count):
        digest.update(np.ascontiguousarray(split.read(row)).data)
    digest.update(split.labels.astype(np.uint8).tobytes())
    return digest.hexdigest()


def identify(raw: Collection) -> Known | None:
    """The known dataset that ``raw`` is, pixel for pixel, or None."""
    if set(raw.splits) != {"train", "test"}:
        return None
    counts = {name: len(split.labels) for name, split in raw.splits.items()}
    candidates = [known for known in KNOWN.values() if known.content and known.counts == counts and len(known.classes) == len(raw.classes)]
    if not candidates or not all(isinstance(split, ArraySplit) for split in raw.splits.values()):
        return None
    content = {name: content_digest(split) for name, split in raw.splits.items()}
    return next((known for known in candidates if known.content == content), None)


def check_content(known: Known, raw: Collection, where: str) -> list[str]:
    """What of the published facts was compared, in words.  DataError where ``raw`` differs: in counts, in images per class, in channel statistics, or in any
    pixel or label (or their order), named in this sequence."""
    compared = []
    for name, count in known.counts.items():
        if name not in raw.splits:
            raise DataError(f"{where} has no {name} split of {known.name}; fetch it again")
        split = raw.splits[name]
        if split.count != count:
            raise DataError(f"{where}: {known.name} {name} has {split.count} images, published are {count}; fetch it again")
    for name, wanted in known.per_class.items():
        labels = raw.splits[name].labels
        counts = np.bincount(labels[labels >= 0], minlength=len(raw.classes))
        expected = np.broadcast_to(np.asarray(wanted), counts.shape) if isinstance(wanted, int) or len(wanted) == len(counts) else np.asarray(wanted)
        if not np.array_equal(counts, expected):
            raise DataError(f"{where}: {known.name} {name} has {_shown(counts)} images per class, published are {_shown(expected)}; fetch it again")
    if known.counts:
        compared.append("images per class" if known.per_class else "number of images")
    for name, digest in known.content.items():
        split = raw.splits[name]
        if name == "train":
            _check_statistics(known, split, where)
        if not isinstance(split, ArraySplit) or content_digest(split) != digest:
            raise DataError(f"{where}: {known.name} {name} differs from the published pixels or labels (or their order); fetch it again or use another mirror")
    if known.mean and not known.content:
        _check_statistics(known, raw.splits["train"], where)
    return compared + (["channel statistics"] if known.mean else []) + (["every pixel and label"] if known.content else [])


def _check_statistics(known: Known, split: RawSplit, where: str) -> None:
    if not known.mean:
        return
    if not isinstance(split, ArraySplit) or split.pixels.shape[3] != len(known.mean):
        raise DataError(f"{where}: {known.name} train does not hold pixels of {len(known.mean)} channel(s); fetch it again")
    histogram = np.zeros((len(known.mean), 256), np.int64)
    for start in range(0, split.count, 4096):
        part = np.asarray(split.pixels[start : start + 4096])
        for channel in range(len(known.mean)):
            histogram[channel] += np.bincount(part[..., channel].reshape(-1), minlength=256)
    for what, found, published in zip(("mean", "std"), moments(histogram), (known.mean, known.std), strict=True):
        if np.abs(np.subtract(found, published)).max() > _STATS_TOLERANCE:
            shown = ", ".join(f"{value:.4f}" for value in found)
            raise DataError(f"{where}: {known.name} train has the channel {what} {shown}, published is {', '.join(map(str, published))}; fetch it again")


def _shown(counts: np.ndarray) -> str:
    return str(int(counts[0])) if len(set(counts.tolist())) == 1 else f"{counts.tolist()[:10]}{' ...' if len(counts) > 10 else ''}"
