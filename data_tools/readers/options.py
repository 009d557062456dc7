"""Settings of a reader (``--option KEY=VALUE``) with one error for a wrong value."""

from __future__ import annotations

from collections.abc import Mapping

from fastssl.errors import DataError, nearest


def choice(options: Mapping[str, str], key: str, valid: tuple[str, ...]) -> str:
    """The value of ``key``, one of ``valid``; the first of them where it is not given."""
    value = options.get(key, valid[0])
    if value not in valid:
        raise DataError(f"option {key}={value!r} is unknown{nearest(value, valid)}; it takes {', '.join(valid)}")
    return value


def whole(options: Mapping[str, str], key: str, default: int, low: int, high: int) -> int:
    """The value of ``key`` as a whole number from ``low`` to ``high``."""
    text = options.get(key, str(default))
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise DataError(f"option {key}={text!r} must be a whole number from {low} to {high}")
    return value
