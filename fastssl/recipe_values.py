"""One recipe value against its declared type: exact where it matters, friendly where nothing can be lost.

A whole number is accepted for a float and ``1e6`` for an int; text is never a bool, a bool is never a number, NaN and infinity are refused.
"""

from __future__ import annotations

import math
import re
import types
import typing
from typing import Any

from fastssl.errors import nearest

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def show(value: Any) -> str:
    """A value as a recipe would spell it."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)


def type_name(hint: Any, choices: tuple[Any, ...] | None = None) -> str:
    """What a key accepts, in words: ``number``, ``one of sgd, adamw``, ``number or null``."""
    if choices:
        return "one of " + ", ".join(show(c) if not isinstance(c, str) else c for c in choices)
    if hint is Any:
        return "any value"
    if hint is type(None):
        return "null"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in args)
    if origin is typing.Literal:
        return type_name(None, args)
    if origin is dict:
        return f"mapping of names to {type_name(args[1])}"
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}" if args else "list"
    return {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "mapping", list: "list", tuple: "list"}.get(hint, str(hint))


def coerce(value: Any, hint: Any, choices: tuple[Any, ...] | None = None) -> Any:
    """``value`` as the type ``hint`` (one of ``choices`` if given); raises ValueError("must be ...") when it is not one."""
    if choices:
        if not any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in choices):
            raise ValueError(f"must be {type_name(hint, choices)}{nearest(str(value), [str(c) for c in choices])}")
        return value
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, hint, args)
    if origin is typing.Literal:
        return coerce(value, None, args)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise ValueError(f"must be a {type_name(hint)}")
        return {k: _entry(v, args[1] if args else Any, k) for k, v in value.items()}
    if origin in (list, tuple) or hint in (list, tuple):
        return _sequence(value, hint, origin or hint, args)
    return _scalar(value, hint)


def _one_of(value: Any, hint: Any, args: tuple[Any, ...]) -> Any:
    if value is None and type(None) in args:
        return None
    for arg in args:
        try:
            return coerce(value, arg)
        except ValueError:
            continue
    raise ValueError(f"must be {type_name(hint)}")


def _entry(value: Any, hint: Any, name: Any) -> Any:
    try:
        return coerce(value, hint)
    except ValueError as error:
        raise ValueError(f"entry {name!r} = {show(value)} {error}") from None


def _sequence(value: Any, hint: Any, origin: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"must be a {type_name(hint)}")
    fixed = origin is tuple and args and args[-1] is not Ellipsis
    if fixed and len(args) != len(value):
        raise ValueError(f"must have {len(args)} entries, not {len(value)}")
    hints = args if fixed else [args[0] if args else Any] * len(value)
    return origin(_entry(v, h, i) for i, (v, h) in enumerate(zip(value, hints, strict=True)))


def _scalar(value: Any, hint: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if hint is float:
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value, number = float(value), True
        if number and math.isfinite(value):
            return float(value)
    if hint is str:
        if isinstance(value, str):
            return value
        if number or isinstance(value, bool):
            raise ValueError("must be text: put it in quotes")
    if hint not in (bool, int, float, str) and isinstance(hint, type) and isinstance(value, hint):
        return value
    article = {int: "a whole number", float: "a finite number"}.get(hint, type_name(hint))
    raise ValueError(f"must be {article}")
