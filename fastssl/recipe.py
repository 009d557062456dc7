"""Recipes: schema defaults <- one base file (``extends:``) <- the recipe file <- dotted overrides; typed, strict, every value with its origin.

    resolved = resolve("cifar10/fixmatch_4000", ["optim.lr=0.01", "seed=1"])
    resolved.recipe.optim.lr        # 0.01
    resolved.origins["optim.lr"]    # "command line"

``name`` and ``title`` describe one file, so they are not inherited; a recipe without a name is called like its file.  A layer that names
another method starts from that method's own defaults.  Mapping-valued keys (``model.options``) are replaced as a whole by a file; an override may
set one entry (``model.options.dropout=0.1``).  Everything wrong is a RecipeError that names the place, the key, the value and the nearest valid one.
"""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastssl.errors import FastSSLError, RecipeError, nearest
from fastssl.recipe_checks import check, value_of
from fastssl.recipe_notes import field_notes
from fastssl.recipe_text import COMMAND_LINE, Given, dump, parse_override, read_layer
from fastssl.recipe_values import coerce, show, type_name
from fastssl.recipe_variants import layers_of, pop_variants, split_name
from fastssl.schema import MethodSpec, Recipe

NOT_INHERITED = ("name", "title")

NOT_IN_DIGEST = (
    "name", "title", "runs_dir",  # what a run is called and where it lies
    "data.ahead", "data.workers", "data.stall_timeout_s", "data.device_resident",  # when pixels are read, not which
    "train.threads",  # up to the order of floating-point sums
    "checkpoint.every", "checkpoint.keep", "log.every", "log.trackers", "log.project",  # what is written down
)  # fmt: skip
"""Keys that do not change the numbers of a run: two recipes that differ only here have one digest, and a run may resume across them."""


@dataclass(frozen=True)
class Resolved:
    """A recipe with the origin of every dotted key: "default", "recipe FILE", "extends FILE" or "command line"."""

    recipe: Recipe
    origins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyInfo:
    """One dotted key as ``config show`` prints it: resolved ``value``, ``default`` (None when there is none), accepted type in words, help."""

    key: str
    value: Any
    default: Any
    type: str
    help: str


_SECTIONS: dict[str, Any] = {n: h for n, h in typing.get_type_hints(Recipe).items() if is_dataclass(h) and h is not MethodSpec}
_LEAVES: dict[str, tuple[Field[Any], Any]] = {}  # dotted key -> (dataclass field, resolved type)
for _f in fields(Recipe):
    if _f.name in _SECTIONS:
        _hints = typing.get_type_hints(_SECTIONS[_f.name])
        _LEAVES.update({f"{_f.name}.{g.name}": (g, _hints[g.name]) for g in fields(_SECTIONS[_f.name])})
    elif _f.name != "method":
        _LEAVES[_f.name] = (_f, typing.get_type_hints(Recipe)[_f.name])


def schema_keys() -> list[str]:
    """Every dotted key of the schema except the method's own, in schema order."""
    return list(_LEAVES)


def resolve(path: str | Path, overrides: Sequence[str] = ()) -> Resolved:
    """Read a recipe file (a path, or a short name below recipes/, then ``@VARIANT`` where it has some) and apply overrides ``a.b=value``.

    Raises RecipeError.
    """
    text, variant = split_name(str(path))
    file = find_recipe(text)
    top = read_layer(file, "recipe")
    given: dict[str, Given] = {}
    base, variants = top.pop("extends", None), {}
    if base is not None:
        layer = _read_base(file, base)
        variants = pop_variants(layer)
        _merge(given, {k: v for k, v in _flatten(layer).items() if k not in NOT_INHERITED})
    own = pop_variants(top)
    chosen = layers_of(variant, {**{k: v for k, v in variants.items() if k.startswith("_")}, **own}, text)
    _merge(given, _flatten(top))
    name = f"{file.stem}_{variant}".replace("=", "") if variant else file.stem
    given.setdefault("name", Given(name, f"recipe {file}", str(file), name))
    if variant and "name" in top:
        given["name"] = Given(f"{top['name'].plain()}_{variant}".replace("=", ""), top["name"].origin, top["name"].where)
    if variant and "title" in top:
        given["title"] = Given(f"{top['title'].plain()}, {variant}", top["title"].origin, top["title"].where)
    for layer in chosen:
        _merge(given, _flatten(layer))
    _merge(given, _flatten_overrides(overrides, given))
    return _build(given, str(path) if variant else str(file))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """``resolve(...).recipe``."""
    return resolve(path, overrides).recipe


