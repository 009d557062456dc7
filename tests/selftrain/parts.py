"""A pool without images and a teacher without a network: scores are numbers drawn from the row, so that tests of workers take milliseconds."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.selftrain.log import Log, Part

CLASSES = 5


def scores_of(rows_N: np.ndarray, p: int, classes: int = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    """(cls [N, p], score [N, p]), best first, a pure function of each row; many rows tie."""
    table = np.array([np.random.default_rng(int(row)).integers(-3, 4, classes) for row in rows_N], np.float32).reshape(len(rows_N), classes)
    cls = np.argsort(-table, axis=1, kind="stable")[:, :p]
    return cls.astype(np.uint16), np.take_along_axis(table, cls, axis=1)


class Stub:
    """Stands for Scorer. ``die_at``: raises Killed in the middle of that row's unit; ``pause_s`` per unit."""

    def __init__(self, die_at: int = -1, pause_s: float = 0.0):
        self.die_at, self.pause_s = die_at, pause_s
        self.units: list[int] = []

    def score(self, source: Any, rows_N: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray]:
        self.units.append(int(rows_N[0]))
        time.sleep(self.pause_s)
        if self.die_at in rows_N:
            raise Killed
        return scores_of(rows_N, p)


class Killed(BaseException):
    """The process ended here."""


class NoSource:
    bad_row_ids: set[int] = set()

    def close(self) -> None:
        pass


def identity(rows: int = 47, unit_rows: int = 5, p: int = 3, teacher: str = "a") -> dict[str, Any]:
    return {
        "teacher": {"weights_sha256": teacher},
        "classes": [f"class{c}" for c in range(CLASSES)],
        "pool": {"dataset_digest": "d"},
        "rows": {"kind": "all", "count": rows, "digest": None},
        "unit_rows": unit_rows,
        "p": p,
    }


def make_log(folder: Path, **values: Any) -> Log:
    return Log.create(folder, identity(**values), {"pool": {"path": "pool", "split": "train", "rows": "all", "label_split": ""}}, None)


def fill(log: Log, bad: dict[int, str] | None = None) -> Log:
    """Commit every unit that is missing."""
    for unit in log.missing():
        rows = log.rows(unit)
        keep = ~np.isin(rows, list(bad or {}))
        cls, score = scores_of(rows, log.p)
        log.commit(unit, Part(rows[keep].astype(np.uint64), cls[keep], score[keep]), [(int(r), (bad or {})[int(r)]) for r in rows[~keep]])
    return log


def in_threads(work: Any, workers: int) -> None:
    """``work(number)`` in as many threads at once; raises the first error that is no Killed."""
    errors: list[BaseException] = []

    def call(number: int) -> None:
        try:
            work(number)
        except Killed:
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a worker hangs"
    if errors:
        raise errors[0]
