"""From a scoring log to a selection on disk: a pure function of the log and the rule, whatever the number of workers that wrote the log."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastssl.errors import DataError, nearest
from fastssl.selftrain.files import told
from fastssl.selftrain.histogram import Histogram
from fastssl.selftrain.log import Log, Part
from fastssl.selftrain.rules import Rule, Selected, apply_rule
from fastssl.selftrain.topk import ROW_BYTES, Ranked, TopK
from fastssl.sources.sealed import seal
from fastssl.sources.selection import COLUMNS, FORMAT_VERSION, MANIFEST_NAME, Selection, load_selection

METHODS = ("auto", "table", "histogram")
TABLE_LIMIT = 1 << 30  # bytes of buffers above which "auto" counts first and buffers less
FILE_ROWS = 1 << 22  # of one file of a selection; a class is never split

Parts = Callable[[], Iterator[Part]]


@dataclass(frozen=True)
class Lists:
    """What ranking gave: the lists, the k of each class, and how many images of the pool could be ranked."""

    ranked: Ranked
    k_C: np.ndarray
    images: int


def rank(parts: Parts, classes: Sequence[str], pool: int, rule: Rule, *, method: str = "auto", excluded: np.ndarray | None = None) -> Lists:
    """The lists of a rule before its threshold: per class the best k of all images of ``parts()`` but ``excluded`` (ids).

    ``method`` "table": one pass with a buffer of twice the lists; "histogram": count first, then buffer little more than the lists; "auto" by size.  Both
    give the same bits.
    """
    if method not in METHODS:
        raise DataError(f"method {method!r} must be one of {', '.join(METHODS)}{nearest(method, METHODS)}")
    k_C = rule.rows_per_class(classes, pool)
    together = rule.over == "all"
    table_k = np.array([k_C.sum()]) if together else k_C
    if method == "auto":
        method = "histogram" if 2 * int(table_k.sum()) * ROW_BYTES > TABLE_LIMIT else "table"
    seen = _Reader(parts, rule.p, excluded, len(classes) if together else 0)
    bar = None
    if method == "histogram":
        counted = Histogram(len(table_k))
        for cls, score, _ in seen.blocks():
            counted.add(cls, score)
        bar = counted.bar(table_k)
    table = TopK(len(table_k), table_k, seed=rule.seed, slack=1.0 if bar is None else 0.25)
    for cls, score, ids in seen.blocks():
        if bar is None:
            table.add(cls, score, ids)
        else:
            at = np.flatnonzero(score >= bar[cls])
            table.add(cls.reshape(-1)[at], score.reshape(-1)[at], ids[at // cls.shape[1]])
    ranked = table.ranked()
    return Lists(_apart(ranked, len(classes)) if together else ranked, k_C, seen.images)


class _Reader:
    """Blocks (cls [N, p], score [N, p], id) of a log: the first p classes of each image that is not excluded.

    ``joint`` > 0: all classes make one list, of which (image, class) pairs are the members: id = image * joint + class, [N * p, 1].
    """

    def __init__(self, parts: Parts, p: int, excluded: np.ndarray | None, joint: int):
        self.parts, self.p, self.joint, self.images = parts, p, joint, 0
        self.excluded = None if excluded is None else np.unique(excluded.astype(np.uint64))

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        self.images = 0
        for part in self.parts():
            width = self.p or part.cls_NP.shape[1]
            if width > part.cls_NP.shape[1]:
                raise DataError(f"select.p = {width}, but the log has {part.cls_NP.shape[1]} classes per image; score again with a larger p")
            cls, score, ids = part.cls_NP[:, :width], part.score_NP[:, :width], part.id_N
            if self.excluded is not None:
                left = ~np.isin(ids, self.excluded)
                cls, score, ids = cls[left], score[left], ids[left]
            self.images += len(ids)
            if self.joint:
                pairs = (ids[:, None] * np.uint64(self.joint) + cls.astype(np.uint64)).reshape(-1)
                yield np.zeros((len(pairs), 1), np.uint16), score.reshape(-1, 1), pairs
            else:
                yield cls, score, ids


def _apart(ranked: Ranked, classes: int) -> Ranked:
    """The one list over all classes as a list per class, each in the same order."""
    cls = (ranked.id_N % np.uint64(classes)).astype(np.int32)
    order = np.argsort(cls, kind="stable")
    counts = np.bincount(cls, minlength=classes)
    place = np.arange(len(cls)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Ranked(cls[order], place.astype(np.int32), ranked.score_N[order], (ranked.id_N // np.uint64(classes))[order])


def select(log: Log, rule: Rule, out: str | Path, *, method: str = "auto", excluded: np.ndarray | None = None, check: bool = True) -> Selection:
    """Select from a complete log and write the selection folder ``out``, which appears whole or not at all.

    ``excluded``: rows of the pool that may not be selected (duplicates, evaluation images).  ``check``: compare every unit with its digest.
    A folder that holds this very selection already is left as it is; one that holds another selection is an error.
    """
    out = Path(out)
    request = {"rule": rule.as_dict(), "log_digest": log.content_digest() if not log.missing() else "", "excluded": _digest(excluded)}
    if (out / MANIFEST_NAME).exists():
        found = load_selection(out)
        if found.info["request"] != request:
            raise DataError(f"{out} holds another selection (rule {found.info['request']['rule']}, or another log); choose another folder")
        return found
    lists = rank(lambda: log.parts(check=check), log.classes, log.num_rows, rule, method=method, excluded=excluded)
    chosen = apply_rule(rule, lists.ranked, lists.k_C)
    info = {
        "format_version": FORMAT_VERSION,
        "request": request,
        "classes": list(log.classes),
        "p": rule.p or log.p,
        "k_per_class": _one_or_all(lists.k_C),
        "pool": {**log.made_with["pool"], "dataset_digest": log.identity["pool"]["dataset_digest"], "rows": log.num_rows, "ranked": lists.images},
        "teacher": log.identity["teacher"],
        "log_identity": log.digest,
        "bad_images": len(log.bad()),
        "excluded": 0 if excluded is None else len(np.unique(excluded)),
    }
    write_selection(out, info, chosen, lists.k_C)
    return load_selection(out)


def write_selection(out: Path, info: dict[str, Any], chosen: Selected, k_C: np.ndarray) -> None:
    """Write a selection folder: files by class, then selection.json with ``info`` and the counts; built beside ``out`` and renamed."""
    with told(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        try:
            temporary.chmod(0o755)
            files = _write_files(temporary, chosen, len(k_C))
            content = {**info, **counts_of(chosen, k_C, info["classes"]), "rows_digest": chosen.ranked.digest(), "files": files}
            (temporary / MANIFEST_NAME).write_bytes(seal(content))
            if out.exists():  # an empty folder, or os.rename says that it is not
                out.rmdir()
            os.rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def counts_of(chosen: Selected, k_C: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Rows, images, training examples (rows with their copies), rows per class, and the classes whose list is short or empty."""
    counts = chosen.ranked.counts(len(k_C))
    return {
        "rows": len(chosen.ranked),
        "images": len(np.unique(chosen.ranked.id_N)),
        "examples": int(chosen.copies_N.sum()),
        "per_class": counts.tolist(),
        "short_classes": {classes[c]: int(counts[c]) for c in np.flatnonzero(counts < k_C).tolist()},
    }


