"""Checking a converted dataset against its own records, and the train split against the test split."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from data_tools.ffcv_check import Left, compare
from data_tools.leaks import Ledger, fingerprint
from data_tools.manifest_writer import OWN, combine, file_digest, own_digest, rows_entry
from data_tools.pool import run_all
from data_tools.progress import track
from data_tools.rows import ROWS, update_digests
from data_tools.storage import JPEG, PNG
from data_tools.stored import open_stored
from data_tools.unused import unused_bytes
from fastssl.errors import DataError
from fastssl.sources.base import open_source
from fastssl.sources.manifest import MANIFEST_NAME, Manifest, load_labels, load_manifest, load_split, split_files

_SHOWN = 5
_BATCH = 256


@dataclass
class Findings:
    """``problems`` make the dataset unfit for use; ``notes`` are facts."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(dataset: str | Path, *, leaks: bool = False, workers: int = 1, ffcv: bool = False, decode: bool = True) -> Findings:
    """Read every stored image again, compare its hash with rows.parquet, decode it (unless ``decode`` is False), check every other file and label split.

    With ``leaks`` also report images that occur twice (equal decoded pixels; equal source bytes where nothing is decoded), above all in train and test.
    With ``ffcv`` also compare what our reader gives with what the ffcv package gives, for a dataset of format ffcv; a note says so where that package is
    not installed.
    Raises DataError where the folder cannot be read at all.
    """
    manifest = load_manifest(dataset)
    found = Findings()
    _check_files(manifest, found)
    rows = _open_rows(manifest)
    if leaks:
        with Ledger(manifest.splits) as ledger:
            _check_rows(manifest, rows, workers, decode, found, ledger)
            leaked = ledger.report()
    else:
        leaked = []
        _check_rows(manifest, rows, workers, decode, found)
    for file in split_files(manifest.root):
        try:
            load_split(manifest, str(file))
        except DataError as error:
            found.problems.append(str(error))
    if ffcv and manifest.format == "ffcv":
        _check_with_ffcv(manifest, found)
    found.notes += leaked
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
    said = json.loads((manifest.root / MANIFEST_NAME).read_text())
    recorded = said.get("checksums", {})
    if (OWN in said or "tables" in said) and said.get(OWN) != own_digest(said):  # datasets that were written before there was one have neither
        found.problems.append(f"{MANIFEST_NAME} has changed since it was written")
    for file, digest in said.get("tables", {}).items():
        if not (manifest.root / file).is_file() or file_digest(manifest.root / file) != digest:
            found.problems.append(f"{file} is missing or has changed since it was written")
    needed = {file for info in manifest.splits.values() for file in info.content}
    rows = {rows_entry(split) for split in manifest.splits}
    if not set(recorded) - rows <= needed or not rows <= set(recorded) or combine(recorded) != manifest.digest:
        found.problems.append(f"{MANIFEST_NAME}: its checksums do not belong to its files and digest (edited by hand?)")
    for file in sorted(needed):
        path = manifest.root / file
        if not path.is_file():
            found.problems.append(f"{file} is missing")
        elif file in recorded and file_digest(path) != recorded[file]:  # files of which every row is hashed have no checksum of their own
            found.problems.append(f"{file} has changed since it was written ({path.stat().st_size} bytes)")


def _open_rows(manifest: Manifest) -> pq.ParquetFile:
    file = manifest.root / "rows.parquet"
    try:
        table = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{str(file)!r} is missing or damaged ({str(error).splitlines()[0]}); convert the dataset again") from error
    if table.schema_arrow.remove_metadata() != ROWS:
        raise DataError(f"{str(file)!r} has columns {table.schema_arrow.names}, expected {ROWS.names}; convert the dataset again")
    return table


@dataclass
class _Seen:
    """What the row table says of one split, and what its stored rows turned out to be."""

    stored: Any = field(default_factory=hashlib.sha256)
    content: Any = field(default_factory=hashlib.sha256)
    rows: int = 0
    labels_differ: bool = False
    changed: list[int] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)


