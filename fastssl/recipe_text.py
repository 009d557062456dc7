"""Recipe text -> located values: a strict YAML reader that remembers the line of every value.

YAML 1.1 reads ``no``, ``off`` and ``on`` as booleans, ``1e-3`` as text and ``010`` as eight.  Recipes are read by the YAML 1.2 rules instead
(only ``true``/``false`` are booleans; ``1e-3`` is a number), so ``precision: no`` and ``capture: off`` mean what they say.  Repeated keys,
anchors and aliases are errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from fastssl.errors import RecipeError

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Given:
    """A value as somebody wrote it.

    ``value`` is a Python scalar or list, or ``dict[str, Given]`` for a mapping; ``origin`` is "recipe FILE", "extends FILE" or "command line";
    ``where`` is the origin's place for messages ("FILE, line 3"); ``text`` is a scalar's own spelling.
    """

    value: Any
    origin: str
    where: str
    text: str | None = None

    def plain(self) -> Any:
        """The value without locations."""
        return {k: v.plain() for k, v in self.value.items()} if isinstance(self.value, dict) else self.value


class MissingBlank(RecipeError):
    """``{width:8}``: valid YAML for a key "width:8" without a value, which nobody means."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core rules for plain scalars, and without aliases."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed here; use extends", self.peek_event().start_mark)
        return super().compose_node(parent, index)


_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"""^[-+]?(?: [0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?   # 1. 1.5 1.5e-3
    | \.[0-9]+(?:[eE][-+]?[0-9]+)?                           # .5 .5e3
    | [0-9][0-9_]*[eE][-+]?[0-9]+                            # 1e-3, which YAML 1.1 takes for text
    | \.(?:inf|Inf|INF) )$ | ^\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever either YAML 1.1 or our reader would take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'  # escapes line separators and control characters, which plain style would lose
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _convert(node: yaml.Node, loader: _Loader, origin: str, place: str, lines: bool) -> Given:
    where = f"{place}, line {node.start_mark.line + 1}" if lines else place
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Given] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            at = f"{place}, line {key_node.start_mark.line + 1}" if lines else place
            if not isinstance(key, str):
                raise RecipeError(f"{at}: the key {key!r} must be text")
            if key in values:
                raise RecipeError(f"{at}: the key {key!r} is given twice (first at {values[key].where}); keep one")
            name, colon, rest = key.partition(":")
            nothing = isinstance(value_node, yaml.ScalarNode) and not value_node.value and value_node.style is None  # not even quotes
            if name and colon and rest and nothing and key_node.style is None:
                raise MissingBlank(f"{at}: {key!r} is a key without a value; YAML needs a blank after ':', so write {name}: {rest.strip()}")
            found = _convert(value_node, loader, origin, place, lines)
            values[key] = Given(found.value, origin, at, found.text)
        return Given(values, origin, where)
    if isinstance(node, yaml.SequenceNode):
        return Given([_convert(item, loader, origin, place, lines).plain() for item in node.value], origin, where)
    return Given(loader.construct_object(node, deep=True), origin, where, node.value)


def parse(text: str, origin: str, place: str, *, lines: bool = True) -> Given:
    """Located values of one YAML document. ``place`` names the file in messages; ``lines=False`` leaves line numbers out.

    Raises RecipeError for bad syntax, repeated or non-text keys, keys like ``width:8`` that lack a blank, aliases and tags.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return Given(None, origin, place, "") if node is None else _convert(node, loader, origin, place, lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{place}, line {mark.line + 1}, column {mark.column + 1}" if mark and lines else place
        raise RecipeError(f"{at}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{place}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def read_layer(path: Path, kind: str) -> dict[str, Given]:
    """Top-level keys of a recipe file; ``kind`` ("recipe" or "extends") becomes part of each value's origin."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    tree = _parsed(text, f"{kind} {path}", str(path))
    if not isinstance(tree.value, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys (key: value lines), not {type(tree.value).__name__}")
    return dict(tree.value)  # callers take keys out


@lru_cache(maxsize=16)
def _parsed(text: str, origin: str, place: str) -> Given:
    """:func:`parse` of a file's text; the variants of one file are read one after the other, and parsing is what takes the time."""
    return parse(text, origin, place)


def parse_override(text: str) -> tuple[str, Given]:
    """``a.b=value`` -> ("a.b", value read as YAML). ``value`` may be empty (null, or empty text where text is expected)."""
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not (name[:1].isalpha() or name[:1] == "_"):
        raise RecipeError(f"{COMMAND_LINE}: {text!r} is not an override; write key=value, for example optim.lr=0.01")
    try:
        found = parse(value, COMMAND_LINE, COMMAND_LINE, lines=False)
    except MissingBlank as error:
        raise RecipeError(f"{COMMAND_LINE}: {name}={value}: {str(error).removeprefix(COMMAND_LINE + ': ')}") from None
    except RecipeError:
        raise RecipeError(f"{COMMAND_LINE}: {name}={value}: the value is not valid YAML; quote it, for example {name}=\"'text'\"") from None
    return name, Given(found.value, found.origin, found.where, value)


def dump(values: dict[str, Any]) -> str:
    """YAML text of plain values, keys in their own order; ``parse`` reads back equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=160, allow_unicode=True)
