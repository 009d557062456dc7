"""Cases for the tests of benchmarks/turns.py: importable, because they run in processes of their own."""

import os
import time

from benchmarks.loader_cases import Turn
from benchmarks.loader_peers import Missing


def busy(milliseconds, seen=None):
    """A pass is ``milliseconds`` of work on 10 images."""

    def run(passes):
        end = time.process_time() + passes * milliseconds / 1e3
        while time.process_time() < end:
            pass
        return 10 * passes

    return Turn(run, facts={"processors": sorted(os.sched_getaffinity(0)), "threads": _threads()})


def _threads():
    import torch

    return torch.get_num_threads()


def absent():
    raise Missing("needs the wished-for package: make wish")


def broken():
    return Turn(lambda passes: 1 // 0)


def breaks_later():
    turns = iter(range(3))

    def run(passes):
        if next(turns, None) is None:
            raise OSError("the disk went away")
        return 1

    return Turn(run)


def dies():
    os._exit(3)
