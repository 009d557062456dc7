"""The scoring log: for every image of a pool its P best classes with scores, one Parquet file per unit of work, complete or absent.

    header.json             what was scored by whom: pool, rows, units, teacher, transform, P; written once, never changed
    rows.npy                the pool's rows in scoring order, unless they are all rows of the split
    claims/UNIT.claim       who is at work on it now
    units/UNIT.json         the unit is committed: its Parquet file with digest, its rows, its bad images
    parts/UNIT-DIGEST.parquet   image_id uint64, cls fixed_list<uint16>[P], score fixed_list<float32>[P], best first; the header's identity in its metadata

A unit is committed once: the first record wins, whoever else has scored it too.  The log holds finite scores only.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastssl.errors import DataError, FastSSLError
from fastssl.selftrain.files import replace_file, told, write_new
from fastssl.sources.sealed import canonical, digest_of, read_sealed, seal

FORMAT_VERSION = 1
IDENTITY = b"fastssl.identity"
ROW_GROUP = 100_000
MAX_CLASSES = 1 << 16


@dataclass(frozen=True)
class Unit:
    """Rows ``first`` .. ``first + count`` - 1 of the log's row list."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Part:
    """A unit's scores: ``id_N`` uint64, ``cls_NP`` uint16 and ``score_NP`` float32, each image's classes best first."""

    id_N: np.ndarray
    cls_NP: np.ndarray
    score_NP: np.ndarray


