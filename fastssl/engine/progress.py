"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere; the time that is left in both."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fastssl.engine.runfolder import RunFolder

SHOWN = {  # metric -> how a line shows it
    "train/loss": "loss {:.4f}",
    "train/util_ratio": "util {:.2f}",
    "train/pseudo_acc": "pseudo {:.1f}%",
    "train/lr": "lr {:.3g}",
    "perf/images_per_s": "{:.0f} img/s",
    "perf/data_wait_share": "wait {:.0%}",
    "eval/top1": "top1 {:.2f}%",
    "eval/top5": "top5 {:.2f}%",
    "eval/balanced_acc": "balanced {:.2f}%",
}


class Display:
    """Shows progress of a run from ``start`` to ``total`` updates; silent on ranks that do not write."""

    def __init__(self, run: RunFolder, *, start: int, total: int):
        self.run, self.start, self.total = run, start, total
        self._began = time.perf_counter()
        self._live: Live | None = None
        if run.writes and sys.stdout.isatty():
            console = Console()
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left {task.fields[left]}"))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(run.path.parent.name, total=total, completed=start, left="?")
            self._figures = Text("", no_wrap=True, overflow="ellipsis")
            self._live = Live(Group(self._bar, self._figures), console=console, refresh_per_second=8)
            self._live.start()
            run.echo = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif run.writes:
            run.echo = lambda text: print(text, flush=True)

    def step(self, finished: int) -> None:
        """``finished`` updates are done."""
        if self._live is not None:
            self._bar.update(self._task, completed=finished)

    def line(self, line: dict[str, Any]) -> None:
        """Show a metric line."""
        if not self.run.writes:
            return
        shown = "  ".join(form.format(line[name]) for name, form in SHOWN.items() if line.get(name) is not None)
        left = self.left(line["step"])
        if self._live is not None and line["kind"] == "train":
            self._bar.update(self._task, left=left)
            self._figures.plain = shown
            echo, self.run.echo = self.run.echo, None  # the bar shows it; the file still gets its line
            self.run.log(f"step {line['step']}/{self.total}  {shown}  left {left}")
            self.run.echo = echo
        else:
            self.run.log(f"{line['kind']:5s} step {line['step']}/{self.total}  epoch {line['epoch']}  {shown}  left {left}")

    def left(self, finished: int) -> str:
        """Time to the end at this process's mean pace, evaluations included."""
        done = finished - self.start
        if done <= 0:
            return "?"
        seconds = int((time.perf_counter() - self._began) / done * (self.total - finished))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self.run.echo = lambda text: print(text, flush=True)
