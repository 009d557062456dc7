"""Small JSON files that carry their own digest, so that damage is an error and never a surprise."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fastssl.errors import DataError


def canonical(value: Any) -> bytes:
    """JSON bytes that equal values share."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """sha256 (hex) of :func:`canonical`."""
    return hashlib.sha256(canonical(value)).hexdigest()


def seal(value: dict[str, Any]) -> bytes:
    """JSON text of ``value`` beside its digest."""
    return (json.dumps({"sha256": digest_of(value), **value}, indent=1, allow_nan=False) + "\n").encode()


def read_sealed(path: Path, mend: str) -> dict[str, Any]:
    """The value of :func:`seal`; DataError, which ends with ``mend``, for a file that is not what was written."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        recorded = value.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}); {mend}") from None
    if digest_of(value) != recorded:
        raise DataError(f"{path} is not what was written (its digest differs); {mend}")
    return value
