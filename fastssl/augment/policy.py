"""What a view is: an immutable list of named laws with checked options, from a recipe's name or YAML list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastssl.augment.ops import SPACES
from fastssl.augment.policies import POLICIES
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


def _range(low: float, high: float) -> Any:
    number = _number(low, high)
    return lambda v: isinstance(v, (list, tuple)) and len(v) == 2 and all(number(x) for x in v) and v[0] <= v[1]


def _colour(v: Any) -> bool:
    level = _whole(0, 255)
    return level(v) or (isinstance(v, (list, tuple)) and len(v) == 3 and all(level(x) for x in v))


def _padding(v: Any) -> bool:
    return _whole(0, 1024)(v) or (isinstance(v, float) and 0 <= v < 1)


_COLOUR = "a grey level 0..255 or three of them"
PROBABILITY = "a probability 0..1"
_P = Option(0.5, PROBABILITY, _number(0, 1))
_STRENGTH = Option(0.4, "a number 0..1", _number(0, 1))
_RADIUS = "a number of pixels 0..16"
_MODE = _choice("bilinear", "bicubic")
_SIDE = Option(None, "a whole number of pixels 1..4096, or null for the view's side", lambda v: v is None or _whole(1, 4096)(v))
_SHORT = Option(None, "a whole number of pixels 1..4096, or null", lambda v: v is None or _whole(1, 4096)(v))
GEOMETRY = ("per_op", "composed")
LAWS: dict[str, dict[str, Option]] = {
    # Resize the whole image to height x width pixels, or size x size (default: the view's size), whatever its aspect ratio: Pillow's antialiased
    # filter. `short` keeps the ratio: the shorter side of the original image becomes `short` pixels, the longer trunc(short * long / shorter).
    # Where a resize leaves a size other than the view's and no crop follows, `center` does. Draws nothing.
    "resize": {"size": _SIDE, "height": _SIDE, "width": _SIDE, "short": _SHORT, "mode": Option("bicubic", "bilinear or bicubic", _MODE)},
    # Place the image in the middle of the size x size view; crop what is larger (half a pixel rounds to the even offset), fill around what is
    # smaller. Draws nothing.
    "center": {"fill": Option(0, _COLOUR, _colour)},
    # Cut a box and resize it to the view. Up to 10 tries, each with a share of the image's area ~ U(scale) and an aspect ratio (width / height) with
    # log ratio ~ U(log ratio[0], log ratio[1]): w = round(sqrt(area * ratio)), h = round(sqrt(area / ratio)); the first box that fits is placed
    # uniformly on whole pixels. If none fits: the largest box in the middle whose ratio lies within `ratio`. Pixels and sides are those of the
    # original image; on a canvas that was reduced, edges are rounded to the nearest canvas pixel (a half rounds up; at least one pixel is kept).
    # Pixels: Pillow's antialiased resize of the cut box.
    "resized_crop": {
        "scale": Option([0.08, 1.0], "two shares of the area 0 < low <= high <= 1", lambda v: _range(1e-6, 1)(v)),
        "ratio": Option([3 / 4, 4 / 3], "two aspect ratios 0.01 <= low <= high <= 100", _range(0.01, 100)),
        "mode": Option("bilinear", "bilinear or bicubic", _MODE),
    },
    # Mirror left-right with probability p.
    "flip": {"p": Option(0.5, PROBABILITY, _number(0, 1))},
    # Pad every side by `pad` pixels, then cut a size x size window (default: the view's size) whose offset is uniform on all whole-pixel positions.
    "pad_crop": {
        "pad": Option(4, "a whole number of pixels 0..1024, or a share of the window's side below 1 (truncated to pixels)", _padding),
        "mode": Option("reflect", "reflect, edge or constant", _choice("reflect", "edge", "constant")),
        "fill": Option(0, _COLOUR, _colour),
        "size": _SIDE,
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
    # With probability p: brightness, contrast, saturation and hue in an order drawn uniformly from the 24. Factors ~ U(max(0, 1 - x), 1 + x) for the
    # blends of ops.py's Brightness, Contrast and Color; hue ~ U(-hue, hue) turns, added to Pillow's HSV hue byte as trunc(255 * hue). A part of 0 is
    # left out; on grey images saturation and hue change nothing.
    "color_jitter": {
        "brightness": _STRENGTH,
        "contrast": _STRENGTH,
        "saturation": _STRENGTH,
        "hue": Option(0.1, "a share of a turn 0..0.5", _number(0, 0.5)),
        "p": Option(0.8, PROBABILITY, _number(0, 1)),
    },
    # With probability p every channel becomes the luma.
    "grayscale": {"p": Option(0.2, PROBABILITY, _number(0, 1))},
    # With probability p Pillow's GaussianBlur, radius ~ U(sigma_low, sigma_high) pixels: three box blurs along x, then three along y.
    "blur": {"p": _P, "sigma_low": Option(0.1, _RADIUS, _number(0, 16)), "sigma_high": Option(2.0, _RADIUS, _number(0, 16))},
    # With probability p: v if v < threshold else 255 - v.
    "solarize": {"threshold": Option(128, "a level 0..256", _whole(0, 256)), "p": Option(0.1, PROBABILITY, _number(0, 1))},
}
CROPS = ("center", "pad_crop", "resized_crop")
COLOUR_PARTS = ("brightness", "contrast", "saturation", "hue")  # color_jitter's, in the order of its factors


@dataclass(frozen=True)
class Law:
    """One law of a policy: its registered name and all its options, defaults included."""

    name: str
    options: tuple[tuple[str, Any], ...]

    def __getitem__(self, option: str) -> Any:
        return dict(self.options)[option]


@dataclass(frozen=True)
class Policy:
    """Laws in the order in which they act, and the view they make: size x size pixels, normalised by mean and std (in 0..1) per channel.

    ``geometry``: how often pixels are resampled. ``per_op`` as published, once for each law and op that moves them; ``composed`` once for all.
    """

    name: str
    laws: tuple[Law, ...]
    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    geometry: str = "per_op"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every option written out; ``build_policy(d["laws"], ...)`` makes an equal policy but for the name."""
        laws = [{law.name: {k: list(v) if isinstance(v, tuple) else v for k, v in law.options}} for law in self.laws]
        stats = {"mean": list(self.mean), "std": list(self.std)}
        return {"name": self.name, "laws": laws, "size": self.size, "channels": self.channels, **stats, "geometry": self.geometry}


