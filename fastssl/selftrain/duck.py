"""DuckDB on a scoring log: queries for people, and a second, independent opinion on a selection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from fastssl.errors import DataError
from fastssl.selftrain.histogram import Histogram
from fastssl.selftrain.log import Log
from fastssl.selftrain.ranking import hash64
from fastssl.selftrain.rules import Rule, log_odds
from fastssl.sources.selection import Selection

RANKED = """
select cls, image_id, score, row_number() over (partition by cls order by score desc, tie asc, image_id asc) - 1 as rank
from candidates qualify rank < k order by cls, rank
"""


def connect() -> Any:
    """An in-memory DuckDB connection. Raises DataError where the package is missing."""
    try:
        import duckdb
    except ImportError:
        raise DataError("DuckDB is not installed; add it with pip install 'fastssl[select]'") from None
    return duckdb.connect()


def open_log(log: Log) -> Any:
    """A connection with the view ``log(image_id, cls, score, place)``: one row per image and class, place 1 = its best class. Reads the files as asked.

    ``open_log(log).sql("select cls, count(*), median(score) from log where place = 1 group by cls")``
    """
    connection = connect()
    files = [str(log.folder / "parts" / log.record(unit)["file"]).replace("'", "''") for unit in log.units]
    listed = ", ".join(f"'{file}'" for file in files)
    connection.execute(
        f"create view log as select image_id, unnest(cls::usmallint[]) as cls, unnest(score::float[]) as score, "
        f"unnest(range(1, {log.p + 1})) as place from read_parquet([{listed}])"
    )
    return connection


def candidates(log: Log, rule: Rule, excluded: np.ndarray | None = None) -> pa.Table:
    """The rows of a log that can be in a list of the rule, by score bin: cls, image_id, score, tie (the seeded hash), k. Little more than the lists."""
    p, k_C = rule.p or log.p, rule.rows_per_class(log.classes, log.num_rows)
    counted = Histogram(len(log.classes))
    taken = np.array([], np.uint64) if excluded is None else excluded.astype(np.uint64)

    def blocks() -> Any:
        for part in log.parts(check=False):
            left = ~np.isin(part.id_N, taken)
            yield part.cls_NP[left, :p], part.score_NP[left, :p], part.id_N[left]

    for cls, score, _ in blocks():
        counted.add(cls, score)
    bar_C = counted.bar(k_C)
    found = []
    for cls, score, ids in blocks():
        image, place = np.nonzero(score >= bar_C[cls])
        chosen = cls[image, place]
        found.append((chosen, ids[image], score[image, place], hash64(ids[image], rule.seed), k_C[chosen]))
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    return pa.table(dict(zip(("cls", "image_id", "score", "tie", "k"), columns, strict=True)))


def check_with_duckdb(log: Log, selection: Selection, rule: Rule, excluded: np.ndarray | None = None) -> str:
    """Let DuckDB rank the candidates and compare with the selection, row by row; a sentence if they agree, DataError if not."""
    if rule.over != "class":
        raise DataError("--check compares lists per class; it cannot check over=all")
    connection = connect()
    connection.register("candidates", candidates(log, rule, excluded))
    theirs = connection.sql(RANKED).to_arrow_table()
    ours = selection.columns("cls", "image_id", "score", "rank")
    score, rank = theirs.column("score").to_numpy(), theirs.column("rank").to_numpy()
    keep = (score >= np.float32(log_odds(rule.min_probability))) | (rank < rule.floor)
    for name in ours:
        column = theirs.column(name).to_numpy()[keep]
        if len(column) != len(ours[name]) or not np.array_equal(column, ours[name].astype(column.dtype)):
            raise DataError(f"DuckDB selects other rows than {selection.folder} holds (column {name}); please report this")
    return f"DuckDB selects the same {len(ours['cls'])} rows"
