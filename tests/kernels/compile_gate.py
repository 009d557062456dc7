"""Compile the kernels of ``fastssl/kernels`` ahead of time, at the sizes that training launches, and report registers and spills.  Needs no GPU.

    python -m tests.kernels.compile_gate ARCH[,ARCH...] [KERNEL[,KERNEL...]]

prints one JSON line per case.  Must run without TRITON_INTERPRET: the interpreter and the compiler need separate processes.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastssl.kernels
from fastssl.kernels.launch import Launch
from tests.aot.compile_gate import TYPES, usage
from tests.kernels.cases import CASES

FOLDER = Path(fastssl.kernels.__file__).parent


def kernels_there() -> set[str]:
    """Every function of fastssl/kernels that is launched: a Triton function whose name ends in ``_kernel``."""
    found = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and any("jit" in ast.unparse(d) for d in node.decorator_list):
                found.add(node.name)
    return found


def source_of(launch: Launch) -> ASTSource:
    """The kernel with the types, constants and alignments of a launch; None, and integers equal to 1, become constants, as at a launch."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.constants[name] if name in launch.constants else launch.arguments[name]
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + {**TYPES, torch.bool: "u1"}[value.dtype]
        else:
            signature[name] = "i32" if value < 1 << 31 else "i64"
        if signature[name].startswith("*") or (signature[name] == "i32" and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(launch: Launch, arch: int) -> dict[str, int]:
    """Registers, stack bytes, shared bytes and spill instructions of a launch compiled for sm_``arch``."""
    return usage(triton.compile(source_of(launch), target=GPUTarget("cuda", arch, 32), options=launch.options))


def main(archs: str, only: str = "") -> None:
    for name, make in CASES.items():
        launch = make()
        kernel = launch.kernel.__name__
        if only and kernel not in only.split(","):
            continue
        for arch in archs.split(","):
            print(json.dumps({"case": name, "kernel": kernel, "arch": int(arch), **resources(launch, int(arch))}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
