"""Worker processes that outlive nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAIN = """
import time
from data_tools.pool import run_all
from tests.data_tools.test_pool import process
for pid in run_all(process, range(100), 2, "processes"):
    print(pid, flush=True)
    time.sleep(60)
"""


def process(_: int) -> int:
    """A job for a worker: which process it is."""
    time.sleep(0.01)
    return os.getpid()


def test_workers_end_when_the_program_is_killed():
    """They hold its standard output open: it ends when the last of them has."""
    main = subprocess.Popen([sys.executable, "-c", MAIN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert main.stdout is not None
    worker = int(main.stdout.readline())
    assert worker != main.pid
    main.send_signal(signal.SIGKILL)
    try:
        main.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        raise
