"""Where the wall time goes: updates, waiting for data, evaluation; with the rules of what counts as training speed.

Speed figures (``perf/*``, ``images_per_s`` of the summary) leave out evaluation, checkpoints and the first :data:`WARMUP_STEPS` updates of a process
(allocator, autotuning and page-cache warm-up), unless the process made no more than those.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

WARMUP_STEPS = 5


@dataclass
class Totals:
    """Seconds and counts since the start of the run, summed over resumes; part of a checkpoint."""

    wall_s: float = 0.0  # everything between the start of training and now
    train_s: float = 0.0  # updates only
    eval_s: float = 0.0
    timed_steps: int = 0  # updates after warm-up
    timed_s: float = 0.0
    timed_wait_s: float = 0.0
    warm_s: float = 0.0  # warm-up updates: used only when there are no others
    warm_steps: int = 0
    warm_wait_s: float = 0.0


@dataclass(frozen=True)
class Window:
    """Speed since the last log line."""

    step_s: float  # seconds per update
    wait_s: float  # seconds per update that the trainer waited for data
    images_per_s: float
    wait_share: float  # 0..1


class Stopwatch:
    """Measures updates between ``run()`` and ``pause()``; ``lap`` marks a finished update."""

    def __init__(self, images_per_step: int, totals: dict[str, float] | None = None):
        self.images_per_step = images_per_step
        self.totals = Totals(**totals) if totals else Totals()  # type: ignore[arg-type]
        self._steps_here = 0
        self._origin = time.perf_counter()
        self._mark = self._origin
        self._wall_before = self.totals.wall_s
        self._window = [0.0, 0.0, 0]  # seconds, waited seconds, updates

    def run(self) -> None:
        """(Re)start counting time as training time."""
        self._mark = time.perf_counter()

    def lap(self, waited_s: float) -> None:
        """An update is done (as far as the host knows), ``waited_s`` of it spent waiting for data."""
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self._steps_here += 1
        self._window[0] += passed
        self._window[1] += waited_s
        self._window[2] += 1
        t = self.totals
        t.train_s += passed
        if self._steps_here > WARMUP_STEPS:
            t.timed_s, t.timed_wait_s, t.timed_steps = t.timed_s + passed, t.timed_wait_s + waited_s, t.timed_steps + 1
        else:
            t.warm_s, t.warm_wait_s, t.warm_steps = t.warm_s + passed, t.warm_wait_s + waited_s, t.warm_steps + 1

    def settle(self) -> None:
        """Count the time since the last lap as training time: the device was just waited for."""
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self._window[0] += passed
        self.totals.train_s += passed
        if self._steps_here > WARMUP_STEPS:
            self.totals.timed_s += passed
        else:
            self.totals.warm_s += passed

    def window(self) -> Window:
        """Speed since the last call; starts a new window."""
        seconds, waited, steps = self._window
        self._window = [0.0, 0.0, 0]
        steps, seconds = max(1, int(steps)), max(seconds, 1e-9)
        return Window(seconds / steps, waited / steps, steps * self.images_per_step / seconds, min(1.0, waited / seconds))

    def add_eval(self, seconds: float) -> None:
        self.totals.eval_s += seconds

    def wall_s(self) -> float:
        """Seconds since the start of training, accumulated over resumes."""
        self.totals.wall_s = self._wall_before + time.perf_counter() - self._origin
        return self.totals.wall_s

    def state(self) -> dict[str, float]:
        self.wall_s()
        return asdict(self.totals)

    def overall(self) -> tuple[float, float]:
        """(images per second, share of training time spent waiting for data) of the whole run."""
        t = self.totals
        steps, seconds, waited = (t.timed_steps, t.timed_s, t.timed_wait_s) if t.timed_steps else (t.warm_steps, t.warm_s, t.warm_wait_s)
        if not steps:
            return 0.0, 0.0
        return steps * self.images_per_step / max(seconds, 1e-9), min(1.0, waited / max(seconds, 1e-9))
