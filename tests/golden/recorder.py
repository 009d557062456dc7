"""Hands a recorded file's arrays to a handler and keeps the account: what was read, what was compared, how far it was off."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KERNEL_TOLERANCE = 1e-5
FLOOR = 1e-3  # entries smaller than this share of the array's largest one are measured against that share, not against themselves


@dataclass
class Comparison:
    name: str
    deviation: float  # largest relative deviation of an entry; infinity for a wrong shape, kind or NaN pattern
    tolerance: float  # 0 = exact

    @property
    def ok(self) -> bool:
        return self.deviation <= self.tolerance


@dataclass
class Recorder:
    """``kernels``: floating inputs become float32 (on the GPU if there is one) and every tolerance at least 1e-5."""

    name: str
    arrays: dict[str, np.ndarray]
    kernels: bool = False
    comparisons: list[Comparison] = field(default_factory=list)
    _read: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path, kernels: bool = False) -> Recorder:
        with np.load(path, allow_pickle=False) as file:
            return cls(path.stem, {name: file[name] for name in file.files}, kernels)

    @property
    def device(self) -> str:
        return "cuda" if self.kernels and torch.cuda.is_available() else "cpu"

    def names(self, prefix: str = "") -> list[str]:
        """Array names that start with ``prefix``, in file order. Looking at names reads nothing."""
        return [name for name in self.arrays if name.startswith(prefix)]

    def raw(self, name: str) -> np.ndarray:
        """An input as it is stored."""
        if name not in self.arrays:
            raise KeyError(f"the file has no array {name!r}")
        self._read.add(name)
        return self.arrays[name]

    def input(self, name: str) -> Tensor:
        """An input as a tensor: floats in the file's precision (float32 under ``kernels``), integers as int64."""
        tensor = torch.from_numpy(np.array(self.raw(name)))
        if not tensor.is_floating_point():
            return tensor.to(self.device, torch.int64)
        return tensor.to(self.device, torch.float32 if self.kernels else tensor.dtype)

    def hp(self, name: str) -> Any:
        """A hyper-parameter: the Python value of a 0-d array."""
        array = self.raw(name)
        if array.ndim:
            raise ValueError(f"{name} is no scalar: it has shape {array.shape}")
        return array.item()

    def check(self, name: str, actual: Any, tolerance: float = 0.0, floor: float = FLOOR) -> None:
        """Compare an output with its recorded value; ``tolerance`` 0 = exact (integers and uint8 always are). ``floor``: see :func:`deviation`."""
        if name not in self.arrays:
            raise KeyError(f"the file has no array {name!r}")
        if self.kernels and tolerance:
            tolerance = max(tolerance, KERNEL_TOLERANCE)
        expected = self.arrays[name]
        actual = actual.detach().cpu().numpy() if isinstance(actual, Tensor) else np.asarray(actual)
        self.comparisons.append(Comparison(name, deviation(actual, expected, floor), 0.0 if expected.dtype.kind in "iub" else tolerance))

    def untouched(self) -> list[str]:
        """Arrays that were neither read nor compared."""
        compared = {comparison.name for comparison in self.comparisons}
        return [name for name in self.arrays if name not in self._read and name not in compared]


def deviation(actual: np.ndarray, expected: np.ndarray, floor: float = FLOOR) -> float:
    """Largest |actual - expected| / max(|expected|, floor max|expected|); equal entries count 0, anything non-finite or of another shape infinity."""
    if actual.shape != expected.shape:
        return float("inf")
    if actual.size == 0:
        return 0.0
    if actual.dtype.kind in "US" or expected.dtype.kind in "US":
        return 0.0 if np.array_equal(actual, expected) else float("inf")
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    same = (a == e) | (np.isnan(a) & np.isnan(e))
    if same.all():
        return 0.0
    if not (np.isfinite(a[~same]).all() and np.isfinite(e[~same]).all()):
        return float("inf")
    scale = np.maximum(np.abs(e), floor * np.abs(e[np.isfinite(e)]).max())
    with np.errstate(divide="ignore"):
        return float((np.abs(a - e)[~same] / scale[~same]).max())
