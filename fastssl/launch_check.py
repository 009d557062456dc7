"""Did the launcher start as many processes as it was asked for?

``accelerate launch --cpu --num_processes 2`` (and ``--num_processes 2`` on a machine with one GPU) starts ONE process and says nothing.  The child
cannot see the wish in its environment, but its parent's command line and the accelerate config file hold it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastssl.errors import FastSSLError

_WORLD_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun; Open MPI; MPICH, Intel MPI; MVAPICH
_STEP_VARIABLE = "SLURM_STEP_NUM_TASKS"  # `srun -n 2 python ...` without torchrun: every task is alone


class LaunchError(FastSSLError):
    """Fewer processes run than were asked for."""


@dataclass(frozen=True)
class Wish:
    """How many processes were asked for, and by whom (in words)."""

    processes: int
    by: str


def started_world(environ: Mapping[str, str] | None = None) -> int:
    """Processes of this world as torchrun or MPI announces it to a child; 1 when nothing does."""
    found = _first_count(os.environ if environ is None else environ, _WORLD_VARIABLES)
    return found[1] if found else 1


def asked_world(environ: Mapping[str, str] | None = None, *, ancestors: Sequence[Sequence[str]] | None = None, own: Sequence[str] | None = None) -> int | None:
    """Number of processes that a launcher was asked for, or None when no launcher left a trace. Arguments replace what is read from the system."""
    wish = find_wish(environ, ancestors=ancestors, own=own)
    return wish.processes if wish else None


def find_wish(environ: Mapping[str, str] | None = None, *, ancestors: Sequence[Sequence[str]] | None = None, own: Sequence[str] | None = None) -> Wish | None:
    """``asked_world`` with its source. ``ancestors``: command lines of parent, grandparent, ...; ``own``: this process's command line."""
    environ = os.environ if environ is None else environ
    found = _first_count(environ, _WORLD_VARIABLES)
    if found:
        return Wish(found[1], f"${found[0]}")
    if "ACCELERATE_MIXED_PRECISION" in environ:  # every `accelerate launch` child has it
        own = _command_line(0) if own is None else own
        for line in _ancestors() if ancestors is None else ancestors:
            options = _accelerate_options(line, own)
            if options is not None:
                wish = _accelerate_wish(options)
                if wish:
                    return wish
                break
    found = _first_count(environ, (_STEP_VARIABLE,))
    return Wish(found[1], f"srun (${found[0]})") if found else None


def check_world(actual: int, wish: Wish | None = None, *, arguments: Sequence[str] | None = None) -> None:
    """Raise LaunchError, with the line to run instead, when fewer than the asked processes run (``actual`` = world size)."""
    wish = find_wish() if wish is None else wish
    if wish is None or actual >= wish.processes:
        return
    arguments = sys.argv[1:] if arguments is None else arguments
    line = " ".join(["torchrun", "--standalone", f"--nproc_per_node {wish.processes}", "-m fastssl", *arguments])
    raise LaunchError(
        f"{wish.by} asked for {wish.processes} processes, but this run has {actual} (accelerate starts only one process per GPU, and one on CPU); "
        f"start it with: {line}"
    )


def started_by_accelerate() -> bool:
    """Whether this process's parent is an ``accelerate launch`` that started it alone, without torchrun."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK")):
        return False
    own, *ancestors = _lineage(1) or [[]]
    return bool(ancestors) and _accelerate_options(ancestors[0], own) is not None


def _accelerate_options(line: Sequence[str], own: Sequence[str]) -> list[str] | None:
    """The launcher's own arguments in an ``accelerate launch`` command line (without the script and its arguments), else None."""
    words = list(line)
    start = None
    for i, word in enumerate(words[:6]):
        name = Path(word).name
        if name == "accelerate-launch" or word == "accelerate.commands.launch" or word.endswith("accelerate/commands/launch.py"):
            start = i + 1
        elif (name in ("accelerate", "accelerate_cli.py") or word == "accelerate.commands.accelerate_cli") and words[i + 1 : i + 2] == ["launch"]:
            start = i + 2
        if start is not None:
            break
    if start is None:
        return None
    shared = 0  # the child's command line ends like the launcher's: that tail belongs to the script
    while shared < min(len(words) - start, len(own)) and words[-1 - shared] == own[-1 - shared]:
        shared += 1
    return words[start : len(words) - shared]


def _accelerate_wish(options: Sequence[str]) -> Wish | None:
    count = _option(options, "num_processes")
    if count is not None:
        return Wish(int(count), "accelerate launch") if count.isdigit() else None
    config = _option(options, "config_file")
    path = Path(config) if config else None
    if path is None and "--cpu" not in options:  # with --cpu accelerate does not read its default file
        path = _default_config()
    configured = _config_count(path) if path else None
    return Wish(configured, f"the accelerate config {path}") if configured else None


def _option(options: Sequence[str], name: str) -> str | None:
    spellings = (f"--{name}", f"--{name.replace('_', '-')}")
    for i, word in enumerate(options):
        flag, equals, value = word.partition("=")
        if flag in spellings:
            return value if equals else next(iter(options[i + 1 :]), None)
    return None


def _default_config() -> Path | None:
    try:
        from accelerate.commands.config.config_args import default_config_file
    except Exception:  # accelerate may be missing or of another layout: then there is no wish to read
        return None
    return Path(default_config_file)


def _config_count(path: Path) -> int | None:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    count = values.get("num_processes") if isinstance(values, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def _first_count(environ: Mapping[str, str], names: Sequence[str]) -> tuple[str, int] | None:
    for name in names:
        if environ.get(name, "").isdigit() and int(environ[name]) > 0:
            return name, int(environ[name])
    return None


def _command_line(generation: int) -> list[str]:
    lines = _lineage(generation)
    return lines[generation] if len(lines) > generation else []


def _ancestors() -> list[list[str]]:
    return _lineage(4)[1:]


def _lineage(generations: int) -> list[list[str]]:
    """Command lines of this process, its parent, ...; shorter where the system hides them."""
    import psutil

    lines: list[list[str]] = []
    process: psutil.Process | None = psutil.Process()
    try:
        while process is not None and len(lines) <= generations:
            lines.append(process.cmdline())
            process = process.parent()
    except psutil.Error:
        pass
    return lines