def _write_files(folder: Path, chosen: Selected, classes: int) -> list[dict[str, Any]]:
    rows = chosen.ranked
    _, place, lists = np.unique(rows.id_N, return_inverse=True, return_counts=True)
    values = (rows.id_N, rows.cls_N, rows.score_N, rows.rank_N, lists[place], chosen.copies_N)
    columns = {name: np.asarray(column).astype(kind) for (name, kind), column in zip(COLUMNS.items(), values, strict=True)}
    ends = np.cumsum(rows.counts(classes)).tolist()
    files: list[dict[str, Any]] = []
    start = first = 0
    for c, end in enumerate(ends):
        full = c + 1 == classes or ends[c + 1] - start > FILE_ROWS
        if not full:
            continue
        if end > start:
            name = f"part-{len(files):05d}.parquet"
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table({key: column[start:end] for key, column in columns.items()}), sink, compression="zstd")
            content = sink.getvalue().to_pybytes()
            (folder / name).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            files.append({"name": name, "bytes": len(content), "sha256": digest, "rows": end - start, "first_class": first, "last_class": c})
        start, first = end, c + 1
    return files


def read_excluded(path: str | Path) -> np.ndarray:
    """uint64 rows of a text file with one row number per line, or of a .npy file. Raises DataError for anything else."""
    path = Path(path)
    try:
        rows = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.array([int(line) for line in path.read_text().split()], dtype=np.int64)
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or (rows.size and rows.min() < 0):
            raise ValueError("not a list of row numbers")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as row numbers ({error}); write one row of the pool per line, or save them as .npy") from None
    return rows.astype(np.uint64)


def _digest(excluded: np.ndarray | None) -> str:
    return "" if excluded is None else hashlib.sha256(np.unique(excluded).astype("<u8").tobytes()).hexdigest()


def _one_or_all(k_C: np.ndarray) -> int | list[int]:
    return int(k_C[0]) if (k_C == k_C[0]).all() else k_C.tolist()
