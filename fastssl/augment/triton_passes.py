"""From a policy to a list of passes over image batches: what each reads, does and writes.  Pure description: no tensors, no Triton.

Laws are fused as far as each output pixel stays a function of a few input pixels: a mirror and window, one RandAugment op, a box, another mirror
and window make one pass; the last pass normalises.  Resizing takes two passes (x, y), color jitter one, blur two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastssl.augment.ops import SPACES
from fastssl.augment.policy import Law, Policy, cropped_to, resized_to
from fastssl.augment.resize import tap_count
from fastssl.augment.triton_modes import ABSENT, CONSTANT, EDGE, MIRROR, REFLECT
from fastssl.errors import RecipeError

MODES = {"reflect": REFLECT, "edge": EDGE, "constant": CONSTANT}
SUPPORTED = frozenset("resize center resized_crop flip pad_crop randaugment cutout cutout_fraction color_jitter grayscale blur solarize".split())


@dataclass(frozen=True)
class Shape:
    """A batch of images on its way: sides of its buffer; ``full``: every pixel of it is image (else the canvas's extents hold)."""

    height: int
    width: int
    full: bool


@dataclass(frozen=True)
class Move:
    """Mirrors and at most one window: numbers of the laws, padding rule, side of the window (0: none), packed fill."""

    laws: tuple[int, ...] = ()
    mode: int = ABSENT
    side: int = 0
    fill: int = 0


@dataclass(frozen=True)
class Pass:
    """Common to all passes: shapes read and written; whether it writes the normalised view."""

    source: Shape
    out: Shape
    final: bool = False


@dataclass(frozen=True)
class ApplyPass(Pass):
    """Map ``before``, one RandAugment op (law number, slot), a box (law number), map ``after``."""

    before: Move = Move()
    op: tuple[int, int] | None = None
    bilinear: bool = False
    op_fill: int = 0
    box: int | None = None
    box_fill: int = 0
    after: Move = Move()

    @property
    def domain(self) -> Shape:
        """The image that op and box see."""
        side = self.before.side
        return Shape(side, side, True) if side else self.source


@dataclass(frozen=True)
class ResizePass(Pass):
    """One axis of a resize: of the whole image, of a resized_crop's box, or of the middle of an image resized by its shorter side (``center``)."""

    law: int = 0
    along_x: bool = True
    taps: int = 1
    bicubic: bool = False
    center: int | None = None
    mirror: tuple[int, ...] = ()


@dataclass(frozen=True)
class ColourPass(Pass):
    """Mirrors, then color_jitter, grayscale and solarize, each present or not (law numbers), pixel by pixel."""

    before: Move = Move()
    jitter: int | None = None
    grey: int | None = None
    solarize: int | None = None


@dataclass(frozen=True)
class BlurPass(Pass):
    """Three box blurs along one axis; along y then solarize (law numbers)."""

    law: int = 0
    along_x: bool = True
    solarize: int | None = None


def packed(policy: Policy, value: int | tuple[int, ...]) -> int:
    """A colour as R + 256 G + 65536 B; on grey images its luma."""
    r, g, b = (value,) * 3 if isinstance(value, int) else value
    if policy.channels == 1:
        r = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16
    return r + (g << 8) + (b << 16)


def lacking(policy: Policy) -> str:
    """What of a policy these passes cannot do, in words; empty where they do all."""
    for i, law in enumerate(policy.laws):
        if law.name not in SUPPORTED:
            return f"law {law.name!r}"
        if law.name == "resize" and law["short"] is not None:
            following = policy.laws[i + 1] if i + 1 < len(policy.laws) else None
            if following is None or following.name != "center":
                return "law 'resize' with short that is not followed by center"
            if law["short"] < policy.size:
                return f"law 'resize' with short {law['short']} below the view's {policy.size} pixels"
    if policy.geometry != "per_op":
        return f"geometry {policy.geometry!r}"
    return ""


def passes_of(policy: Policy, height: int, width: int) -> list[Pass]:
    """The passes for canvases of ``height`` x ``width`` pixels.  Raises RecipeError naming a law that they lack."""
    missing = lacking(policy)
    if missing:
        raise RecipeError(f"augmentation backend 'triton' lacks {missing} of policy {policy.name!r}; use backend 'reference'")
    builder = _Builder(policy, Shape(height, width, False))
    for number, law in enumerate(policy.laws):
        builder.add(number, law)
    return builder.finish()


class _Builder:
    """Collects laws into the pending pass as long as they fit behind what it holds: map, op, box, map."""

    def __init__(self, policy: Policy, shape: Shape):
        self.policy, self.passes = policy, list[Pass]()
        self.pending = ApplyPass(shape, shape)

    def add(self, number: int, law: Law) -> None:
        if law.name in ("flip", "center", "pad_crop"):
            previous = self.policy.laws[number - 1] if number else None
            if law.name == "center" and previous is not None and previous.name == "resize" and previous["short"] is not None:
                return  # the resize makes the middle only
            self._move(number, law)
        elif law.name == "randaugment":
            self._randaugment(number, law)
        elif law.name in ("cutout", "cutout_fraction"):
            if self.pending.box is not None or self.pending.after.laws:
                self._flush()
            self.pending = replace(self.pending, box=number, box_fill=packed(self.policy, law["fill"]))
        elif law.name in ("resize", "resized_crop"):
            self._resize(number, law)
        elif law.name == "blur":
            self._flush_if_busy()
            shape = self.pending.source
            self.passes += [BlurPass(shape, shape, law=number, along_x=along_x) for along_x in (True, False)]
        else:
            self._colour(number, law)

    def finish(self) -> list[Pass]:
        """All passes, the last of which writes the normalised view."""
        busy, last = self._busy(), self.passes[-1] if self.passes else None
        move = self.pending.before
        only_mirrors = move.mode in (ABSENT, MIRROR) and self.pending.op is None and self.pending.box is None and not self.pending.after.laws
        if isinstance(last, ResizePass) and only_mirrors:
            self.passes[-1] = replace(last, mirror=move.laws, final=True)
        elif isinstance(last, (ColourPass, BlurPass)) and not busy:
            self.passes[-1] = replace(last, final=True)
        else:
            self._flush(final=True)
        return self.passes

    def _busy(self) -> bool:
        return bool(self.pending.before.laws or self.pending.op or self.pending.box is not None or self.pending.after.laws)

    def _flush(self, final: bool = False) -> None:
        domain, after = self.pending.domain, self.pending.after
        out = Shape(after.side, after.side, True) if after.side else domain
        self.passes.append(replace(self.pending, out=out, final=final))
        self.pending = ApplyPass(out, out)

    def _flush_if_busy(self) -> None:
        if self._busy():
            self._flush()

    def _move(self, number: int, law: Law) -> None:
        name = "after" if self.pending.op or self.pending.box is not None else "before"
        move: Move = getattr(self.pending, name)
        side, mode, fill = 0, MIRROR, 0
        if law.name != "flip":
            side, mode = cropped_to(law, self.policy.size), MODES[law["mode"] if law.name == "pad_crop" else "constant"]
            fill = packed(self.policy, law["fill"])
            if law.name == "center" and name == "before" and self.pending.source == Shape(side, side, True):
                return
            if move.side:
                self._flush()
                return self._move(number, law)
        laws = (*move.laws, number)
        move = Move(laws, mode, side, fill) if side else replace(move, laws=laws, mode=move.mode if move.side else MIRROR)
        self.pending = replace(self.pending, before=move) if name == "before" else replace(self.pending, after=move)

    def _randaugment(self, number: int, law: Law) -> None:
        space = SPACES[law["space"]]
        fill = packed(self.policy, 0)
        if space.fill_mean:
            levels = [round(255 * m) for m in self.policy.mean]
            fill = sum(level << (8 * i) for i, level in enumerate(levels))
        for slot in range(law["n"]):
            if self.pending.op is not None or self.pending.box is not None or self.pending.after.laws:
                self._flush()
            self.pending = replace(self.pending, op=(number, slot), bilinear=space.resample == "bilinear", op_fill=fill)

    def _resize(self, number: int, law: Law) -> None:
        self._flush_if_busy()
        source, size = self.pending.source, self.policy.size
        center = None
        if law.name == "resized_crop":
            height = width = size
        elif law["short"] is not None:
            height = width = size
            center = number + 1
        else:
            height, width = resized_to(law, size)
        # the scale of a short-side resize is that of the shorter side, up to rounding: never above longest / short
        goals = (law["short"],) * 2 if center is not None else (height, width)
        bicubic = law["mode"] == "bicubic"
        k_y, k_x = (tap_count(law["mode"], longest, goal) for longest, goal in zip((source.height, source.width), goals, strict=True))
        between, out = Shape(source.height, width, False), Shape(height, width, True)
        self.passes.append(ResizePass(source, between, law=number, along_x=True, taps=k_x, bicubic=bicubic, center=center))
        self.passes.append(ResizePass(between, out, law=number, along_x=False, taps=k_y, bicubic=bicubic, center=center))
        self.pending = ApplyPass(out, out)

    def _colour(self, number: int, law: Law) -> None:
        """color_jitter, grayscale and solarize, in this order, share a pass with the mirrors before them; solarize joins the blur before it."""
        part = {"color_jitter": "jitter", "grayscale": "grey", "solarize": "solarize"}[law.name]
        order = ("jitter", "grey", "solarize")
        last = self.passes[-1] if self.passes and not self._busy() else None
        if part == "solarize" and isinstance(last, BlurPass) and last.solarize is None:
            self.passes[-1] = replace(last, solarize=number)
        elif isinstance(last, ColourPass) and all(getattr(last, later) is None for later in order[order.index(part) :]):
            self.passes[-1] = _with(last, part, number)
        else:
            move = Move()
            if self.pending.op is None and self.pending.box is None and not self.pending.after.laws:
                move, self.pending = self.pending.before, replace(self.pending, before=Move())
                source = self.pending.source
            else:
                self._flush()
                source = self.pending.source
            out = Shape(move.side, move.side, True) if move.side else source
            self.passes.append(_with(ColourPass(source, out, before=move), part, number))
            self.pending = ApplyPass(out, out)


def _with(p: ColourPass, part: str, number: int) -> ColourPass:
    """The pass with one more law: ``part`` is jitter, grey or solarize."""
    change: dict[str, Any] = {part: number}
    return replace(p, **change)
