"""Named variants inside a recipe file: small layers that one file offers over itself, chosen as ``FILE@VARIANT``.

    variants:
      _cifar10: {data.path: data/cifar10, augment.weak: tllib_cifar_weak}     # a leading _ : only for others to build on
      cifar10_supervised: {like: [_cifar10], optim.lr: 0.003, method.threshold: 0.7}

Keys are dotted or nested, as on the command line and in a file.  ``like`` names variants of this file, or of the file it extends, that come first, in order.
A file with variants is run as one of them; a variant called ``default`` is taken when none is named.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastssl.errors import RecipeError, nearest
from fastssl.recipe_text import Given
from fastssl.recipe_values import show

DEFAULT = "default"


def split_name(path: str) -> tuple[str, str]:
    """``tllib/fixmatch@cifar10_supervised`` -> (file part, variant, "" when none is named)."""
    file, _, variant = path.partition("@")
    return file, variant


def pop_variants(layer: dict[str, Given]) -> dict[str, Given]:
    """Take ``variants`` out of a layer: name -> located mapping. Raises RecipeError for anything but a mapping of mappings."""
    entry = layer.pop("variants", None)
    if entry is None:
        return {}
    if not isinstance(entry.value, dict):
        raise RecipeError(f"{entry.where}: variants = {show(entry.plain())} must be a mapping of names to keys, such as {{small: {{model.name: small_cnn}}}}")
    for name, variant in entry.value.items():
        if not isinstance(variant.value, dict) and variant.value is not None:
            raise RecipeError(f"{variant.where}: variant {name!r} = {show(variant.plain())} must be a mapping of recipe keys")
    return dict(entry.value)


def public(variants: Mapping[str, Given]) -> list[str]:
    """The names that can be run."""
    return [name for name in variants if not name.startswith("_")]


def layers_of(name: str, variants: Mapping[str, Given], file: str) -> list[dict[str, Given]]:
    """The layers of variant ``name``, lowest first. "" takes ``default``, or nothing where the file has no variants. Raises RecipeError."""
    runnable = public(variants)
    if not name:
        if not runnable:
            return []
        if DEFAULT not in variants:
            raise RecipeError(f"{file} comes in variants; name one as {file}@NAME: {', '.join(runnable)}")
        name = DEFAULT
    if name not in runnable:
        known = f"; known: {', '.join(runnable)}" if runnable else "; the file has none"
        raise RecipeError(f"{file} has no variant {name!r}{nearest(name, runnable)}{known}")
    return _collect(name, variants, ())


def _collect(name: str, variants: Mapping[str, Given], above: tuple[str, ...]) -> list[dict[str, Given]]:
    layer = dict(variants[name].value or {})
    like = layer.pop("like", None)
    names = [] if like is None else like.plain()
    names = [names] if isinstance(names, str) else names
    if like is not None and not isinstance(names, list):
        raise RecipeError(f"{like.where}: like = {show(names)} must be the name of a variant, or a list of names")
    layers: list[dict[str, Given]] = []
    for other in names:
        if like is not None and (not isinstance(other, str) or other not in variants):
            raise RecipeError(f"{like.where}: like = {show(other)} is no variant here{nearest(str(other), variants)}; known: {', '.join(variants)}")
        if other == name or other in above:
            raise RecipeError(f"{variants[name].where}: variant {name!r} is built on itself through {other!r}")
        layers += _collect(other, variants, (*above, name))
    return [*layers, layer]
