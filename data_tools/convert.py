"""Converting a raw image collection into a dataset folder: content files, labels, row table and manifest, all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.arrays_writer import ArraysWriter, npy_bytes
from data_tools.atomic import new_folder, write_file
from data_tools.beton_writer import MODES, BetonWriter
from data_tools.catalogue import identify
from data_tools.progress import say, track
from data_tools.readers import Picture, RawDataset, RawSplit, open_raw
from fastssl.errors import DataError, nearest
from fastssl.sources.manifest import FORMAT_VERSION, FORMATS, MANIFEST_NAME, load_manifest, load_split

ROWS = pa.schema(
    [
        ("row", pa.int64()),
        ("split", pa.string()),
        ("key", pa.string()),
        ("label", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    format: str = "arrays",
    name: str = "",
    mode: str = "auto",
    quality: int = 95,
    force: bool = False,
    workers: int = 0,
) -> Path:
    """Write ``source`` (see readers.open_raw) as the dataset folder ``dest``; returns ``dest``.

    The same input gives the same bytes and digest.  ``sha256`` in rows.parquet is that of the decoded pixels as training will see them.
    Raises DataError for unknown kinds, unreadable images, an existing ``dest`` (unless ``force``), a full disk; then ``dest`` is left as it was.
    """
    if format not in FORMATS:
        raise DataError(f"unknown format {format!r}{nearest(format, FORMATS)}; known: {list(FORMATS)}")
    if mode not in MODES:
        raise DataError(f"unknown mode {mode!r}{nearest(mode, MODES)}; known: {list(MODES)}")
    if not 1 <= quality <= 100:
        raise DataError(f"JPEG quality {quality} is outside 1..100")
    if Path(source).resolve() == Path(dest).resolve():
        raise DataError(f"source and destination are the same folder {str(dest)!r}; choose another destination")
    with new_folder(dest, replace=force) as folder:
        raw = open_raw(source)
        known = identify(raw)
        classes = known.classes if known else raw.classes
        options: dict[str, Any] = {"format": format} if format == "arrays" else {"format": format, "mode": mode, "jpeg_quality": quality}
        _check_space(raw, format, folder)
        tables, splits, histogram = [], {}, np.zeros((raw.channels, 256), np.int64)
        for split_name, split in raw.splits.items():
            _check_labels(split, split_name, classes)
            table, splits[split_name] = _write_split(raw, split_name, split, folder, options, len(classes), workers, histogram)
            tables.append(table)
        pq.write_table(pa.concat_tables(tables), folder / "rows.parquet", compression="zstd")
        checksums = {file: file_digest(folder / file) for entry in splits.values() for file in (*entry["files"].values(), entry["labels"])}
        mean, std = _moments(histogram)
        manifest = {
            "format_version": FORMAT_VERSION,
            "format": format,
            "name": name or (known.name if known else raw.name),
            "classes": list(classes),
            "channels": raw.channels,
            "mean": mean,
            "std": std,
            "splits": splits,
            "source": {"kind": raw.kind, "known_as": known.name if known else None, "digest": _combine({k: v["rows_digest"] for k, v in splits.items()})},
            "options": options,
            "checksums": checksums,
            "digest": content_digest(checksums),
        }
        (folder / "splits").mkdir()
        write_file(folder / MANIFEST_NAME, (json.dumps(manifest, indent=1) + "\n").encode())
        _keep_label_splits(Path(dest) / "splits", folder)
    return Path(dest)


def _keep_label_splits(old: Path, folder: Path) -> None:
    """Carry the label splits of a replaced dataset over where they were drawn for the same rows."""
    manifest = load_manifest(folder)
    for file in sorted(old.glob("*.json")):
        copy = folder / "splits" / file.name
        shutil.copyfile(file, copy)
        try:
            load_split(manifest, str(copy))
        except DataError:
            copy.unlink()
            say(f"label split {file.stem} belongs to other data and was dropped; draw it again")


def _check_labels(split: RawSplit, name: str, classes: tuple[str, ...]) -> None:
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= len(classes):
        raise DataError(f"{name}: labels reach from {low} to {high}, but there are {len(classes)} classes: wrong class count; fetch the source again")


def _check_space(raw: RawDataset, format: str, folder: Path) -> None:
    need = 0
    for split in raw.splits.values():
        sides = split.extents.astype(np.int64)
        if format == "arrays":
            need += len(sides) * int(sides[:, 0].max()) * int(sides[:, 1].max()) * raw.channels
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(f"the disk is too small: this needs {need / 1e9:.2f} GB of canvases, {free / 1e9:.2f} GB are free; use --format ffcv or another disk")


def _write_split(
    raw: RawDataset, name: str, split: RawSplit, folder: Path, options: dict[str, Any], num_classes: int, workers: int, histogram: np.ndarray
) -> tuple[pa.Table, dict[str, Any]]:
    count = len(split.labels)
    height, width = (int(side) for side in split.extents.max(axis=0))
    writer: ArraysWriter | BetonWriter
    if options["format"] == "arrays":
        writer = ArraysWriter(folder, name, count, (height, width, raw.channels), split.extents)
    else:
        writer = BetonWriter(folder, name, count, split.extents, options["mode"], options["jpeg_quality"])
    hashes, sizes = [], []
    threads = (workers or min(8, os.cpu_count() or 1)) if raw.kind == "class_folders" else 1
    try:
        for row, picture in enumerate(track(_pictures(split, threads), count, f"convert {name}")):
            if picture.pixels.shape[:2] != tuple(split.extents[row]):
                raise DataError(f"{split.keys[row]}: decodes to {picture.pixels.shape[:2]} but its header says {tuple(split.extents[row].tolist())}; repair it")
            seen, stored = writer.add(picture, int(split.labels[row]))
            hashes.append(hashlib.sha256(np.ascontiguousarray(seen).data).hexdigest())
            sizes.append(stored)
            if name == "train":
                for channel in range(raw.channels):
                    histogram[channel] += np.bincount(seen[..., channel].reshape(-1), minlength=256)
        files = writer.finish()
    finally:
        writer.close()
    labels = f"{name}.labels.npy"
    (folder / labels).write_bytes(npy_bytes(split.labels.astype(np.int64)))
    table = pa.table(
        {
            "row": np.arange(count),
            "split": [name] * count,
            "key": split.keys,
            "label": split.labels.astype(np.int64),
            "height": split.extents[:, 0].astype(np.int32),
            "width": split.extents[:, 1].astype(np.int32),
            "bytes": np.asarray(sizes, np.int64),
            "sha256": hashes,
        },
        schema=ROWS,
    )
    entry = {
        "count": count,
        "class_counts": np.bincount(split.labels, minlength=num_classes).tolist(),
        "max_height": height,
        "max_width": width,
        "files": files,
        "labels": labels,
        "rows_digest": rows_digest(split.labels, split.extents, hashes),
    }
    return table, entry


def _pictures(split: RawSplit, threads: int) -> Iterator[Picture]:
    """All pictures in row order, decoded by ``threads`` threads a few rows ahead."""
    if threads == 1:
        yield from map(split.load, range(len(split.labels)))
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        for row in range(len(split.labels)):
            waiting.append(pool.submit(split.load, row))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _moments(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in [0, 1], over all pixels of all training images."""
    values, total = np.arange(256, dtype=np.float64), histogram.sum(axis=1)
    mean = histogram @ values / total
    variance = histogram @ values**2 / total - mean**2
    return [round(float(m) / 255, 8) for m in mean], [round(float(np.sqrt(max(v, 0.0))) / 255, 8) for v in variance]


def rows_digest(labels: np.ndarray, extents: np.ndarray, hashes: list[str]) -> str:
    """sha256 over (label, height, width, pixel hash) of all rows in order: equal for equal data in any storage format."""
    digest = hashlib.sha256()
    for label, (height, width), pixels in zip(labels.tolist(), extents.tolist(), hashes, strict=True):
        digest.update(f"{label} {height} {width} {pixels}\n".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_digest(checksums: dict[str, str]) -> str:
    """The dataset's digest: sha256 over the sorted names and sha256 of its content files."""
    return _combine(checksums)


def _combine(parts: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {value}\n" for name, value in sorted(parts.items())).encode()).hexdigest()