def _check_rows(manifest: Manifest, rows: pq.ParquetFile, workers: int, decode: bool, found: Findings, ledger: Ledger | None = None) -> None:
    """Read every stored row again: its hash, and that it decodes to the recorded size; sound ones are entered in the ledger."""
    readers, labels = {}, {}
    for split in manifest.splits:
        try:
            labels[split] = load_labels(manifest, split)
            open_source(manifest.root, split).close()
            readers[split] = open_stored(manifest, split)
            stray = unused_bytes(manifest, split)
            if stray:
                found.problems.append(f"{split}: {stray}")
        except DataError as error:
            found.problems.append(str(error))
    seen = {split: _Seen() for split in readers}

    def check(batch: pa.RecordBatch) -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[tuple[bytes, str, int, int]]]:
        changed, broken, sound = [], [], []
        columns = (batch.column(name).to_pylist() for name in ("split", "row", "height", "width", "sha256", "label", "source_sha256"))
        for split, row, height, width, digest, label, source in zip(*columns, strict=True):
            if split not in readers or row >= manifest.splits[split].count:
                continue
            try:
                code, data = readers[split](row, height, width)
                if hashlib.sha256(data).hexdigest() != digest:
                    changed.append((split, row))
                    continue
                pixels = _decoded(code, data, manifest.channels, height, width) if decode else None
                if pixels is not None and pixels.shape[:2] != (height, width):
                    broken.append((split, row))
                elif ledger is not None:
                    same = bytes.fromhex(source)[:16] if pixels is None else fingerprint(height, width, np.ascontiguousarray(pixels).data)
                    sound.append((same, split, row, label))
            except (ValueError, OSError, SyntaxError):
                broken.append((split, row))
        return changed, broken, sound

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in rows.iter_batches(_BATCH):
            _follow(batch, seen, labels)
            yield batch

    total = -(-rows.metadata.num_rows // _BATCH)
    try:
        for changed, broken, sound in track(run_all(check, batches(), workers), total, f"verify (batches of {_BATCH} images)"):
            for split, row in changed:
                seen[split].changed.append(row)
            for split, row in broken:
                seen[split].broken.append(row)
            if ledger is not None:
                ledger.add(sound)
    except (pa.ArrowException, OSError, ValueError) as error:  # stored rows that cannot be read are told above: this is the table
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{str(manifest.root / 'rows.parquet')!r} is damaged ({reason}); convert the dataset again") from error
    for split, facts in seen.items():
        _judge(manifest, split, facts, decode, found)


def _follow(batch: pa.RecordBatch, seen: dict[str, _Seen], labels: dict[str, np.ndarray]) -> None:
    """Run the digests and compare row numbers and labels, in the table's order."""
    split_of = np.asarray(batch.column("split").to_pylist(), object)
    for split, facts in seen.items():
        chosen = np.flatnonzero(split_of == split)
        if not len(chosen):
            continue
        part = batch.take(pa.array(chosen))
        own = part.column("label").to_numpy()
        start, stop = facts.rows, facts.rows + len(chosen)
        in_order = np.array_equal(part.column("row").to_numpy(), np.arange(start, stop))
        facts.labels_differ |= not in_order or not np.array_equal(own, labels[split][start:stop])
        hashes = [np.frombuffer(bytes.fromhex("".join(part.column(name).to_pylist())), "V32") for name in ("sha256", "source_sha256")]
        update_digests(facts.stored, facts.content, own, *hashes)
        facts.rows = stop


def _decoded(code: int, data: Any, channels: int, height: int, width: int) -> np.ndarray:
    """Pixels uint8 [H, W, channels] of a stored row; ValueError, OSError or SyntaxError where it cannot be decoded."""
    if code == JPEG:
        return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    if code == PNG:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:2], -1)
    pixels = np.frombuffer(data, np.uint8).reshape(height, width, -1)
    return pixels[..., :channels]  # grey in a .beton: three equal channels


def _judge(manifest: Manifest, split: str, facts: _Seen, decode: bool, found: Findings) -> None:
    info = manifest.split(split)
    if facts.rows != info.count:
        found.problems.append(f"rows.parquet: {split} has {facts.rows} rows, {MANIFEST_NAME} says {info.count}")
    if facts.labels_differ:
        found.problems.append(f"rows.parquet: labels of {split} differ from {info.labels}")
    recorded = json.loads((manifest.root / MANIFEST_NAME).read_text()).get("checksums", {})
    if facts.content.hexdigest() != info.rows_digest or facts.stored.hexdigest() != recorded.get(rows_entry(split)):
        found.problems.append(f"rows.parquet: {split} does not match the rows digest in {MANIFEST_NAME}")
    for rows, what in ((facts.changed, "are not the bytes that were written"), (facts.broken, "do not decode to the recorded size")):
        if rows:
            shown = ", ".join(map(str, sorted(rows)[:_SHOWN]))
            found.problems.append(f"{split}: {len(rows)} images {what} (rows {shown}{' ...' if len(rows) > _SHOWN else ''})")
    found.notes.append(f"{split}: {info.count} images read and {'decoded' if decode else 'compared'}")
