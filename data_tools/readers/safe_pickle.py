"""Unpickling published batches without running code that somebody put into them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from fastssl.errors import DataError


class _ArraysOnly(pickle.Unpickler):
    """Plain containers and numpy arrays only."""

    def find_class(self, module: str, name: str):
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} or (module.startswith("numpy") and name == "_reconstruct"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"unexpected {module}.{name}")


def unpickle(file: Path) -> Any:
    """The content of a pickle of containers, strings, numbers and numpy arrays; strings of Python 2 come as bytes.  DataError for anything else."""
    try:
        with open(file, "rb") as handle:
            return _ArraysOnly(handle, encoding="bytes").load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, ImportError, AttributeError, IndexError, KeyError) as error:
        raise DataError(f"{str(file)!r} is missing or damaged ({error}); fetch the collection again") from error
