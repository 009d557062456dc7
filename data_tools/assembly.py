"""Putting converted units together, in order, into the files of a dataset folder; continues where a killed assembly stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_tools.arrays_writer import ArraysWriter
from data_tools.beton_writer import BetonWriter
from data_tools.journal import Journal
from data_tools.plan import SplitPlan
from data_tools.progress import Meter
from data_tools.rows import BAD, ROWS, RowTable, SplitRecords
from data_tools.shards_writer import ShardsWriter
from data_tools.storage import PNG

_SAVE_BYTES = 1 << 30  # how much is copied between two points from which assembly can continue, and before consumed parts are removed


class Writer(Protocol):
    """Writes the data files of one split.  ``mark`` None: it cannot continue in the middle, so its parts stay until the end.

    ``covered``: the hashes of the rows cover its data files, which then need no checksum of their own.
    """

    covered: bool

    def append(self, rows: np.ndarray, payload: Any) -> None: ...

    def mark(self) -> dict[str, Any] | None: ...

    def flush(self) -> Any: ...

    def finish(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class _Shards:
    """Tar shards as a Writer: they are written row by row, and an open shard cannot be continued."""

    covered = False  # labels stand in the shards too

    def __init__(self, folder: Path, plan: SplitPlan, shard_mb: int):
        self._writer = ShardsWriter(folder, plan.name, plan.count, shard_mb)

    def append(self, rows: np.ndarray, payload: Any) -> None:
        payload.seek(0)
        for code, size, label, height, width in rows[["code", "bytes", "label", "height", "width"]].tolist():
            self._writer.store("png" if code == PNG else "jpg", payload.read(size), label, height, width)

    def mark(self) -> None:
        return None

    def flush(self) -> None:
        return None

    def finish(self) -> dict[str, Any]:
        return self._writer.finish()

    def close(self) -> None:
        self._writer.close()


def make_writer(format: str, folder: Path, plan: SplitPlan, options: dict[str, Any], mark: dict[str, Any] | None) -> Writer:
    """The writer of one split in ``format``."""
    if format == "arrays":
        return ArraysWriter(folder, plan, mark)
    if format == "dali":
        return _Shards(folder, plan, options["shard_mb"])
    return BetonWriter(folder, plan, mark)


def write_data(journal: Journal, plan: SplitPlan, format: str, options: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Write the data files of one split; returns the files by role and whether the rows' hashes cover them.

    Every ``_SAVE_BYTES`` the output is forced to the disk, the place noted, and the parts used so far are removed: at no time does the disk hold much
    more than one copy.
    """
    progress = journal.assembled()
    before = progress.get(plan.name, {})
    if "files" in before:
        return before["files"], before["covered"]
    done = int(before.get("units", 0))
    writer = make_writer(format, journal.out, plan, options, before.get("mark"))
    meter = Meter(f"write {plan.name}", plan.count)
    used: list[str] = []
    copied = 0
    try:
        for number, name in enumerate(plan.units):
            if number < done:
                continue
            rows = journal.unit(name).rows
            if len(rows):
                with open(journal.data(name), "rb") as payload:
                    writer.append(rows, payload)
            size = int(rows["bytes"].sum())
            meter.add(len(rows), size)
            used.append(name)
            copied += size
            if copied >= _SAVE_BYTES:
                mark = writer.mark()
                if mark is not None:
                    os.fsync(writer.flush().fileno())
                    progress[plan.name] = {"units": number + 1, "mark": mark}
                    journal.mark(progress)
                    _remove(journal, used)
                    used, copied = [], 0
        files = writer.finish()
    finally:
        writer.close()
        meter.close()
    for names in files.values():
        for file in names if isinstance(names, list) else [names]:
            with open(journal.out / file, "rb") as handle:
                os.fsync(handle.fileno())
    progress[plan.name] = {"files": files, "covered": writer.covered}
    journal.mark(progress)
    _remove(journal, used)
    return files, writer.covered


def _remove(journal: Journal, names: list[str]) -> None:
    for name in names:
        journal.data(name).unlink(missing_ok=True)


def write_records(journal: Journal, plans: list[SplitPlan], format: str) -> dict[str, tuple[str, dict[str, str], str, str]]:
    """rows.parquet, bad.parquet (where there are bad images) and the row-wise arrays; per split (labels file, files by role, stored digest, rows digest)."""
    rows_table, bad_table = RowTable(journal.out / "rows.parquet", ROWS), RowTable(journal.out / "bad.parquet", BAD)
    found = {}
    try:
        for plan in plans:
            records = SplitRecords(journal.out, plan, extents=format == "arrays")
            try:
                for name in plan.units:
                    records.append(journal.unit(name), rows_table, bad_table)
                stored, content = records.finish()
            finally:
                records.close()
            found[plan.name] = (records.labels, records.files, stored, content)
        rows_table.finish()
        bad_table.finish()
    finally:
        rows_table.close()
        bad_table.close()
    if not any(plan.bad for plan in plans):
        (journal.out / "bad.parquet").unlink()
    return found
