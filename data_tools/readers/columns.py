"""Images in a column of Arrow or Parquet files, read chunk by chunk (record batches, row groups) with pyarrow alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.collection import UNKNOWN, BadImage, SourceChanged, digest_of, file_state, labels_digest
from fastssl.errors import DataError, nearest

_IMAGES, _LABELS = ("image", "img", "images", "jpg", "png", "bytes"), ("label", "labels", "fine_label", "class", "target", "cls")
_LARGEST_GROUP = 2 << 30  # bytes of one row group, which is read as a whole
_last = threading.local()


@dataclass(frozen=True)
class ColumnSplit:
    """Rows of ``column`` in ``files``: chunk i has the rows up to ``ends[i]`` (exclusive) and is number ``chunk_N[i]`` of file ``file_N[i]``.

    The first row of the split is row ``first`` of its chunks.  Keys are ``prefix/number`` with numbers from ``number``.
    """

    files: tuple[str, ...]
    column: str
    file_N: np.ndarray
    chunk_N: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    prefix: str
    first: int = 0
    number: int = 0
    state: str = ""

    @property
    def count(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        return f"{self.prefix}/{self.number + row}"

    def read(self, row: int) -> bytes:
        place = self.first + row
        chunk = int(np.searchsorted(self.ends, place, "right"))
        values = _chunk(self.files[int(self.file_N[chunk])], int(self.chunk_N[chunk]), self.column)
        return _image(values[place - (int(self.ends[chunk - 1]) if chunk else 0)].as_py())

    def part(self, start: int, stop: int) -> ColumnSplit:
        low, high = (int(np.searchsorted(self.ends, self.first + row, "right")) for row in (start, stop - 1))
        before = int(self.ends[low - 1]) if low else 0
        used, file_N = np.unique(self.file_N[low : high + 1], return_inverse=True)
        chunks = (self.chunk_N[low : high + 1].copy(), self.ends[low : high + 1] - before, self.labels[start:stop].copy())
        return ColumnSplit(tuple(self.files[int(i)] for i in used), self.column, file_N, *chunks, self.prefix, self.first + start - before, self.number + start)

    def stamp(self) -> str:
        return digest_of(self.prefix, self.column, labels_digest(self.ends), labels_digest(self.labels), self.state)


def _image(value: Any) -> bytes:
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            raise BadImage("only a path in the table, no image bytes")
        value = value.get("bytes")
    if value is None:
        raise BadImage("no image in the table (null)")
    return bytes(value)


def _chunk(file: str, number: int, column: str) -> Any:
    """The image column of one chunk; a thread keeps its last one, as rows are read one after the other."""
    key = (file, number, column)
    if getattr(_last, "key", None) != key:
        try:
            _last.value = pq.ParquetFile(file).read_row_group(number, columns=[column]).column(column) if _is_parquet(file) else _batches(file)[number][column]
        except (OSError, pa.ArrowException, KeyError, IndexError) as error:
            raise SourceChanged(f"{file!r} cannot be read any more ({error}); bring it back and run the same command") from error
        _last.key = key
    return _last.value


def _is_parquet(file: str | Path) -> bool:
    return str(file).endswith((".parquet", ".pq"))


@lru_cache(maxsize=64)
def _batches(file: str) -> tuple[pa.RecordBatch, ...]:
    """The record batches of an Arrow file or stream, mapped and not copied."""
    try:
        with pa.ipc.open_stream(pa.memory_map(file)) as reader:
            return tuple(reader)
    except pa.ArrowInvalid:
        with pa.ipc.open_file(pa.memory_map(file)) as reader:
            return tuple(reader.get_batch(i) for i in range(reader.num_record_batches))


class Table:
    """The files of one split: their schema, chunks, and whole label columns."""

    def __init__(self, files: Sequence[Path]):
        self.files = [str(file) for file in files]
        self.schema: pa.Schema = pa.schema([])
        self.chunks: list[tuple[int, int, int]] = []  # file, number in it, rows
        for number, file in enumerate(self.files):
            with _read(file):
                if _is_parquet(file):
                    self._add_parquet(number, file)
                else:
                    batches = _batches(file)
                    self._check(file, batches[0].schema if batches else self.schema)
                    self.chunks += [(number, i, batch.num_rows) for i, batch in enumerate(batches)]

    def _add_parquet(self, number: int, file: str) -> None:
        with pq.ParquetFile(file) as opened:
            self._check(file, opened.schema_arrow)
            for group in range(opened.num_row_groups):
                facts = opened.metadata.row_group(group)
                if facts.total_byte_size > _LARGEST_GROUP:
                    size = f"{facts.total_byte_size / 1e9:.1f} GB"
                    raise DataError(f"{file!r} has a row group of {size}, which is read as a whole; write it again with fewer rows per row group")
                self.chunks.append((number, group, facts.num_rows))

    def _check(self, file: str, schema: pa.Schema) -> None:
        if not len(self.schema):
            self.schema = schema
        elif schema.names != self.schema.names:
            raise DataError(f"{file!r} has the columns {schema.names}, the first file has {self.schema.names}; convert them one by one")

    def features(self) -> dict[str, Any]:
        """What Hugging Face datasets notes of the columns in the schema, or nothing."""
        try:
            return json.loads((self.schema.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, ValueError, TypeError):
            return {}

    def column(self, name: str) -> Iterator[pa.Array]:
        """One column, chunk by chunk."""
        for number, chunk, _ in self.chunks:
            file = self.files[number]
            with _read(file):
                if _is_parquet(file):
                    yield pq.ParquetFile(file).read_row_group(chunk, columns=[name]).column(name).combine_chunks()
                else:
                    yield _batches(file)[chunk][name]

    def split(self, prefix: str, image: str, labels: np.ndarray) -> ColumnSplit:
        file_N, chunk_N, rows = (np.array(column, np.int64) for column in zip(*self.chunks, strict=True)) if self.chunks else (np.zeros(0, np.int64),) * 3
        state = "\n".join(map(file_state, self.files))
        return ColumnSplit(tuple(self.files), image, file_N, chunk_N, np.cumsum(rows), labels, prefix, state=state)


class _read:
    """``with _read(file)``: errors of pyarrow become one DataError."""

    def __init__(self, file: str):
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | pa.ArrowException):
            raise DataError(f"{self.file!r} is missing, truncated or damaged ({str(error)[:120]}); fetch it again") from error


def image_column(table: Table, features: Mapping[str, Any], options: Mapping[str, str], where: str) -> str:
    """The column of the images: option ``image``, else the one noted or named as such, else the only one of bytes."""
    names = table.schema.names
    if "image" in options:
        if options["image"] not in names:
            raise DataError(f"{where} has no column {options['image']!r}{nearest(options['image'], names)}; it has {', '.join(names)}")
        return options["image"]
    noted = [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "Image" and name in names]
    fit = noted or [field.name for field in table.schema if _holds_bytes(field.type)]
    fit = [name for name in _IMAGES if name in fit] or fit
    if len(fit) != 1 and not (fit and fit[0] in _IMAGES):
        raise DataError(f"{where}: which column holds the images? It has {', '.join(map(str, table.schema))}; say --option image=COLUMN")
    return fit[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def label_column(table: Table, features: Mapping[str, Any], options: Mapping[str, str], where: str) -> str | None:
    """The column of the labels: option ``label``, else the one noted or named as such; None for ``label=none``."""
    names = table.schema.names
    if options.get("label") == "none":
        return None
    if "label" in options:
        if options["label"] not in names:
            raise DataError(f"{where} has no column {options['label']!r}{nearest(options['label'], names)}; it has {', '.join(names)}")
        return options["label"]
    noted = [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and name in names]
    fit = [name for name in _LABELS if name in (noted or names)] or noted
    if not fit:
        raise DataError(f"{where}: which column holds the labels? It has {', '.join(names)}; say --option label=COLUMN (label=none: images without labels)")
    return fit[0]


class Labels:
    """Label values of several splits as int64: whole numbers as they are, strings numbered in alphabetical order at the end (or by ``names``)."""

    def __init__(self, names: Sequence[str] = ()):
        self._given = bool(names)
        self.code = {name: i for i, name in enumerate(names)}
        self._numbers = self._strings = False

    def read(self, table: Table, column: str | None, where: str) -> np.ndarray:
        if column is None:
            return np.full(sum(rows for _, _, rows in table.chunks), UNKNOWN, np.int64)
        return np.concatenate([self._values(values, where) for values in table.column(column)] or [np.zeros(0, np.int64)])

    def _values(self, values: pa.Array, where: str) -> np.ndarray:
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
            self._numbers = True
            found = values.cast(pa.int64()).fill_null(UNKNOWN).to_numpy(zero_copy_only=False)
            return np.where(found < 0, UNKNOWN, found)
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{where}: the label column is {values.type}, not whole numbers or strings; choose another with --option label=COLUMN")
        self._strings = True
        coded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
        table = [self._number(name, where) for name in coded.dictionary.to_pylist()]
        indices = coded.indices.fill_null(len(table)).to_numpy(zero_copy_only=False)
        return np.array([*table, UNKNOWN], np.int64)[indices]

    def _number(self, name: str, where: str) -> int:
        if self._given and name not in self.code:
            raise DataError(f"{where} has the class {name!r}, which the class map lacks{nearest(name, self.code)}: wrong class map")
        return self.code.setdefault(name, len(self.code))

    def finish(self, labels: Sequence[np.ndarray]) -> tuple[tuple[str, ...], list[np.ndarray]]:
        """(class names, labels in their order)."""
        if self._given or not self._strings:
            highest = max((int(part.max()) for part in labels if len(part)), default=-1)
            return tuple(self.code) if self._given else tuple(str(i) for i in range(highest + 1)), list(labels)
        if self._numbers:
            raise DataError("some label columns hold numbers and some hold names; give the names in label order with --option classes=FILE")
        order = np.argsort(np.argsort(np.array(list(self.code))))
        return tuple(sorted(self.code)), [np.where(part >= 0, order[part], UNKNOWN) for part in labels]