def recipe_from_dict(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from nested plain values (what ``to_dict`` returns); checked like a file."""

    def located(value: Any) -> Given:
        inner = {str(k): located(v) for k, v in value.items()} if isinstance(value, Mapping) else value
        return Given(inner, "recipe dict", "recipe dict")

    given = _flatten(located(values).value)
    _merge(given, _flatten_overrides(overrides, given))
    return _build(given, "recipe dict").recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested plain values (dicts, lists, scalars) with every key; ``method`` is flat: ``{"name": ..., **config}``."""
    spec = recipe.method
    options = asdict(spec.config) if is_dataclass(spec.config) and not isinstance(spec.config, type) else dict(spec.config or {})
    out: dict[str, Any] = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name != "method" and f.name not in _SECTIONS}
    out["method"] = {"name": spec.name, **options}
    out.update({name: asdict(getattr(recipe, name)) for name in _SECTIONS})
    return _plain(out)


def dump_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it gives an equal recipe."""
    return dump(to_dict(recipe))


def config_digest(recipe: Recipe) -> str:
    """sha256 (hex) of the resolved values without ``NOT_IN_DIGEST``: equal digests promise equal numbers on equal data and software."""
    values = to_dict(recipe)
    for key in NOT_IN_DIGEST:
        section, _, name = key.partition(".")
        (values[section] if name else values).pop(name or section)
    values = {k: v for k, v in values.items() if v != {}}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def describe(recipe: Recipe) -> list[KeyInfo]:
    """Every key with value, default, type and help, in schema order with the method's own keys first."""
    name = KeyInfo("method.name", recipe.method.name, None, "one of the names in `fastssl methods`", "the training objective")
    infos = [_info(k, f, hint, value_of(recipe, k), str(f.metadata.get("help", ""))) for k, (f, hint) in _LEAVES.items()]
    return [name, *describe_config(recipe.method.config), *infos]


def describe_config(config: Any) -> list[KeyInfo]:
    """The keys ``method.*`` of a method's Config instance; their help is the field's metadata or the comment behind it."""
    (options, hints), notes = _config_fields(type(config)), field_notes(type(config))
    return [_info(f"method.{n}", f, hints[n], getattr(config, n), notes[n]) for n, f in options.items()]


def find_recipe(path: str | Path) -> Path:
    """The file behind a path or a short name (``cifar10/fixmatch_4000``: below ./recipes, then below the project's own recipes/)."""
    text = str(path)
    roots = [Path("."), Path("recipes"), Path(__file__).resolve().parent.parent / "recipes"]
    for root in roots:
        for suffix in ("", ".yaml", ".yml"):
            candidate = root / (text + suffix)
            if candidate.is_file():
                return candidate
    known = sorted({p.relative_to(r).with_suffix("").as_posix() for r in roots[1:] if r.is_dir() for p in r.rglob("*.yaml")})
    raise RecipeError(f"no recipe {text!r}{nearest(text, known)}; give a path to a .yaml file, or a name from `fastssl recipes`")


def _read_base(file: Path, base: Given) -> dict[str, Given]:
    if not isinstance(base.value, str) or not base.value:
        raise RecipeError(f"{base.where}: extends = {show(base.plain())} must be the path of one recipe, relative to this file")
    target = file.parent / base.value
    if not target.is_file():
        raise RecipeError(f"{base.where}: extends = {base.value!r}: no such file {target}{nearest(base.value, [p.name for p in target.parent.glob('*.yaml')])}")
    layer = read_layer(target, "extends")
    if "extends" in layer:
        raise RecipeError(f"{layer['extends'].where}: extends = {layer['extends'].plain()!r}: {target} is itself extended by {file}; one level is allowed")
    return layer


def _flatten(tree: Mapping[str, Given]) -> dict[str, Given]:
    """Nested values of one layer -> dotted schema keys; unknown keys are errors. Keys of ``method`` are checked once the method is known."""
    flat: dict[str, Given] = {}
    for key, entry in tree.items():
        if key == "method" and not isinstance(entry.value, dict):
            flat["method.name"] = entry
        elif key in _SECTIONS or key == "method":
            if entry.value is not None and not isinstance(entry.value, dict):
                raise RecipeError(f"{entry.where}: {key} = {show(entry.plain())} must be a mapping of keys, such as {_example(key)}")
            for name, value in (entry.value or {}).items():
                flat[f"{key}.{name}"] = value
        else:
            flat[key] = entry
    for key, entry in flat.items():
        if key not in _LEAVES and not key.startswith("method."):
            raise _unknown(key, entry)
    return flat


def _flatten_overrides(overrides: Sequence[str], given: Mapping[str, Given]) -> dict[str, Given]:
    """Overrides -> dotted schema keys; the last one wins. ``key.entry=value`` sets one entry of a mapping-valued key."""
    flat: dict[str, Given] = {}
    for text in overrides:
        key, value = parse_override(text)
        mapping = next((k for k, (_, hint) in _LEAVES.items() if typing.get_origin(hint) is dict and key.startswith(k + ".")), None)
        if mapping:
            lower = flat.get(mapping) or given.get(mapping)
            entries = lower.value if lower and isinstance(lower.value, dict) else {}
            flat[mapping] = Given({**entries, key[len(mapping) + 1 :]: value}, COMMAND_LINE, COMMAND_LINE)
        elif key in _LEAVES or key.startswith("method."):
            flat[key] = value
        else:
            flat.update(_flatten({key: value}))
    return flat