def resized_to(law: Law, size: int) -> tuple[int, int]:
    """(height, width) in pixels that a ``resize`` law without ``short`` makes of any image, in a policy whose view is ``size`` pixels."""
    side = law["size"] or size
    return law["height"] or side, law["width"] or side


def cropped_to(law: Law, size: int) -> int:
    """The side in pixels of the square that a crop law cuts, in a policy whose view is ``size`` pixels."""
    return law["size"] or size if law.name == "pad_crop" else size


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
    sides = [options.get("size") is not None, options.get("short") is not None, options.get("height") is not None or options.get("width") is not None]
    if name == "resize" and sum(sides) > 1:
        raise RecipeError(f"{where}: resize takes one of size, short, or height and width, not both; got {dict(options)!r}")
    if name == "resize" and (options.get("height") is None) != (options.get("width") is None):
        raise RecipeError(f"{where}: resize takes height and width together; got {dict(options)!r}")
    merged = {key: options.get(key, option.default) for key, option in known.items()}
    if name == "blur" and merged["sigma_low"] > merged["sigma_high"]:
        raise RecipeError(f"{where}: blur.sigma_low {merged['sigma_low']} exceeds blur.sigma_high {merged['sigma_high']}")
    return Law(name, tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in merged.items()))


def _in_pixels(law: Law, size: int) -> Law:
    """A padding given as a share becomes whole pixels of this view."""
    pad = dict(law.options).get("pad")
    if not isinstance(pad, float):
        return law
    return Law(law.name, tuple((k, int(pad * cropped_to(law, size)) if k == "pad" else v) for k, v in law.options))


def _check_sizes(laws: Sequence[Law], size: int, name: str) -> None:
    """Follow the image's size through the laws: one crop, nothing resized after it unless it names its own size, and the view's size at the end."""
    where = f"augmentation policy {name!r}"
    crops = [law.name for law in laws if law.name in CROPS]
    if len(crops) > 1:
        raise RecipeError(f"{where} crops {len(crops)} times ({', '.join(crops)}); keep one")
    now: tuple[int, int] | None = None  # (height, width), None while it differs from image to image
    cut = ""
    for law, following in zip(laws, [*laws[1:], None], strict=True):
        if law.name == "resize" and cut:
            raise RecipeError(f"{where} resizes after {cut}, which has cut the view's pixels already; put resize before it")
        if law.name == "resize" and law["short"] is not None:
            if following is None or following.name not in ("center", "pad_crop"):
                raise RecipeError(f"{where}: resize with `short` leaves images of different sizes; center or pad_crop must come next")
            now = None
        elif law.name == "resize":
            now = resized_to(law, size)
        elif law.name in CROPS:
            now = (cropped_to(law, size),) * 2
            cut = "" if law.name == "pad_crop" and law["size"] else law.name
    if now != (size, size):
        made = "different sizes" if now is None else f"{now[0]}x{now[1]} pixels"
        raise RecipeError(f"{where} ends with images of {made}, but the view has {size}x{size}; a crop of another size needs a resize after it")


def build_policy(spec: str | Sequence[Any], *, size: int, channels: int, mean: Sequence[float], std: Sequence[float], geometry: str = "per_op") -> Policy:
    """A policy from its name in ``POLICIES`` or from a list of ``{law: {option: value}}``.

    ``size`` is the side of the square view in pixels, ``channels`` 1 or 3, ``mean`` and ``std`` (> 0) per channel in 0..1.
    A law is ``{law: {option: value}}``, or its bare name for the defaults.  ``geometry``: see :class:`Policy`.
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
    if not _whole(1, 4096)(size):
        raise RecipeError(f"augment.size must be a whole number of pixels 1..4096, got {size!r}")
    if geometry not in GEOMETRY:
        raise RecipeError(f"augment.geometry is one of {', '.join(GEOMETRY)}, got {geometry!r}")
    laws = [_in_pixels(_build_law(entry, f"augmentation policy {name!r}, law {i + 1}"), size) for i, entry in enumerate(entries)]
    if not any(law.name in CROPS for law in laws):
        resizes = [i for i, law in enumerate(laws) if law.name == "resize"]
        laws.insert(resizes[-1] + 1 if resizes else 0, _build_law("center", name))
    _check_sizes(laws, size, name)
    if channels not in (1, 3):
        raise RecipeError(f"augmentation works on images of 1 or 3 channels, got {channels}")
    if len(mean) != channels or len(std) != channels or any(s <= 0 for s in std):
        raise RecipeError(f"normalisation needs {channels} means and {channels} positive standard deviations, got mean={list(mean)} std={list(std)}")
    return Policy(name, tuple(laws), size, channels, tuple(float(m) for m in mean), tuple(float(s) for s in std), geometry)
