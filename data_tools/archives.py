"""Unpacking archives of others: nothing is written outside the folder, whatever the member names say."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_tools.atomic import told
from data_tools.download import NotAvailable

SUFFIXES = (".tgz", ".tar.gz", ".tar", ".tar.bz2", ".tar.xz", ".zip")


def is_archive(name: str) -> bool:
    """Whether a file of this name is unpacked; a lone .gz (the IDX files) is read as it is."""
    return name.endswith(SUFFIXES)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the plain files of a tar or zip archive into ``folder``, which is made; links, devices and members outside of it are left out.

    Raises NotAvailable for an archive that cannot be read, DataError for a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = folder.resolve()
    try:
        for name, content in _members(archive):
            target = root / name
            if not target.resolve().is_relative_to(root):
                continue
            with content, told(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "wb") as out:
                    shutil.copyfileobj(content, out, 1 << 20)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise NotAvailable(f"{archive.name} is no readable archive ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from error
    return folder


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as packed:
            for entry in packed.infolist():
                if not entry.is_dir():
                    yield entry.filename, packed.open(entry)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member it has seen
