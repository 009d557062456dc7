"""Settings shared by all tests: few threads, the Triton interpreter where there is no GPU, a --full switch for slow tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before anything imports triton


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run slow tests at their full size")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def full(request) -> bool:
    """True under --full: slow tests use their full size, otherwise a small one."""
    return request.config.getoption("--full")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
