"""The work of one unit: a fixed range of rows read, checked, converted, hashed and written to a part that is either whole or not there.

This module runs in worker processes: it imports nothing heavy.  What a unit writes depends on its rows and the rules alone.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.atomic import told
from data_tools.collection import BadImage, Keys, RawSplit
from data_tools.images import Rules, prepare
from data_tools.outputs import open_output
from data_tools.storage import Storage

ROW = np.dtype(
    [
        ("row", "<i8"),  # of the source split
        ("label", "<i8"),
        ("code", "u1"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("own_height", "<i4"),
        ("own_width", "<i4"),
        ("bytes", "<i8"),
        ("sha256", "V32"),  # of the stored bytes
        ("source_sha256", "V32"),  # of the bytes or pixels that the reader gave
    ]
)
_FLUSH_PIXELS = 1 << 16
_BUFFER = 1 << 17  # small images are written many at a time


@dataclass(frozen=True)
class Task:
    """Rows first.. of a source split (``part`` holds them) to be written as ``folder/name.data`` and ``folder/name.meta``.

    ``measure`` > 0: pixels of rows whose number is a multiple of it are counted for mean and std (rows that come decoded are all counted).
    """

    name: str
    folder: Path
    part: RawSplit
    first: int
    rules: Rules
    storage: Storage
    measure: int = 0


@dataclass
class Unit:
    """What became of one unit: ``rows`` (dtype ROW) and ``keys`` of the images kept, in order, ``bad_*`` of those left out, ``histogram`` int64 [C, 256] of
    the ``measured`` images' pixels."""

    rows: np.ndarray
    keys: Keys
    bad_rows: np.ndarray
    bad_labels: np.ndarray
    bad_keys: Keys
    bad_reasons: Keys
    histogram: np.ndarray
    measured: int

    @property
    def payload(self) -> int:
        return int(self.rows["bytes"].sum())


def run(task: Task) -> tuple[str, int, int]:
    """Convert one unit and commit it; returns its name, the number of rows and the bytes stored.  The meta file, renamed last, is the commit."""
    data, meta = task.folder / f"{task.name}.data", task.folder / f"{task.name}.meta"
    unfinished = data.with_suffix(f".tmp-{os.getpid()}")
    with told(data):
        try:
            with open_output(unfinished) as handle:
                unit = convert_rows(task, handle.write)
            os.replace(unfinished, data)
            _write_meta(meta, unit)
        finally:
            unfinished.unlink(missing_ok=True)
    return task.name, task.part.count, unit.payload


def convert_rows(task: Task, write) -> Unit:
    """Convert the rows of a task, handing the stored bytes of each to ``write`` in order."""
    part, rules, storage = task.part, task.rules, task.storage
    rows: list[tuple] = []
    keys: list[str] = []
    bad: list[tuple[int, int, str, str]] = []
    pixels = PixelCounter(rules.channels)
    labels = np.asarray(part.labels).tolist()
    waiting: list[bytes | memoryview] = []
    waited = 0
    for index in range(part.count):
        row, key = task.first + index, part.key(index)
        try:
            raw = part.read(index)
            is_pixels = isinstance(raw, np.ndarray)
            source = hashlib.sha256(np.ascontiguousarray(raw).data if isinstance(raw, np.ndarray) else raw).digest()
            picture = prepare(raw, rules)
            code, stored = storage.encode(picture, key)
            if task.measure and (is_pixels or row % task.measure == 0):
                pixels.add(picture.decoded(rules.channels))
        except BadImage as reason:
            bad.append((row, labels[index], key, str(reason)))
            continue
        digest = source if stored is raw else hashlib.sha256(stored).digest()
        rows.append((row, labels[index], code, picture.height, picture.width, *picture.own, len(stored), digest, source))
        keys.append(key)
        waiting.append(stored)
        waited += len(stored)
        if waited >= _BUFFER:
            write(b"".join(waiting) if len(waiting) > 1 else stored)
            waiting, waited = [], 0
    if waiting:
        write(b"".join(waiting))
    return Unit(
        np.array(rows, ROW),
        Keys.of(keys),
        np.array([row for row, _, _, _ in bad], np.int64),
        np.array([label for _, label, _, _ in bad], np.int64),
        Keys.of(key for _, _, key, _ in bad),
        Keys.of(reason for _, _, _, reason in bad),
        pixels.total(),
        pixels.images,
    )


class PixelCounter:
    """Counts how often each level occurs in each channel; small images are counted many at a time."""

    def __init__(self, channels: int):
        self._counts, self._size, self.images = np.zeros((channels, 256), np.int64), 0, 0
        self._waiting: list[np.ndarray] = []

    def add(self, pixels: np.ndarray) -> None:
        self.images += 1
        self._waiting.append(pixels.reshape(-1, pixels.shape[2]))
        self._size += pixels.shape[0] * pixels.shape[1]
        if self._size >= _FLUSH_PIXELS:
            self.total()

    def total(self) -> np.ndarray:
        if self._waiting:
            flat = np.concatenate(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
            line = np.ascontiguousarray(flat[None] if flat.shape[1] == 3 else flat[None, :, 0])
            self._counts += np.asarray(Image.fromarray(line).histogram(), np.int64).reshape(-1, 256)
            self._waiting, self._size = [], 0
        return self._counts


def _write_meta(file: Path, unit: Unit) -> None:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        "rows": unit.rows.view(np.uint8) if len(unit.rows) else np.zeros(0, np.uint8),
        "bad_rows": unit.bad_rows,
        "bad_labels": unit.bad_labels,
    }
    for name in ("keys", "bad_keys", "bad_reasons"):
        strings = getattr(unit, name)
        arrays |= {f"{name}_text": strings.text, f"{name}_ends": strings.ends}
    np.savez(buffer, histogram=unit.histogram, measured=unit.measured, **arrays)
    content = buffer.getvalue()
    unfinished = file.with_suffix(f".mtmp-{os.getpid()}")
    try:
        with open_output(unfinished) as handle:
            handle.write(hashlib.sha256(content).digest() + content)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def load_unit(file: Path) -> Unit | None:
    """A committed unit's record, or None where the file does not agree with its own digest."""
    data = file.read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    with np.load(io.BytesIO(data[32:]), allow_pickle=False) as found:
        strings = {name: Keys(found[f"{name}_text"], found[f"{name}_ends"]) for name in ("keys", "bad_keys", "bad_reasons")}
        rows = found["rows"].view(ROW)
        return Unit(
            rows,
            strings["keys"],
            found["bad_rows"],
            found["bad_labels"],
            strings["bad_keys"],
            strings["bad_reasons"],
            found["histogram"],
            int(found["measured"]),
        )


def is_whole(meta: Path) -> bool:
    """Read a committed unit again: every stored row has the recorded hash.  A power cut may leave files that are shorter than what was written."""
    try:
        unit = load_unit(meta)
        if unit is None:
            return False
        with open(meta.with_suffix(".data"), "rb") as handle:
            for size, digest in zip(unit.rows["bytes"].tolist(), unit.rows["sha256"].tolist(), strict=True):
                if hashlib.sha256(handle.read(size)).digest() != digest:
                    return False
            return handle.read(1) == b""
    except OSError:
        return False
