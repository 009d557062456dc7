"""Whether an update is recorded as one CUDA graph. Today it never is: this file says so and refuses what it cannot do."""

from __future__ import annotations

from fastssl.errors import RecipeError


def decide_capture(wish: str) -> str:
    """The sentence for the log on how updates run, for ``train.capture`` = ``wish``.

    ``auto`` and ``off`` run eagerly. ``on`` raises :class:`RecipeError`, since running something else than asked would be a lie.
    """
    if wish == "on":
        raise RecipeError("train.capture: on: recording the update as a CUDA graph is not built yet; use 'auto' or 'off' (both run eagerly)")
    return "updates run eagerly (capture is not built yet)" if wish == "auto" else "updates run eagerly (train.capture: off)"
