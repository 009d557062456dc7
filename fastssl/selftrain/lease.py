"""Claims on units of work, for any number of workers that share nothing but a folder: no clock of one machine is compared with another's.

A claim is a file that its worker rewrites several times per lease.  Another worker takes it over when it has watched the file not change for a whole lease, by
its own monotonic clock, or at once if the worker was a process of this machine that is gone.  A claim that is taken over by mistake costs double work and
nothing else, because a unit can be committed once only.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

from fastssl.errors import DataError
from fastssl.selftrain.files import move_new, replace_file, told, write_new

BEATS = 4  # signs of life per lease


class Claims:
    """This worker's claims in ``folder``; a context manager, which keeps them alive from a thread and lets go of them at the end."""

    def __init__(self, folder: Path, lease_s: float = 120.0):
        if lease_s <= 0:
            raise DataError(f"a lease of {lease_s} s is no lease; it must be longer than 0 s, and longer than a worker may hang without being given up")
        self.folder, self.lease_s = folder, lease_s
        self.owner = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self._held: dict[str, int] = {}  # unit -> signs of life so far
        self._seen: dict[str, tuple[bytes, float]] = {}  # others' claims: content, and since when it has not changed
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Claims:
        with told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._beat, name="fastssl-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        for unit in list(self._held):
            self.release(unit)

    def take(self, unit: str) -> bool:
        """Whether this worker now holds the unit. Never waits."""
        path = self._path(unit)
        if not path.exists() or self._take_over(path):
            with self._lock:
                if write_new(path, self._content(0)):
                    self._held[unit] = 0
                    return True
        return False

    def release(self, unit: str) -> None:
        """Give the unit back; nothing if it was taken over meanwhile."""
        with self._lock:
            if self._held.pop(unit, None) is not None and self._is_mine(self._path(unit)):
                self._path(unit).unlink(missing_ok=True)

    # --- inside -----------------------------------------------------------------------------------------------------------------

    def _path(self, unit: str) -> Path:
        return self.folder / f"{unit}.claim"

    def _content(self, beat: int) -> bytes:
        return json.dumps({**self.owner, "beat": beat}).encode()

    def _is_mine(self, path: Path) -> bool:
        return _parse(_read(path)).get("token") == self.owner["token"]

    def _take_over(self, path: Path) -> bool:
        """Whether a dead worker's claim was taken out of the way."""
        content, now = _read(path), time.monotonic()
        if content is None:
            return True  # it was released since we looked
        known = self._seen.get(path.name)
        if known is None or known[0] != content:
            self._seen[path.name] = known = (content, now)
        if not self._is_gone(_parse(content)) and now - known[1] < self.lease_s:
            return False
        aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.stale")
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return False  # somebody else was quicker
        found = _read(aside)
        if found is not None and found != content:  # a live claim came in its place since we read it: put it back
            move_new(aside, path)
            aside.unlink(missing_ok=True)
            return False
        aside.unlink(missing_ok=True)
        self._seen.pop(path.name, None)
        return True

    def _is_gone(self, owner: dict[str, object]) -> bool:
        """Whether the owner was a process of this very system that has ended."""
        pid = owner.get("pid")
        if (owner.get("host"), owner.get("boot")) != (self.owner["host"], self.owner["boot"]) or not isinstance(pid, int):
            return False
        try:
            os.kill(pid, 0)
            # a process that has ended stays in the table until its parent asks for its status: state Z, behind the name in brackets
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except ProcessLookupError:
            return True
        except OSError:
            return False

    def _beat(self) -> None:
        while not self._end.wait(self.lease_s / BEATS):
            with self._lock:
                for unit, beat in list(self._held.items()):
                    if self._is_mine(self._path(unit)):
                        self._held[unit] = beat + 1
                        try:
                            replace_file(self._path(unit), self._content(beat + 1))
                        except DataError:
                            pass  # a full disk ends the work itself, with its own message; a lost claim costs double work only


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _parse(content: bytes | None) -> dict[str, object]:
    try:
        value = json.loads(content or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _boot() -> str:
    """What tells this running system, and its numbering of processes, from another of the same name; "" where that cannot be known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return secrets.token_hex(8)  # never equal: others wait for the lease
