"""Compile the renderer's kernels ahead of time, exactly as a policy would launch them, and report registers and spills.  Needs no GPU.

    python -m tests.aot.compile_gate ARCH[,ARCH...] POLICY[,POLICY...|all] [SIZE CANVAS]

prints one JSON line per compiled kernel.  Must run without TRITON_INTERPRET: the interpreter and the compiler need separate processes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastssl.augment import POLICIES, build_policy, draw
from fastssl.augment.triton_launch import Launch
from fastssl.augment.triton_philox import philox_kernel
from fastssl.augment.triton_renderer import launches

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}


def source_of(launch: Launch) -> ASTSource:
    """The kernel with the types, constants and alignments of a launch; integers equal to 1 become constants, as at a launch."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for place, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if isinstance(value, int) and launch.kernel is philox_kernel:  # its integers are not specialised
            signature[name] = "i32" if value < 1 << 31 else "i64"
            continue
        if isinstance(value, int) and value == 1:
            signature[name], constants[name] = "constexpr", 1
            continue
        signature[name] = "*" + TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(launch: Launch, arch: int) -> dict[str, int]:
    """Registers, stack bytes, shared bytes and spill instructions of a launch compiled for sm_``arch``."""
    options = {"num_warps": launch.warps, "enable_fp_fusion": False}
    return usage(triton.compile(source_of(launch), target=GPUTarget("cuda", arch, 32), options=options))


def usage(compiled: Any) -> dict[str, int]:
    """What a compiled kernel uses, read from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        use, code = (
            subprocess.run([BIN / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout for option in ("-res-usage", "-sass")
        )

    def number(name: str) -> int:
        found = re.search(name + r":(\d+)", use)
        assert found, use
        return int(found[1])

    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    fused = len(re.findall(r"\b(?:FFMA|DFMA)\b", code))
    instructions = len(re.findall(r"/\*[0-9a-f]{4,}\*/ ", code))
    return {"regs": number("REG"), "stack": number("STACK"), "smem": compiled.metadata.shared, "spill": spills, "fma": fused, "sass": instructions}


def launches_of(name: str, size: int, canvas: int, channels: int = 3) -> list[Launch]:
    """What rendering a policy into bfloat16 channels-last views launches."""
    policy = build_policy(name, size=size, channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels)
    extent = torch.full((2, 2), canvas, dtype=torch.int32)
    plan = draw(policy, seed=0, stream=0, view=0, draw_B=torch.arange(2), extent_B2=extent)
    out = torch.empty(2, channels, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    return launches(policy, plan, torch.empty(2, canvas, canvas, channels, dtype=torch.uint8), extent, out)


def philox_launch() -> Launch:
    """Drawing the words of 64 rows with a key beyond 31 bits."""
    draw_B, out = torch.zeros(64, dtype=torch.int64), torch.zeros(64, 9, dtype=torch.int64)
    arguments = {"draw": draw_B, "out": out, "key0": 1 << 31, "key1": 1, "lane": 1 << 31, "total": 192}
    return Launch(philox_kernel, 1, arguments, {"COUNT": 9, "BLOCKS": 3, "BLOCK": 256})


def main(archs: str, policies: str, size: str = "32", canvas: str = "40", only: str = "") -> None:
    done: set[str] = set()
    for name in [*(POLICIES if policies == "all" else policies.split(",")), "drawing"]:
        for launch in [philox_launch()] if name == "drawing" else launches_of(name, int(size), int(canvas)):
            key = repr((launch.kernel.__name__, sorted(launch.constants.items())))
            if key in done or only not in launch.kernel.__name__:
                continue
            done.add(key)
            for arch in archs.split(","):
                print(json.dumps({"policy": name, "kernel": launch.kernel.__name__, "arch": int(arch), **resources(launch, int(arch))}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
