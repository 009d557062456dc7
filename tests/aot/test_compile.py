"""The renderer's kernels compile for A100, H100/H200 and B200 class devices without spilling registers.  No GPU needed.

The compiler runs in a process of its own: this one has Triton's interpreter switched on.
"""

import json

import pytest

from tests.helpers import run_python

# Between them they launch every kernel, with and without maps, boxes, statistics, filters, both ways of sampling and both ways of writing.
POLICIES = "fixmatch_strong,torchssl_strong,imagenet_strong,tllib_default_strong"


def compiled(*arguments):
    done = run_python("-m", "tests.aot.compile_gate", *arguments, env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for row in rows:
        assert row["stack"] == 0 and row["spill"] == 0, f"spills registers: {row}"
        # fused multiply-add would round once where the reference rounds twice; quotients are made of them, so only where nothing is divided
        assert row["fma"] == 0 or row["kernel"] not in ("apply_kernel", "resample_kernel", "blur_kernel"), f"fuses products and sums: {row}"
    return rows


def test_the_view_writing_kernel_compiles_without_spills():
    rows = compiled("90", "fixmatch_strong", "32", "32", "apply_kernel")
    assert {row["kernel"] for row in rows} == {"apply_kernel"} and len(rows) == 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_kernel_compiles_without_spills(arch):
    rows = compiled(arch, POLICIES, "224", "512")
    kernels = {"apply_kernel", "table_kernel", "taps_kernel", "resample_kernel", "mean_kernel", "colour_kernel", "blur_kernel", "philox_kernel"}
    assert {row["kernel"] for row in rows} == kernels


def test_without_interpreter_or_gpu_the_renderer_says_what_it_needs():
    code = (
        "import torch; from fastssl.augment import build_policy, check_backend\n"
        "policy = build_policy('plain', size=8, channels=1, mean=[0.5], std=[0.5])\n"
        "print(check_backend(policy, 'auto', 'cpu'))\ncheck_backend(policy, 'triton', 'cpu')"
    )
    done = run_python("-c", code, env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 1 and done.stdout.strip() == "reference"
    assert "augmentation backend 'triton' needs a CUDA device, not 'cpu'; use backend 'reference' or 'auto'" in done.stderr
