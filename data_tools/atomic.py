"""Folders and files that appear whole or not at all, with file-system errors said in one sentence."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastssl.errors import DataError


@contextmanager
def new_folder(dest: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``dest`` to build in, renamed to ``dest`` when the block ends well and removed when it does not.

    Refuses an existing, non-empty ``dest`` unless ``replace``; then the old folder stays until the new one is complete.
    """
    dest = Path(dest)
    if not replace and dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise DataError(f"{str(dest)!r} already exists; choose another folder or add --force to replace it")
    with told(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f"{dest.name}.tmp-", dir=dest.parent))
    try:
        with told(dest):
            yield temp
            temp.chmod(0o777 & ~_umask())
            if dest.exists():
                old = Path(tempfile.mkdtemp(prefix=f"{dest.name}.tmp-", dir=dest.parent))
                os.replace(dest, old / "old")
                os.replace(temp, dest)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temp, dest)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file through a temporary name and a rename."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            temp.write_bytes(data)
            os.replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)


@contextmanager
def told(dest: Path) -> Iterator[None]:
    """Turn an OSError into one DataError that says what to do; ``dest`` is what was being written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(dest)).free / 1e9
            raise DataError(f"the disk is full: {str(dest)!r} could not be written ({free:.2f} GB free); free some space or choose another disk") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DataError(f"no permission to write {str(error.filename or dest)!r}; choose a folder that you may write to") from error
        raise DataError(f"{str(error.filename or dest)!r}: {error.strerror or error}") from error


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
