"""What a view is: an immutable list of named laws with checked options, from a recipe's name or YAML list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastssl.augment.ops import SPACES
from fastssl.errors import RecipeError, nearest


@dataclass(frozen=True)
class Option:
    """A law's option: its default, what values it takes (text for the error message) and the check."""

    default: Any
    takes: str
    check: Any


def _number(low: float, high: float) -> Any:
    return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and low <= v <= high


def _whole(low: int, high: int) -> Any:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _choice(*names: str) -> Any:
    return lambda v: v in names


def _colour(v: Any) -> bool:
    level = _whole(0, 255)
    return level(v) or (isinstance(v, (list, tuple)) and len(v) == 3 and all(level(x) for x in v))


_COLOUR = "a grey level 0..255 or three of them"
PROBABILITY = "a probability 0..1"
_SIDE = Option(None, "a whole number of pixels 1..4096, or null for the view's side", lambda v: v is None or _whole(1, 4096)(v))
LAWS: dict[str, dict[str, Option]] = {
    # Resize the whole image to height x width pixels, or size x size (default: the view's size), whatever its aspect ratio: Pillow's antialiased
    # filter. Comes before the crop; where it leaves a size other than the view's and no crop follows, `center` does. Draws nothing.
    "resize": {"size": _SIDE, "height": _SIDE, "width": _SIDE, "mode": Option("bicubic", "bilinear or bicubic", _choice("bilinear", "bicubic"))},
    # Place the image in the middle of the size x size view; crop what is larger, fill around what is smaller. Draws nothing.
    "center": {"fill": Option(0, _COLOUR, _colour)},
    # Mirror left-right with probability p.
    "flip": {"p": Option(0.5, PROBABILITY, _number(0, 1))},
    # Pad every side by `pad` pixels, then cut a size x size window whose offset is uniform on all whole-pixel positions.
    "pad_crop": {
        "pad": Option(4, "a whole number of pixels 0..1024", _whole(0, 1024)),
        "mode": Option("reflect", "reflect, edge or constant", _choice("reflect", "edge", "constant")),
        "fill": Option(0, _COLOUR, _colour),
    },
    # n ops of the space, uniform with replacement, each applied with probability p at a drawn level.
    "randaugment": {
        "space": Option("mc", "one of " + ", ".join(SPACES), _choice(*SPACES)),
        "n": Option(2, "a whole number 1..16", _whole(1, 16)),
        "p": Option(0.5, PROBABILITY, _number(0, 1)),
    },
    # A filled square of `side` + 1 pixels (its end is included, as published): centre x ~ U(0, W), x0 = trunc(max(0, x - side / 2)),
    # x1 = trunc(min(W, x0 + side)); near the left and top edges the square is shifted, at the others cut. The law is meant for images of twice the
    # side or more: with side >= image (16 on digits of 16 pixels or less) it covers most of the image and often all of it; give a smaller side there.
    "cutout": {
        "side": Option(16, "an even number of pixels 2..1024", lambda v: _whole(2, 1024)(v) and v % 2 == 0),
        "fill": Option(127, _COLOUR, _colour),
    },
    # The same with a drawn side: v ~ U(0, most) of the width, and an end that is truncated only when it is painted.
    "cutout_fraction": {
        "most": Option(0.5, "a share of the width 0..1", _number(0, 1)),
        "fill": Option([125, 123, 114], _COLOUR, _colour),
    },
}
CROPS = ("center", "pad_crop")

_WEAK: list[dict[str, Any]] = [{"flip": {"p": 0.5}}, {"pad_crop": {"pad": 4, "mode": "reflect"}}]
_STRONG: list[dict[str, Any]] = [{"randaugment": {"space": "mc", "n": 2, "p": 0.5}}, {"cutout": {"side": 16, "fill": 127}}]
_TORCHSSL: list[dict[str, Any]] = [{"randaugment": {"space": "torchssl", "n": 3, "p": 1.0}}, {"cutout_fraction": {"most": 0.5}}]
POLICIES: dict[str, list[dict[str, Any]]] = {
    "plain": [{"center": {}}],
    "flip": [{"center": {}}, {"flip": {"p": 0.5}}],
    # FixMatch (arXiv:2001.07685): weak = mirror and shifted crop; strong = weak, RandAugment, cutout.
    "fixmatch_weak": _WEAK,
    "fixmatch_strong": _WEAK + _STRONG,
    # The same for digits and letters, which a mirror would turn into something else.
    "digits_weak": _WEAK[1:],
    "digits_strong": _WEAK[1:] + _STRONG,
    # TorchSSL/USB's strong view: RandAugment(3) and cutout first, then mirror and crop.
    "torchssl_strong": _TORCHSSL + _WEAK,
    # Evaluation of the transfer-learning library: squash to 256 x 256 and keep the middle (size 224), or enlarge CIFAR to the view (size 224).
    "tllib_eval": [{"resize": {"size": 256, "mode": "bicubic"}}, {"center": {}}],
    "tllib_cifar_eval": [{"resize": {"mode": "bicubic"}}],
}


