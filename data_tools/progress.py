"""Progress of long loops: a rich bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def say(text: str) -> None:
    """One plain line of news on standard error (standard output is for results)."""
    print(text, file=sys.stderr, flush=True)


def track(items: Iterable[T], total: int, what: str, *, every_s: float = 10.0) -> Iterator[T]:
    """Yield ``items`` while showing how many of ``total`` are done."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(items, description=what, total=total, console=Console(stderr=True))
        return
    start = told = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - told >= every_s:
            told = now
            say(f"{what}: {done}/{total} ({done / (now - start):.0f}/s)")
    say(f"{what}: {done}/{total} in {time.monotonic() - start:.1f} s")
