"""Running units on several workers with a bounded number under way; results come as they are done."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from fastssl.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")
KINDS = ("auto", "threads", "processes")


def run_all(work: Callable[[Job], Result], jobs: Iterable[Job], workers: int, kind: str = "threads") -> Iterator[Result]:
    """``work`` on each job; ``jobs`` is drawn from only as workers become free.  The first error cancels what has not begun and is raised.

    One worker works in the calling thread.  ``processes`` start afresh (no fork of a process that has threads); ``work`` and the jobs must then come from
    modules that can be imported, not from the main program.
    """
    if workers == 1:
        yield from map(work, jobs)
        return
    executor: Executor
    if kind == "processes":
        executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    else:
        executor = ThreadPoolExecutor(workers, thread_name_prefix="fastssl-convert")
    waiting: set[Future] = set()
    try:
        for job in jobs:
            with _without_main() if kind == "processes" else contextlib.nullcontext():  # submitting starts processes as they are needed
                waiting.add(executor.submit(work, job))
            if len(waiting) >= 2 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended without a word (killed for want of memory?); run the same command again to continue, with fewer --workers or --pool threads"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker process: end when the process that started it is gone.  A killed one cannot say so, and its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="fastssl-convert-parent", daemon=True).start()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """While worker processes are started: keep them from importing the main program again.

    They need only the modules of this package, and the main program may import much, or be a script that would begin its work once more.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