@dataclass(frozen=True)
class Law:
    """One law of a policy: its registered name and all its options, defaults included."""

    name: str
    options: tuple[tuple[str, Any], ...]

    def __getitem__(self, option: str) -> Any:
        return dict(self.options)[option]


@dataclass(frozen=True)
class Policy:
    """Laws in the order in which they act, and the view they make: size x size pixels, normalised by mean and std (in 0..1) per channel."""

    name: str
    laws: tuple[Law, ...]
    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every option written out; ``build_policy(d["laws"], ...)`` makes an equal policy but for the name."""
        laws = [{law.name: {k: list(v) if isinstance(v, tuple) else v for k, v in law.options}} for law in self.laws]
        return {"name": self.name, "laws": laws, "size": self.size, "channels": self.channels, "mean": list(self.mean), "std": list(self.std)}


def resized_to(law: Law, size: int) -> tuple[int, int]:
    """(height, width) in pixels that a ``resize`` law makes of any image, in a policy whose view is ``size`` pixels."""
    side = law["size"] or size
    return law["height"] or side, law["width"] or side


def _build_law(entry: Any, where: str) -> Law:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise RecipeError(f"{where}: each law is `name: {{options}}`, for example {{flip: {{p: 0.5}}}}, got {entry!r}")
    ((name, options),) = entry.items()
    if name not in LAWS:
        hint = " (YAML needs a blank after ':', as in {flip: {p: 0.5}})" if ":" in str(name) else nearest(str(name), LAWS)
        raise RecipeError(f"{where}: unknown law {name!r}{hint}; known laws: {', '.join(LAWS)}")
    known = LAWS[name]
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise RecipeError(f"{where}: the options of law {name!r} must be a mapping, got {options!r}; its options: {', '.join(known)}")
    for key, value in options.items():
        if key not in known:
            raise RecipeError(f"{where}: law {name!r} has no option {key!r}{nearest(str(key), known)}; its options: {', '.join(known)}")
        if not known[key].check(value):
            raise RecipeError(f"{where}: option {name}.{key} takes {known[key].takes}, got {value!r}")
    if name == "resize" and (options.get("size") is not None) + (options.get("height") is not None or options.get("width") is not None) > 1:
        raise RecipeError(f"{where}: resize takes size, or height and width, not both; got {dict(options)!r}")
    if name == "resize" and (options.get("height") is None) != (options.get("width") is None):
        raise RecipeError(f"{where}: resize takes height and width together; got {dict(options)!r}")
    merged = {key: options.get(key, option.default) for key, option in known.items()}
    return Law(name, tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in merged.items()))


def build_policy(spec: str | Sequence[Any], *, size: int, channels: int, mean: Sequence[float], std: Sequence[float]) -> Policy:
    """A policy from its name in ``POLICIES`` or from a list of ``{law: {option: value}}``.

    ``size`` is the side of the square view in pixels, ``channels`` 1 or 3, ``mean`` and ``std`` (> 0) per channel in 0..1.
    A law is ``{law: {option: value}}``, or its bare name for the defaults.
    A policy without a crop law gets ``center``, after its last ``resize`` or else first; one with two crops is refused.  Raises RecipeError naming
    the nearest valid name.
    """
    if isinstance(spec, str):
        if spec not in POLICIES:
            raise RecipeError(f"unknown augmentation policy {spec!r}{nearest(spec, POLICIES)}; known: {', '.join(POLICIES)}, or a list of {{law: options}}")
        name, entries = spec, list[Any](POLICIES[spec])
    elif isinstance(spec, Sequence):
        name, entries = "custom", list(spec)
    else:
        raise RecipeError(f"an augmentation policy is a name ({', '.join(POLICIES)}) or a list of {{law: options}}, got {spec!r}")
    laws = [_build_law(entry, f"augmentation policy {name!r}, law {i + 1}") for i, entry in enumerate(entries)]
    crops = [law.name for law in laws if law.name in CROPS]
    if len(crops) > 1:
        raise RecipeError(f"augmentation policy {name!r} crops {len(crops)} times ({', '.join(crops)}); keep one")
    resizes = [i for i, law in enumerate(laws) if law.name == "resize"]
    if not crops:
        laws.insert(resizes[-1] + 1 if resizes else 0, _build_law("center", name))
    elif resizes and any(law.name in CROPS for law in laws[: resizes[-1]]):
        raise RecipeError(f"augmentation policy {name!r} resizes after {crops[0]}, which has cut the view's pixels already; put resize before it")
    if channels not in (1, 3):
        raise RecipeError(f"augmentation works on images of 1 or 3 channels, got {channels}")
    if not _whole(1, 4096)(size):
        raise RecipeError(f"augment.size must be a whole number of pixels 1..4096, got {size!r}")
    if len(mean) != channels or len(std) != channels or any(s <= 0 for s in std):
        raise RecipeError(f"normalisation needs {channels} means and {channels} positive standard deviations, got mean={list(mean)} std={list(std)}")
    return Policy(name, tuple(laws), size, channels, tuple(float(m) for m in mean), tuple(float(s) for s in std))
