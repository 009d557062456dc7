"""Errors that users see: one sentence on what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastSSLError(Exception):
    """Base of all errors that are the input's fault; the command line prints them without a traceback and exits with 2."""


class RecipeError(FastSSLError):
    """A recipe or override that does not say what the schema allows."""


class DataError(FastSSLError):
    """A dataset, split or image that cannot be used as asked."""


class CheckpointError(FastSSLError):
    """A checkpoint that is missing, damaged or belongs to another configuration."""


class TrainingError(FastSSLError):
    """Training cannot go on (non-finite loss, stalled data, a lost rank)."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest valid name, or an empty string."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
