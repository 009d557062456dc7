"""One kernel call as data, so that a test can compile without a device exactly what would be launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)  # read when triton is imported; the interpreter then stands in for the compiler


@dataclass(frozen=True)
class Launch:
    """``arguments`` and ``constants`` by the kernel's names; tensors, integers, floats, or None for a pointer that the constants say is not read."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    fuse: bool = True  # products and sums into one rounding

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": self.fuse}

    def run(self) -> None:
        """Launch on the device of the first tensor; nothing for an empty grid."""
        if 0 in self.grid:
            return
        first = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        if first.is_cuda:
            with torch.cuda.device(first.device):
                self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
        else:
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def tile(rows: int, columns: int, values: int = 1024, widest: int = 2048) -> tuple[int, int]:
    """(rows, columns) of a program's tile, powers of two: about ``values`` numbers, at most ``widest`` columns at a time.

    Under the interpreter, which costs the same for wide tiles as for narrow ones, all rows.
    """
    block = min(max(16, triton.next_power_of_2(columns)), widest)
    if INTERPRETED:
        return triton.next_power_of_2(max(rows, 1)), block
    return max(1, min(values // block, triton.next_power_of_2(max(rows, 1)))), block
