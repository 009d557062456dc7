"""Checking a converted dataset against its own records, and the train split against the test split."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.convert import ROWS, content_digest, file_digest, rows_digest
from data_tools.ffcv_check import Left, compare
from data_tools.progress import track
from fastssl.errors import DataError
from fastssl.sources.base import Source, open_source
from fastssl.sources.manifest import MANIFEST_NAME, Manifest, load_labels, load_manifest, load_split
from fastssl.types import RawBatch

_SHOWN = 5


@dataclass
class Findings:
    """``problems`` make the dataset unfit for use; ``notes`` are facts."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(dataset: str | Path, *, leaks: bool = False, workers: int = 1, ffcv: bool = False) -> Findings:
    """Hash every content file, decode every image and compare all of it with dataset.json and rows.parquet; check every label split.

    With ``leaks`` also report images that occur twice (equal decoded pixels), above all in train and test.  With ``ffcv`` also compare what our reader
    gives with what the ffcv package gives, for a dataset of format ffcv; a note says so where that package is not installed.
    Raises DataError where the folder cannot be read at all.
    """
    manifest = load_manifest(dataset)
    found = Findings()
    _check_files(manifest, found)
    rows = _read_rows(manifest)
    for split in manifest.splits:
        _check_split(manifest, split, rows, workers, found)
    for file in sorted((manifest.root / "splits").glob("*.json")):
        try:
            load_split(manifest, str(file))
        except DataError as error:
            found.problems.append(str(error))
    if ffcv and manifest.format == "ffcv":
        _check_with_ffcv(manifest, found)
    if leaks:
        found.notes += leak_report(rows)
    return found


def _check_with_ffcv(manifest: Manifest, found: Findings) -> None:
    try:
        images, problems = compare(manifest.root)
    except Left as reason:
        found.notes.append(f"left out: the comparison with FFCV's own loader, {reason}")
        return
    found.problems += problems
    if not problems:
        found.notes.append(f"FFCV's own loader agrees on {images} images")


def _check_files(manifest: Manifest, found: Findings) -> None:
    recorded = json.loads((manifest.root / MANIFEST_NAME).read_text()).get("checksums", {})
    needed = {file for info in manifest.splits.values() for file in (*info.files.values(), info.labels)}
    if set(recorded) != needed or content_digest(recorded) != manifest.digest:
        found.problems.append(f"{MANIFEST_NAME}: its checksums do not belong to its files and digest (edited by hand?)")
    for file in sorted(needed):
        path = manifest.root / file
        if not path.is_file():
            found.problems.append(f"{file} is missing")
        elif file_digest(path) != recorded.get(file):
            found.problems.append(f"{file} has changed since it was written ({path.stat().st_size} bytes)")


def _read_rows(manifest: Manifest) -> pa.Table:
    file = manifest.root / "rows.parquet"
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{str(file)!r} is missing or damaged ({str(error).splitlines()[0]}); convert the dataset again") from error
    if table.schema.remove_metadata() != ROWS:
        raise DataError(f"{str(file)!r} has columns {table.schema.names}, expected {ROWS.names}; convert the dataset again")
    return table


def _check_split(manifest: Manifest, split: str, rows: pa.Table, workers: int, found: Findings) -> None:
    info = manifest.split(split)
    table = rows.filter(pa.compute.equal(rows["split"], split))
    try:
        labels = load_labels(manifest, split)
        source = open_source(manifest.root, split, workers=workers)
    except DataError as error:
        found.problems.append(str(error))
        return
    try:
        if table.num_rows != info.count or not np.array_equal(table["row"].to_numpy(), np.arange(info.count)):
            found.problems.append(f"rows.parquet: {split} has {table.num_rows} rows, {MANIFEST_NAME} says {info.count}")
            return
        if not np.array_equal(table["label"].to_numpy(), labels):
            found.problems.append(f"rows.parquet: labels of {split} differ from {info.labels}")
        hashes, extents = table["sha256"].to_pylist(), np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1)
        if rows_digest(labels, extents, hashes) != info.rows_digest:
            found.problems.append(f"rows.parquet: {split} does not match the rows digest in {MANIFEST_NAME}")
        wrong = _decode_all(source, split, hashes, extents)
        if wrong:
            shown = ", ".join(map(str, wrong[:_SHOWN]))
            found.problems.append(f"{split}: {len(wrong)} images do not decode to the recorded pixels (rows {shown}{' ...' if len(wrong) > _SHOWN else ''})")
        found.notes.append(f"{split}: {info.count} images decoded and compared")
    finally:
        source.close()


def _decode_all(source: Source, split: str, hashes: list[str], extents: np.ndarray) -> list[int]:
    """Rows whose decoded extent or pixels differ from the record."""
    batch = max(1, min(1024, (64 << 20) // int(np.prod(source.canvas))))
    out, wrong = RawBatch.allocate(batch, *source.canvas), []
    starts = range(0, source.num_rows, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # undecodable rows are listed in the findings
        for start in track(starts, len(starts), f"verify {split} (batches of {batch})"):
            rows = np.arange(start, min(start + batch, source.num_rows))
            source.fill(rows, out)
            for row, pixels, (height, width) in zip(rows.tolist(), out.pixels_BHWC.numpy(), out.extent_B2.tolist(), strict=False):
                digest = hashlib.sha256(np.ascontiguousarray(pixels[:height, :width]).data).hexdigest()
                if (height, width) != tuple(extents[row]) or digest != hashes[row]:
                    wrong.append(row)
    return wrong


def leak_report(rows: pa.Table) -> list[str]:
    """Lines about images with equal decoded pixels: within each split, and between train and test."""
    places: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for digest, split, row, label in zip(*(rows[name].to_pylist() for name in ("sha256", "split", "row", "label")), strict=True):
        places[digest].append((split, row, label))
    lines = []
    repeated = [group for group in places.values() if len(group) > 1]
    for split in sorted(set(rows["split"].to_pylist())):
        within = [own for own in ([place for place in group if place[0] == split] for group in repeated) if len(own) > 1]
        conflicts = sum(len({label for _, _, label in own}) > 1 for own in within)
        lines.append(f"duplicates within {split}: {sum(len(own) - 1 for own in within)} images repeat an earlier one; {conflicts} groups disagree on the label")
    across = [group for group in repeated if len({split for split, _, _ in group}) > 1]
    leaked = sum(split == "test" for group in across for split, _, _ in group)
    lines.append(f"leaks: {leaked} test images also occur in another split")
    for group in across[:_SHOWN]:
        lines.append("  " + " = ".join(f"{split} row {row} (label {label})" for split, row, label in group))
    if len(across) > _SHOWN:
        lines.append(f"  ... and {len(across) - _SHOWN} more groups")
    return lines
