"""Every kernel compiles for A100, H100/H200 and B200 class devices without spilling registers, at the sizes that training launches.  No GPU needed.

The compiler runs in a process of its own: this one has Triton's interpreter switched on.
"""

import json

import pytest

from tests.helpers import run_python
from tests.kernels.cases import CASES
from tests.kernels.compile_gate import kernels_there

ARCHITECTURES = ("80", "90", "100")
KERNELS = sorted({make().kernel.__name__ for make in CASES.values()})


def test_every_kernel_has_a_case():
    assert kernels_there() == set(KERNELS)


def test_a_kernel_without_a_case_is_found(tmp_path, monkeypatch):
    (tmp_path / "new.py").write_text("@triton.jit\ndef lonely_kernel(x):\n    pass\n\n\n@triton.jit\ndef helper(x):\n    pass\n")
    monkeypatch.setattr("tests.kernels.compile_gate.FOLDER", tmp_path)
    assert kernels_there() == {"lonely_kernel"}


def check(kernel, arch):
    done = run_python("-m", "tests.kernels.compile_gate", arch, kernel, env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for row in rows:
        assert row["stack"] == 0 and row["spill"] == 0, f"spills registers: {row}"
        assert row["smem"] <= 99 * 1024, f"more shared memory than two programs of an A100 can have: {row}"


def test_the_backward_pass_of_the_losses_compiles():
    check("pseudo_label_ce_backward_kernel", "90")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_spills(kernel, arch):
    check(kernel, arch)
