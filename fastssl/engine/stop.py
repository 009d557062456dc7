"""Ctrl-C and SIGTERM: the current update is finished, then the run checkpoints and ends. All ranks stop after the same update."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from fastssl.parallel import world_size

AGREE_EVERY = 8  # with several ranks: updates between two looks at the other ranks' signals


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def stop_with_parent(parent: int) -> None:
    """From now on the end of the process ``parent`` (this one's parent, as found before) is a SIGTERM to this one. Linux only; elsewhere nothing."""
    if _signal_at_parents_end(signal.SIGTERM) and os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def _signal_at_parents_end(signum: int) -> bool:
    """``signum`` 0: no signal."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signum)) == 0
    except (OSError, AttributeError):
        return False


class Interrupted(Exception):
    """Training was asked to stop and did so with a checkpoint. ``exit_code`` is 128 + signal number (130, 143)."""

    def __init__(self, run: Path, step: int, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after update {step}; go on with --resume {run}")
        self.run, self.step, self.signum = run, step, signum
        self.exit_code = 128 + signum


class StopRequest:
    """Notes SIGINT and SIGTERM while active (context manager). The second signal acts at once, as if nobody had noted the first."""

    def __init__(self, device: torch.device, also: Callable[[int], bool] | None = None):
        self.signum = 0
        self._device = device
        self._also = also
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        # A signal to the whole group (Ctrl-C) ends the launcher too; that must not count as the second signal. First this, then the handlers.
        _signal_at_parents_end(0)
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def after(self, step: int) -> int:
        """The signal to stop for after update ``step`` (the same on every rank), or 0. Several ranks look at every 8th update only."""
        if self._also is not None and self._also(step):
            self.signum = self.signum or signal.SIGTERM
        if world_size() == 1:
            return self.signum
        if step % AGREE_EVERY:
            return 0
        flag = torch.tensor(self.signum, device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag.item())
