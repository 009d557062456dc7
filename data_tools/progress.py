"""Progress of long loops: a rich bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
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


class Meter:
    """Progress of a job counted in images and bytes: images/s, MB/s and the time left; one changing line on a terminal, a line every 10 s in a log."""

    def __init__(self, what: str, total: int, *, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic):
        self._what, self._total, self._clock = what, total, clock
        self._live = sys.stderr.isatty()
        self._every = 0.2 if self._live else every_s
        self._images = self._bytes = self._before = 0
        self._start = self._told = clock()

    def skip(self, images: int) -> None:
        """Count images that were done in an earlier run: they are no part of the speed."""
        self._images += images
        self._before += images

    def add(self, images: int, size: int) -> None:
        """Count ``images`` more with ``size`` stored bytes."""
        self._images += images
        self._bytes += size
        now = self._clock()
        if now - self._told >= self._every:
            self._told = now
            self._tell(self.line())

    def line(self) -> str:
        """The state in words."""
        seconds = max(self._clock() - self._start, 1e-9)
        rate = (self._images - self._before) / seconds
        left = f", {duration((self._total - self._images) / rate)} left" if rate > 0 and self._images < self._total else ""
        return f"{self._what}: {self._images}/{self._total} images, {rate:.0f} images/s, {self._bytes / seconds / 1e6:.1f} MB/s{left}"

    def _tell(self, text: str) -> None:
        if self._live:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            say(text)

    def close(self) -> None:
        """Say the last state."""
        self._tell(self.line())
        if self._live:
            print(file=sys.stderr)


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
