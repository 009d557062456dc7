"""The register of methods: one module of this package is one method, and the file name is the name users type."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from fastssl.errors import RecipeError, nearest
from fastssl.methods.base import Method

_NOT_METHODS = {"base"}


def names() -> list[str]:
    """Names of all methods, sorted. Reads the package's folder; imports nothing."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_METHODS and not m.name.startswith("_"))


def get(name: str) -> type[Method]:
    """The one :class:`Method` subclass that module ``name`` defines; an unknown name is a :class:`RecipeError` with the nearest valid one."""
    if name not in names():
        raise RecipeError(f"method.name: there is no method {name!r}{nearest(str(name), names())}; the methods are {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    found = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Method) and c.__module__ == module.__name__]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one Method, it defines {[c.__name__ for c in found]}")
    return found[0]
