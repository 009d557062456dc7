"""One process's place in the run: Accelerator, device, threads, determinism, seeds, and the share of each global batch.

The same program starts as ``python -m fastssl``, under ``accelerate launch`` and under ``torchrun``. Without a CUDA device it runs on the
CPU, several processes with gloo.
"""

from __future__ import annotations

import atexit
import os
import warnings

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs

from fastssl.engine.stop import stop_with_parent
from fastssl.errors import RecipeError
from fastssl.launch_check import check_world, started_by_accelerate
from fastssl.parallel import world_size
from fastssl.schema import Recipe

DROPOUT_SEED_STRIDE = 1_000_003  # rank r draws dropout from seed + (r + 1) * stride: away from the seed of the weights


def launch(recipe: Recipe) -> Accelerator:
    """Join the process group (if this is one of several processes) and settle device, precision, threads and determinism.

    Raises :class:`RecipeError` for a precision the device lacks, and if a launcher started fewer processes than it was asked for.
    """
    parent = os.getppid()
    if started_by_accelerate():  # `accelerate launch` of one process does not pass SIGTERM on (torchrun, and so its launch of several, does)
        stop_with_parent(parent)
    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    precision = recipe.train.precision
    if cpu and precision == "fp16":
        raise RecipeError("train.precision: fp16 needs a CUDA device; use 'bf16' or 'no' on the CPU")
    if AcceleratorState._shared_state and AcceleratorState._shared_state.get("_mixed_precision") != precision:
        AcceleratorState._reset_state()  # an earlier run in this very process had another precision; the process group stays
    # Method state is replicated by construction, and DDP's buffer broadcast would overwrite it with rank 0's.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)
    # A recorded update must not meet weights that were cast before it. Off everywhere, so that eager and recorded updates are equal.
    autocast = AutocastKwargs(cache_enabled=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # threads are set two lines below
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp, autocast])
    check_world(accelerator.num_processes)
    _set_threads(recipe.train.threads)
    _set_determinism(recipe.train.deterministic)
    return accelerator


def check_batches(recipe: Recipe, world: int, *, unlabeled: bool = True) -> None:
    """Both global batches must be divisible by ``world``; the error names the process counts that work."""
    batches = {"data.labeled_batch": recipe.data.labeled_batch}
    if unlabeled:
        batches["data.unlabeled_batch"] = recipe.data.unlabeled_batch
    for name, size in batches.items():
        if size < 1:
            raise RecipeError(f"{name}: {size} must be at least 1")
    if any(size % world for size in batches.values()):
        divisors = [n for n in range(1, min(batches.values()) + 1) if all(size % n == 0 for size in batches.values())]
        sizes = ", ".join(f"{name} = {size}" for name, size in batches.items())
        raise RecipeError(f"{world} processes do not divide the global batches ({sizes}); use one of {divisors} processes or other batch sizes")


def seed_weights(recipe: Recipe) -> None:
    """Seed the generators so that every rank builds the same initial weights."""
    torch.manual_seed(recipe.seed)


def seed_dropout(recipe: Recipe, rank: int) -> None:
    """After building, give each rank its own stream for what the network itself draws (dropout, drop-path)."""
    torch.manual_seed((recipe.seed + (rank + 1) * DROPOUT_SEED_STRIDE) % 2**63)


def leave_group_at_exit() -> None:
    """After a good end: say goodbye to the other processes when this one exits. After a bad one they may be gone, and waiting would hang."""
    if world_size() > 1:
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def local_world_size() -> int:
    """Processes of this run on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cores_per_process() -> int:
    """CPU cores this process may count on, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size())


def _set_threads(threads: int) -> None:
    torch.set_num_threads(threads or cores_per_process())


def _set_determinism(on: bool) -> None:
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # buffers are written before they are read
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(on, warn_only=True)
