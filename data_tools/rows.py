"""rows.parquet and bad.parquet, labels, sizes and digests: the row-wise records of a dataset, written as a stream."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.outputs import npy_header, open_output
from data_tools.plan import SplitPlan
from data_tools.units import Unit

ROWS = pa.schema(
    [
        ("row", pa.int64()),
        ("split", pa.string()),
        ("key", pa.string()),
        ("label", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("source_height", pa.int32()),
        ("source_width", pa.int32()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("source_sha256", pa.string()),
    ]
)
BAD = pa.schema([("split", pa.string()), ("row", pa.int64()), ("key", pa.string()), ("label", pa.int64()), ("reason", pa.string())])
_GROUP = 65536  # rows per row group, whatever the units were


class RowTable:
    """rows.parquet, appended unit by unit in groups of 65 536 rows."""

    def __init__(self, file: Path, schema: pa.Schema):
        self._schema, self._rows = schema, 0
        self._waiting: list[pa.Table] = []
        self._sink = open_output(file)
        self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd")

    def append(self, columns: dict[str, Any]) -> None:
        table = pa.table(columns, schema=self._schema)
        self._waiting.append(table)
        self._rows += table.num_rows
        if self._rows >= _GROUP:
            self._write(_GROUP)

    def _write(self, group: int) -> None:
        table = pa.concat_tables(self._waiting)
        whole = table.num_rows // group * group if self._rows >= group else table.num_rows
        if whole:
            self._writer.write_table(table.slice(0, whole), row_group_size=_GROUP)
        rest = table.slice(whole)
        self._waiting, self._rows = ([rest] if rest.num_rows else []), rest.num_rows

    def finish(self) -> None:
        while self._waiting:
            self._write(_GROUP)
        self._writer.close()
        self._sink.close()

    def close(self) -> None:
        """Give up: release the file handle."""
        self._sink.close()


class SplitRecords:
    """Everything row-wise of one split beside its pixels: labels, extents and sizes where needed, its lines in the tables, its digests."""

    def __init__(self, folder: Path, plan: SplitPlan, *, extents: bool):
        self.labels = f"{plan.name}.labels.npy"
        self.files: dict[str, str] = {}
        self._plan, self._row = plan, 0
        self._stored, self._content = hashlib.sha256(), hashlib.sha256()
        self._outputs: list[tuple[BinaryIO, tuple[str, ...]]] = []
        try:
            self._open(folder / self.labels, np.dtype("<i8"), (plan.count,), ("label",))
            if extents and plan.varied:
                self.files["extents"] = f"{plan.name}.extents.npy"
                self._open(folder / self.files["extents"], np.dtype("<i4"), (plan.count, 2), ("height", "width"))
            if plan.reduced:
                self.files["sizes"] = f"{plan.name}.sizes.npy"
                self._open(folder / self.files["sizes"], np.dtype("<i4"), (plan.count, 2), ("own_height", "own_width"))
        except OSError:
            self.close()
            raise

    def _open(self, file: Path, dtype: np.dtype, shape: tuple[int, ...], columns: tuple[str, ...]) -> None:
        handle = open_output(file)
        self._outputs.append((handle, columns))
        handle.write(npy_header(dtype, shape))

    def append(self, unit: Unit, rows_table: RowTable, bad_table: RowTable) -> None:
        rows, name, count = unit.rows, self._plan.name, len(unit.rows)
        for handle, columns in self._outputs:
            handle.write(np.stack([rows[column] for column in columns], axis=1).tobytes())
        update_digests(self._stored, self._content, rows["label"], rows["sha256"], rows["source_sha256"])
        rows_table.append(
            {
                "row": self._row + np.arange(count),
                "split": pa.array([name] * count, pa.string()),
                "key": _readable(unit.keys),
                "label": rows["label"],
                "height": rows["height"],
                "width": rows["width"],
                "source_height": rows["own_height"],
                "source_width": rows["own_width"],
                "bytes": rows["bytes"],
                "sha256": [value.hex() for value in rows["sha256"].tolist()],
                "source_sha256": [value.hex() for value in rows["source_sha256"].tolist()],
            }
        )
        if len(unit.bad_rows):
            bad = {"split": [name] * len(unit.bad_rows), "row": unit.bad_rows, "key": _readable(unit.bad_keys), "label": unit.bad_labels}
            bad_table.append({**bad, "reason": _readable(unit.bad_reasons)})
        self._row += count

    def finish(self) -> tuple[str, str]:
        """(stored digest, rows digest), both hex; see ``update_digests``."""
        self.close()
        return self._stored.hexdigest(), self._content.hexdigest()

    def close(self) -> None:
        for handle, _ in self._outputs:
            handle.close()


def update_digests(stored: Any, content: Any, labels: np.ndarray, sha_N: np.ndarray, source_sha_N: np.ndarray) -> None:
    """Add rows to a split's two digests: ``stored`` over the hashes of the stored bytes, ``content`` over (int64 label, hash of what the source gave).

    The second is the manifest's ``rows_digest``: equal for the same source images in the same order, whatever the storage format, mode and ``max_side``.
    """
    stored.update(np.ascontiguousarray(sha_N).tobytes())
    pairs = np.zeros(len(labels), np.dtype([("label", "<i8"), ("sha256", "V32")]))
    pairs["label"], pairs["sha256"] = labels, source_sha_N
    content.update(pairs.tobytes())


def _readable(keys: Any) -> list[str]:
    """File names that are no UTF-8 with their odd bytes as \\xNN: Parquet holds text."""
    return [keys[i].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for i in range(len(keys))]
