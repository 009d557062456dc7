"""MATLAB files of version 5, read by scipy (an optional package)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fastssl.errors import DataError


def read_mat(file: Path | io.BytesIO, names: tuple[str, ...], *, squeeze: bool = True, name: str = "") -> dict[str, Any]:
    """The variables ``names``.  ``squeeze`` drops axes of length 1.  DataError without scipy, for damaged files and where a variable is missing."""
    where = name or str(file)
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f"{where!r} is a MATLAB file; reading it needs the package scipy: pip install scipy") from error
    try:
        found = loadmat(file if isinstance(file, io.BytesIO) else str(file), squeeze_me=squeeze, variable_names=names)
    except FileNotFoundError as error:
        raise DataError(f"{where!r} is missing; fetch the collection again") from error
    except Exception as error:  # its parser lets errors of many kinds through when a file is damaged
        raise DataError(f"{where!r} is damaged or no MATLAB file of version 5 ({type(error).__name__}: {str(error)[:80]}); fetch it again") from error
    missing = [wanted for wanted in names if wanted not in found]
    if missing:
        raise DataError(f"{where!r} lacks the variable {missing[0]!r}; fetch the collection again")
    return {wanted: found[wanted] for wanted in names}