class Log:
    """A scoring log on disk. ``identity``: the part of the header that every worker must agree on."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        file = self.folder / "header.json"
        if not file.is_file():
            raise DataError(f"{self.folder} is no scoring log: it has no header.json; make one with `fastssl select score`")
        header = read_sealed(file, "the log is damaged: score again into a new folder")
        self.identity: dict[str, Any] = header["identity"]
        if self.identity.get("format_version") != FORMAT_VERSION:
            raise DataError(f"{file} has format version {self.identity.get('format_version')}, this fastssl reads version {FORMAT_VERSION}; score again")
        self.made_with: dict[str, Any] = header["made_with"]
        self.digest = digest_of(self.identity)
        self.p: int = self.identity["p"]
        self.classes: tuple[str, ...] = tuple(self.identity["classes"])
        self.num_rows: int = self.identity["rows"]["count"]

    @classmethod
    def create(cls, folder: str | Path, identity: dict[str, Any], made_with: dict[str, Any], rows_N: np.ndarray | None) -> Log:
        """The log in ``folder``, made now or by another worker of the same work before.

        ``rows_N``: int64 rows of the pool in scoring order, None = all.  Raises DataError if the folder holds a log of other work, naming what differs.
        """
        folder = Path(folder)
        identity = {"format_version": FORMAT_VERSION, **identity}
        if identity["p"] < 1 or identity["p"] > len(identity["classes"]):
            raise DataError(f"p = {identity['p']} classes per image: it must be in 1..{len(identity['classes'])}, the number of classes")
        if not 2 <= len(identity["classes"]) <= MAX_CLASSES:
            raise DataError(f"{len(identity['classes'])} classes cannot be ranked; 2..{MAX_CLASSES} can")
        with told(folder):
            for name in ("units", "parts", "claims"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            if rows_N is not None and not (folder / "rows.npy").exists():
                buffer = io.BytesIO()
                np.save(buffer, np.asarray(rows_N, dtype=np.int64))
                replace_file(folder / "rows.npy", buffer.getvalue())
        write_new(folder / "header.json", seal({"identity": identity, "made_with": made_with}))
        log = cls(folder)
        if log.identity != identity:
            apart = [name for name in identity if log.identity.get(name) != identity[name]]
            raise DataError(
                f"{folder} holds scores of other work: {', '.join(f'{name} differs' for name in apart)} "
                f"(recorded {_short(log.identity.get(apart[0]))}, now {_short(identity[apart[0]])}); go on with the same teacher and pool, or use a new folder"
            )
        return log

    @property
    def units(self) -> list[Unit]:
        """All units in order."""
        size, n = self.identity["unit_rows"], self.num_rows
        width = max(5, len(str(max(0, n - 1) // size)))
        return [Unit(f"{number:0{width}d}", first, min(size, n - first)) for number, first in enumerate(range(0, n, size))]

    def rows(self, unit: Unit) -> np.ndarray:
        """int64 rows of the pool's split that the unit holds."""
        if self.identity["rows"]["kind"] == "all":
            return np.arange(unit.first, unit.first + unit.count, dtype=np.int64)
        rows = np.load(self.folder / "rows.npy", mmap_mode="r")
        return np.array(rows[unit.first : unit.first + unit.count])

    def check_rows(self) -> None:
        """DataError if rows.npy is not the list that the header names."""
        recorded = self.identity["rows"].get("digest")
        if recorded is not None and rows_digest(np.load(self.folder / "rows.npy")) != recorded:
            raise DataError(f"{self.folder / 'rows.npy'} is not the row list of its header; score again into a new folder")

    # --- writing ----------------------------------------------------------------------------------------------------------------

    def is_committed(self, unit: Unit) -> bool:
        return self._record(unit).exists()

    def commit(self, unit: Unit, part: Part, bad: Sequence[tuple[int, str]]) -> bool:
        """Write a unit's scores, and commit it unless that was done by another meanwhile; whether it was this call's. ``bad``: (row, reason) not scored.

        Raises DataError for scores that cannot be ranked, rows that are not the unit's, and a disk that refuses; then nothing is committed.
        """
        self._check(unit, part, bad)
        content = self._parquet(part)
        digest = hashlib.sha256(content).hexdigest()
        file = self.folder / "parts" / f"{unit.name}-{digest[:16]}.parquet"
        replace_file(file, content)
        record = {"unit": unit.name, "rows": len(part.id_N), "bad": [[int(row), reason] for row, reason in bad], "file": file.name, "bytes": len(content)}
        mine = write_new(self._record(unit), seal({**record, "digest": digest, "identity": self.digest}))
        if not mine and self.record(unit)["file"] != file.name:
            file.unlink(missing_ok=True)
        return mine

    def _check(self, unit: Unit, part: Part, bad: Sequence[tuple[int, str]]) -> None:
        shape = (len(part.id_N), self.p)
        if part.cls_NP.shape != shape or part.score_NP.shape != shape:
            raise DataError(f"unit {unit.name}: classes {part.cls_NP.shape} and scores {part.score_NP.shape} do not fit {shape[0]} images with p = {self.p}")
        if not np.isfinite(part.score_NP).all():
            raise DataError(f"unit {unit.name}: {int((~np.isfinite(part.score_NP)).any(axis=1).sum())} images have scores that are not finite")
        every = np.concatenate([part.id_N.astype(np.int64), np.array([row for row, _ in bad], dtype=np.int64)])
        if not np.array_equal(np.sort(every), np.sort(self.rows(unit))):
            raise DataError(f"unit {unit.name}: its {len(every)} scored and bad rows are not the unit's {unit.count} rows")

    def _parquet(self, part: Part) -> bytes:
        def lists(values: np.ndarray, kind: Any) -> pa.Array:
            return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1), kind), self.p)

        columns = {
            "image_id": pa.array(part.id_N.astype(np.uint64)),
            "cls": lists(part.cls_NP.astype(np.uint16), pa.uint16()),
            "score": lists(part.score_NP.astype(np.float32), pa.float32()),
        }
        table = pa.table(columns).replace_schema_metadata({IDENTITY: canonical(self.identity), b"fastssl.made_with": canonical(self.made_with)})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP)
        return sink.getvalue().to_pybytes()

    # --- reading ----------------------------------------------------------------------------------------------------------------

    def _record(self, unit: Unit) -> Path:
        return self.folder / "units" / f"{unit.name}.json"

    def record(self, unit: Unit) -> dict[str, Any]:
        """A committed unit's record."""
        return read_sealed(self._record(unit), f"`fastssl select score --mend` throws damaged units of {self.folder} away, then score again")

    def missing(self) -> list[Unit]:
        """Units that nobody has committed."""
        there = {path.stem for path in (self.folder / "units").glob("*.json")}
        return [unit for unit in self.units if unit.name not in there]

    def read(self, unit: Unit, *, check: bool = True) -> Part:
        """A committed unit's scores. ``check``: compare the file with its recorded digest. DataError for a file that is not what was written."""
        record = self.record(unit)
        path = self.folder / "parts" / record["file"]
        try:
            content = path.read_bytes()
            if check and hashlib.sha256(content).hexdigest() != record["digest"]:
                raise ValueError("its digest differs")
            table = pq.read_table(pa.BufferReader(content), columns=["image_id", "cls", "score"])
            if json.loads((table.schema.metadata or {}).get(IDENTITY, b"null")) != self.identity or record["identity"] != self.digest:
                raise ValueError("it belongs to another log")
            columns = {name: table.column(name).combine_chunks() for name in table.column_names}
            lists = {name: columns[name].flatten().to_numpy(zero_copy_only=False).reshape(-1, self.p) for name in ("cls", "score")}
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(
                f"unit {unit.name} of {self.folder} is damaged ({path.name}: {error}); `fastssl select score --mend` throws such units away, then score again"
            ) from None
        return Part(columns["image_id"].to_numpy(), lists["cls"], lists["score"])

    def parts(self, *, check: bool = True) -> Iterator[Part]:
        """Every unit's scores in order. DataError if units are missing or damaged."""
        missing = self.missing()
        if missing:
            raise DataError(
                f"{self.folder} is not complete: {len(missing)} of {len(self.units)} units are not scored yet (first: {missing[0].name}); "
                "start `fastssl select score` again with the same arguments"
            )
        for unit in self.units:
            yield self.read(unit, check=check)

    def bad(self) -> list[tuple[int, str]]:
        """(row, reason) of all images that could not be scored, in order of units."""
        return [(row, reason) for unit in self.units for row, reason in self.record(unit)["bad"]]

    def content_digest(self) -> str:
        """sha256 (hex) of the identity and of every unit's digest."""
        return digest_of([self.digest, [self.record(unit)["digest"] for unit in self.units]])

    def mend(self) -> list[str]:
        """Throw away what is damaged, so that it is scored again; the names of those units."""
        thrown = []
        for unit in self.units:
            if self.is_committed(unit):
                try:
                    self.read(unit)
                except FastSSLError:
                    with told(self.folder):
                        self._record(unit).unlink(missing_ok=True)
                    thrown.append(unit.name)
        return thrown


def rows_digest(rows_N: np.ndarray) -> str:
    """sha256 (hex) of a row list."""
    return hashlib.sha256(np.ascontiguousarray(rows_N, dtype="<i8").tobytes()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
