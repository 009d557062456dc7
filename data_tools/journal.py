"""The folder of an unfinished conversion: what it is of, which units are done, how far assembly has come; one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.atomic import told, write_file
from data_tools.progress import say
from data_tools.units import Unit, load_unit
from fastssl.errors import DataError

try:
    import fcntl
except ImportError:  # no such locks on Windows: two conversions to one place at a time are then the user's own care
    fcntl = None  # type: ignore[assignment]

STATE, ASSEMBLY = "state.json", "assembly.json"


def partial_folder(dest: Path) -> Path:
    """Where an unfinished conversion to ``dest`` lies: beside it, so that the last rename stays on one disk."""
    return dest.with_name(f"{dest.name}.tmp-convert")


def tidy(dest: Path) -> None:
    """Remove what a kill left beside a finished ``dest`` whose files had already been moved out; anything else stays."""
    root = partial_folder(dest)
    if (root / STATE).is_file() and not (root / "out").is_dir():
        shutil.rmtree(root, ignore_errors=True)


class Journal:
    """``state`` identifies the work (source stamp, options); ``parts`` holds the units, ``out`` the dataset folder that is being put together."""

    def __init__(self, dest: Path, state: dict[str, Any]):
        self.dest, self.root = dest, partial_folder(dest)
        self._old = self.root / "replaced"
        self.parts, self.out = self.root / "parts", self.root / "out"
        self.state = state
        self.continued = False

    @contextlib.contextmanager
    def opened(self, *, restart: bool = False) -> Iterator[Journal]:
        """Begin or continue.  Raises DataError where what lies there belongs to another source or other options, or is being written right now.

        The folder stays when the block fails, so that the same command continues; ``finish`` removes it.
        """
        with told(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = open(self.root / "lock", "a")  # noqa: SIM115 (held for the whole block)
        with lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise DataError(f"another process is converting into {str(self.root)!r}; wait for it or choose another destination") from error
            with told(self.root):
                if restart:
                    self._restore()
                    self._clear()
                self._take_up()
                try:
                    yield self
                except BaseException:
                    if self.done():
                        say(f"stopped; what is done is kept in {self.root} and the same command continues it")
                    raise

    def _take_up(self) -> None:
        file = self.root / STATE
        self._restore()
        if file.is_file():
            try:
                before = json.loads(file.read_text())
            except ValueError:
                before = {}
            different = sorted(key for key in {*before, *self.state} if before.get(key) != self.state.get(key))
            if different:
                what = ", ".join("the source has changed" if key == "stamp" else f"{key} {before.get(key)!r}, now {self.state.get(key)!r}" for key in different)
                raise DataError(
                    f"{str(self.root)!r} holds an unfinished conversion of something else ({what}); give the same command again to continue it, "
                    "or add --restart to throw it away"
                )
            self.continued = any(self.parts.glob("*.meta"))
        else:
            self._clear()
        self.parts.mkdir(exist_ok=True)
        self.out.mkdir(exist_ok=True)
        for leftover in [*self.parts.glob("*.tmp-*"), *self.parts.glob("*.mtmp-*")]:
            leftover.unlink(missing_ok=True)
        if not file.is_file():
            write_file(file, json.dumps(self.state).encode())

    def _restore(self) -> None:
        """Mend what a kill within ``finish`` left: a dataset that was moved away but not replaced returns; what is left behind a finished one goes."""
        if self._old.exists() and not self.dest.exists():
            os.replace(self._old, self.dest)
        if (self.root / STATE).is_file() and not self.out.is_dir():
            self._clear()

    def _clear(self) -> None:
        for entry in self.root.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def done(self) -> set[str]:
        """Names of the committed units."""
        return {entry.name[:-5] for entry in os.scandir(self.parts) if entry.name.endswith(".meta")}

    def meta(self, name: str) -> Path:
        return self.parts / f"{name}.meta"

    def data(self, name: str) -> Path:
        return self.parts / f"{name}.data"

    def unit(self, name: str) -> Unit:
        """A committed unit's record.  Raises DataError where it is damaged."""
        unit = load_unit(self.meta(name))
        if unit is None:
            raise DataError(f"{str(self.meta(name))!r} is damaged; run the same command again with --restart")
        return unit

    def forget(self, name: str) -> None:
        """Uncommit a unit that turned out to be damaged."""
        self.meta(name).unlink(missing_ok=True)
        self.data(name).unlink(missing_ok=True)

    def assembled(self) -> dict[str, Any]:
        """How far assembly has come: {split: writer's mark}; empty before it begins."""
        try:
            return json.loads((self.root / ASSEMBLY).read_text())
        except (OSError, ValueError):
            return {}

    def mark(self, progress: dict[str, Any]) -> None:
        write_file(self.root / ASSEMBLY, json.dumps(progress).encode())

    def finish(self, dest: Path) -> None:
        """Rename the finished folder to ``dest``, whose place it takes, and remove the rest."""
        if self._old.exists():  # a kill came here before: ``dest`` is whole, this is what it replaced
            shutil.rmtree(self._old)
        if dest.exists():
            os.replace(dest, self._old)
        os.replace(self.out, dest)
        shutil.rmtree(self.root, ignore_errors=True)