def _merge(lower: dict[str, Given], layer: Mapping[str, Given]) -> None:
    """Put ``layer`` over ``lower`` in place; a layer that names another method drops the options given for the old one."""
    named = layer.get("method.name")
    if named and "method.name" in lower and lower["method.name"].plain() != named.plain():
        for key in [k for k in lower if k.startswith("method.")]:
            del lower[key]
    lower.update(layer)


def _build(given: Mapping[str, Given], place: str) -> Resolved:
    spec, method = _method_spec(given, place)
    parts: dict[str, dict[str, Any]] = {"": {}, **{name: {} for name in _SECTIONS}}
    for key, (schema_field, hint) in _LEAVES.items():
        if key in given:
            section, _, name = key.rpartition(".")
            parts[section][name] = _typed(key, given[key], schema_field, hint)
    recipe = Recipe(method=spec, **parts.pop(""), **{name: _SECTIONS[name](**values) for name, values in parts.items()})

    def fail(key: str, why: str) -> NoReturn:
        raise RecipeError(f"{given[key].where if key in given else place}: {key} = {show(_plain(value_of(recipe, key)))} {why}")

    check(recipe, method, fail)
    keys = ["method.name", *(f"method.{f}" for f in _config_fields(type(spec.config))[0]), *_LEAVES]
    return Resolved(recipe, {k: given[k].origin if k in given else "default" for k in keys})


def _method_spec(given: Mapping[str, Given], place: str) -> tuple[MethodSpec, Any]:
    from fastssl import methods  # late: it imports torch, which `--help` and `recipes` do without

    name = given.get("method.name")
    if name is None:
        raise RecipeError(f"{place}: method.name is missing; add method: {{name: fixmatch}}, or another name from `fastssl methods`")
    if not isinstance(name.value, str) or name.value not in methods.names():
        hint = nearest(str(name.plain()), methods.names())
        raise RecipeError(f"{name.where}: method.name = {show(name.plain())} is not a method{hint}; see `fastssl methods`")
    method = methods.get(name.value)
    options, hints = _config_fields(method.Config)
    values = {}
    for key, entry in given.items():
        section, _, option = key.partition(".")
        if section == "method" and option != "name":
            if option not in options:
                hint, known = nearest(option, options), ", ".join(options) or "none"
                raise RecipeError(f"{entry.where}: {key} = {show(entry.plain())}: {name.value} has no option {option!r}{hint}; it has: {known}")
            values[option] = _typed(key, entry, options[option], hints[option])
    try:
        return MethodSpec(name.value, method.Config(**values)), method
    except (FastSSLError, TypeError, ValueError) as error:
        blamed = [o for o in values if re.search(rf"\b{o}\b", str(error))]  # the options that the message names
        givers = [given[f"method.{o}"] for o in blamed] or [name]
        giver = next((g for g in givers if g.origin == COMMAND_LINE), givers[0])
        raise RecipeError(f"{giver.where}: method = {name.value}: {error}") from None


def _config_fields(config: Any) -> tuple[dict[str, Field[Any]], dict[str, Any]]:
    if not is_dataclass(config):
        return {}, {}
    return {f.name: f for f in fields(config) if f.init}, typing.get_type_hints(config)


def _typed(key: str, entry: Given, schema_field: Field[Any], hint: Any) -> Any:
    value, choices = entry.plain(), schema_field.metadata.get("choices")
    if entry.origin == COMMAND_LINE and hint is str and not isinstance(value, str) and entry.text is not None:
        value = entry.text  # a shell has no quotes left: data.split=40 means the text 40
    try:
        return coerce(value, hint, choices)
    except ValueError as error:
        raise RecipeError(f"{entry.where}: {key} = {show(value)} {error}") from None


def _unknown(key: str, entry: Given) -> RecipeError:
    section, _, name = key.rpartition(".")
    same_name = [k for k in _LEAVES if k.rpartition(".")[2] == name]
    siblings = [k for k in _LEAVES if k.rpartition(".")[0] == section]
    hint = nearest(key, siblings) if section else ""
    if not hint:
        hint = f" (did you mean {' or '.join(map(repr, same_name[:3]))}?)" if same_name else nearest(key, [*_LEAVES, *_SECTIONS, "method", "extends"])
    return RecipeError(f"{entry.where}: unknown key {key!r} = {show(entry.plain())}{hint}; `fastssl config show RECIPE` lists every key")


def _example(section: str) -> str:
    first = "name" if section == "method" else next(k for k in _LEAVES if k.startswith(section + ".")).partition(".")[2]
    return f"{section}: {{{first}: ...}}"


def _info(key: str, f: Field[Any], hint: Any, value: Any, meaning: str) -> KeyInfo:
    default = f.default_factory() if f.default_factory is not MISSING else None if f.default is MISSING else f.default
    return KeyInfo(key, _plain(value), _plain(default), type_name(hint, f.metadata.get("choices")), meaning)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
