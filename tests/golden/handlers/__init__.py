"""One module per family of recorded files. Each has ``HANDLERS``: file-name prefix -> function that replays a file through a Recorder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from tests.golden.recorder import Recorder

Handler = Callable[[Recorder], None]


def handlers() -> dict[str, Handler]:
    """Every known file-name prefix with its handler."""
    found: dict[str, Handler] = {}
    for module in pkgutil.iter_modules(__path__):
        for prefix, handler in importlib.import_module(f"{__name__}.{module.name}").HANDLERS.items():
            if prefix in found:
                raise ValueError(f"two handlers for the prefix {prefix!r}")
            found[prefix] = handler
    return found


def handler_for(stem: str) -> Handler | None:
    """The handler with the longest prefix of a file name (without .npz), or None."""
    known = handlers()
    fitting = [prefix for prefix in known if stem.startswith(prefix)]
    return known[max(fitting, key=len)] if fitting else None
