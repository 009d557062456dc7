"""The hold of a living process on its run folder, so that no second one writes into it.

It is a ``flock`` on ``run.lock`` in the folder: the system drops it with the process, however that ends, so it never goes stale. The file's text
(process and machine) is only for messages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
from pathlib import Path
from types import TracebackType

NAME = "run.lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # a file system that has none

_held: set[int] = set()


class RunLock:
    """Holds at most one run folder (context manager: let go at the end). Only the main rank takes one."""

    def __init__(self) -> None:
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def take(self, folder: Path) -> bool:
        """Hold ``folder`` and let go of any other; False if another run holds it. Raises OSError if the folder cannot be written."""
        self.release()
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
        self._handle = handle
        _held.add(handle)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        return True

    def release(self) -> None:
        if self._handle is not None and self._handle in _held:
            _held.discard(self._handle)
            with contextlib.suppress(OSError):
                fcntl.flock(self._handle, fcntl.LOCK_UN)  # at once, even if a child was just forked and has not closed its copy yet
            os.close(self._handle)
        self._handle = None


def holder(folder: Path) -> str:
    """Who holds (or held last) a run folder, in words."""
    try:
        return (folder / NAME).read_text(encoding="utf-8").strip() or "another process"
    except (OSError, ValueError):
        return "another process"


def _let_go() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)  # a child that outlives the run must not keep the folder
