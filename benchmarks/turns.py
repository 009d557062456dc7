"""Candidates that take turns: each lives in a process of its own, pinned to the processors that it may use, and works only while it is asked to.

Every process is forked from one that has imported the heavy packages, opens its case, warms up, chooses how many passes make a turn long enough, and then
waits.  A turn is measured inside that process: seconds on the clock and seconds of processor time, its worker processes included.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LONGEST_TURN = 64  # passes
READY_S = 300.0  # longest time that opening and warming up may take


@dataclass(frozen=True)
class Measured:
    """One turn."""

    images: int
    wall_s: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        return self.images / self.wall_s

    @property
    def per_core_s(self) -> float:
        return self.images / self.cpu_s


def _cpu_s() -> float:
    """Processor seconds so far of this process and of its living children."""
    import psutil

    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(t.user + t.system for t in times)


def measure(turn: Any, passes: int) -> Measured:
    """One turn of ``passes`` passes (see loader_cases.Turn)."""
    turn.lead_in()
    cpu, start = _cpu_s(), time.perf_counter()
    images = turn.run(passes)
    return Measured(images, time.perf_counter() - start, max(1e-9, _cpu_s() - cpu))


def _quiet() -> None:
    """Wait until what reads ahead on its own has filled its buffers, so that it does not work in another's turn."""
    for _ in range(60):
        before = _cpu_s()
        time.sleep(0.05)
        if _cpu_s() - before < 0.005:
            return


def _child(pipe: Any, open: Callable[..., Any], arguments: tuple[Any, ...], processors: Sequence[int], seconds: float) -> None:
    os.sched_setaffinity(0, processors)
    import torch

    torch.set_num_threads(len(processors))
    try:
        turn = open(*arguments)
        turn.run(1)  # compiles, fills caches
        warm = measure(turn, 1)
        passes = int(min(LONGEST_TURN, max(1, round(seconds * len(processors) / warm.cpu_s))))  # by work done: other load does not shorten a turn
        _quiet()
    except Exception as error:
        kind = "missing" if type(error).__name__ in ("Missing", "DataError") else "failed"
        pipe.send((kind, str(error) if kind == "missing" else traceback.format_exc()))
        return
    pipe.send(("ready", turn.facts))
    while pipe.recv():
        try:
            done = measure(turn, passes)
            _quiet()
            pipe.send(("done", done))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))
            return


class Candidate:
    """One case on some processors. ``state``: ready, missing or failed, with ``said`` for the reason; ``turns`` are its measurements."""

    def __init__(self, context: Any, open: Callable[..., Any], arguments: tuple[Any, ...], processors: Sequence[int], seconds: float):
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_child, args=(end, open, arguments, list(processors), seconds), daemon=False)
        self._process.start()
        end.close()
        self.turns: list[Measured] = []
        self.state, self.said, self.facts = "starting", "", {}

    def wait(self) -> None:
        """Until it is ready or has said why not."""
        kind, content = self._receive(READY_S)
        self.state = kind
        if kind == "ready":
            self.facts = content
        else:
            self.said = content

    def take_turn(self) -> None:
        if self.state != "ready":
            return
        self._pipe.send(True)
        kind, content = self._receive(READY_S)
        if kind == "done":
            self.turns.append(content)
        else:
            self.state, self.said = kind, content

    def _receive(self, seconds: float) -> tuple[str, Any]:
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
            return "failed", f"no answer for {seconds:.0f} s"
        except (EOFError, OSError):
            return "failed", f"its process ended with status {self._process.exitcode}"

    def close(self) -> None:
        try:
            self._pipe.send(False)
        except OSError:
            pass
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def context(preload: Sequence[str]) -> Any:
    """A start method whose processes share what ``preload`` imports once."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(preload))
    return made
