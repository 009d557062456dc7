"""Files that several workers write: whole or absent, first writer wins, with file-system errors said in one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from fastssl.errors import DataError


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn an OSError into one DataError about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"the disk is full: {path} could not be written; free some space and start again: what is committed stays") from error
        raise DataError(f"{error.filename or path}: {error.strerror or error}") from error


def write_new(path: Path, content: bytes) -> bool:
    """Make ``path`` with this content, synced, unless it is there already; whether this call made it. Never overwrites, whoever else tries."""
    with told(path):
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            return move_new(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def move_new(temporary: Path, path: Path) -> bool:
    """Give a finished file its name unless the name is taken; whether it was free. A file system without hard links may let the last writer win."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        if path.exists():
            return False
        os.replace(temporary, path)
    return True


def replace_file(path: Path, content: bytes) -> None:
    """Write ``path`` under a temporary name, synced, and rename it."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
