"""Pixels of a plan in plain torch, on any device: uint8 throughout, normalised once at the end.

Two modes with identical results.  ``grouped`` (CPU) sorts rows by kind of op and works on each group alone, which reads row numbers on the
host.  ``dense`` (accelerators) gives every row every stage with parameters that leave it unchanged: fixed shapes, no host reads.
Mirror and crop only move whole pixels, so they are collected as row and column maps and read from the canvas in one gather.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastssl.augment import geometry, pixels
from fastssl.augment.constants import constant
from fastssl.augment.ops import BLEND, CODE, GEOMETRY, KIND, SPACES, TONE, Space, argument, tables
from fastssl.augment.plan import Plan
from fastssl.augment.policy import Law, Policy, resized_to
from fastssl.augment.resize import resize
from fastssl.errors import DataError

Rows = Tensor | slice


def _update(image: Tensor, chosen_B: Tensor, grouped: bool, compute: Callable[[Rows], Tensor]) -> Tensor:
    """``image`` with the chosen rows replaced by ``compute(rows)``; in place when grouped."""
    if not grouped:
        return torch.where(chosen_B.view(-1, *[1] * (image.dim() - 1)), compute(slice(None)), image)
    rows = chosen_B.nonzero().squeeze(1)
    if rows.numel() == 0:
        return image
    target, new = image.view(image.shape[0], -1), compute(rows).reshape(rows.numel(), -1)
    if target.dtype == torch.uint8 and target.shape[1] % 8 == 0:  # eight pixels at a time: seven times faster than byte by byte
        target, new = target.view(torch.int64), new.view(torch.int64)
    target.index_copy_(0, rows, new)
    return image


def _pick(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


class _Canvas:
    """An image batch on its way through the laws: planar pixels, extents, and pending row and column maps (-1 = fill)."""

    def __init__(self, pixels_BHWC: Tensor, extent_B2: Tensor, policy: Policy, grouped: bool):
        self.image = pixels_BHWC.permute(0, 3, 1, 2)
        self.owned = False  # whether ``image`` may be written to
        self.policy, self.grouped = policy, grouped
        canvas_H, canvas_W = self.image.shape[2:]
        if grouped:
            wrong = ((extent_B2 < 1) | (extent_B2[:, :1] > canvas_H) | (extent_B2[:, 1:] > canvas_W)).any(1).nonzero().flatten().tolist()
            if wrong:
                h, w = extent_B2[wrong[0]].tolist()
                raise DataError(f"row {wrong[0]} of the batch has an extent of {h}x{w} pixels; height must lie in 1..{canvas_H}, width in 1..{canvas_W}")
        # an accelerator cannot report them without a host read; there they are bounded, so that no index leaves the canvas
        self.height, self.width = extent_B2[:, 0].long().clamp(1, canvas_H), extent_B2[:, 1].long().clamp(1, canvas_W)
        # whether every pixel of the canvas is image; known without a device read only on the host
        self.full = grouped and bool((self.height == self.image.shape[2]).all() and (self.width == self.image.shape[3]).all())
        self.maps: list[Tensor] | None = None
        self.fill: tuple[int, ...] | None = None

    def colour(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """One level per channel; a colour becomes its luma on grey images."""
        levels = (value,) * 3 if isinstance(value, int) else value
        if self.policy.channels == 1:
            levels = ((levels[0] * 19595 + levels[1] * 38470 + levels[2] * 7471 + 0x8000) >> 16,)
        return tuple(levels)

    def get_maps(self) -> list[Tensor]:
        if self.maps is None:
            b, _, height, width = self.image.shape
            self.maps = [torch.arange(n, device=self.image.device).unsqueeze(0).expand(b, n) for n in (height, width)]
        return self.maps

    def inside(self) -> Tensor | None:
        if self.full:
            return None
        row = torch.arange(self.image.shape[2], device=self.image.device).view(1, -1, 1)
        col = torch.arange(self.image.shape[3], device=self.image.device).view(1, 1, -1)
        return (row < self.height.view(-1, 1, 1)) & (col < self.width.view(-1, 1, 1))

    def flush(self) -> None:
        """Read the pending maps; afterwards ``image`` belongs to us."""
        if self.maps is not None:
            (rows, cols), self.maps = self.maps, None
            b, c, height, width = self.image.shape
            outside = None
            if self.fill is not None:
                outside = (rows < 0).unsqueeze(2) | (cols < 0).unsqueeze(1)
                rows, cols = rows.clamp_min(0), cols.clamp_min(0)
            index = (rows * width).unsqueeze(2) + cols.unsqueeze(1)
            source = self.image.flatten(2) if self.owned else self.image.permute(0, 2, 3, 1).reshape(b, height * width, c).transpose(1, 2)
            self.image = source.gather(2, index.view(b, 1, -1).expand(b, c, -1)).view(b, c, *index.shape[1:])
            if outside is not None and self.fill is not None:
                self.image = pixels.paint(self.image, outside, self.fill)
                self.fill = None
        elif not self.owned:
            self.image = self.image.contiguous().clone() if self.image.is_contiguous() else self.image.contiguous()
        self.owned = True


def _flip(canvas: _Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    maps = canvas.get_maps()
    cols, last = maps[1], canvas.width.unsqueeze(1) - 1
    place = torch.arange(cols.shape[1], device=cols.device).unsqueeze(0)
    mirrored = cols.flip(1) if canvas.full else cols.gather(1, torch.where(place <= last, last - place, place))
    maps[1] = torch.where(drawn["flip"].unsqueeze(1), mirrored, cols)


def _window(canvas: _Canvas, first_B2: list[Tensor], mode: str, fill: int | tuple[int, ...]) -> None:
    """Cut a size x size window whose top-left lies at ``first`` of the image's coordinates, continued outside by ``mode``."""
    if canvas.fill is not None:
        canvas.flush()
    maps, size = canvas.get_maps(), canvas.policy.size
    for axis, (first, extent) in enumerate(zip(first_B2, (canvas.height, canvas.width), strict=True)):
        place = first.unsqueeze(1) + torch.arange(size, device=first.device).unsqueeze(0)
        last = extent.unsqueeze(1) - 1
        if mode == "reflect":
            period = (2 * last).clamp_min(1)
            place = torch.remainder(place, period)
            source = torch.minimum(place, period - place).clamp_max(last)
        else:
            source = torch.minimum(place.clamp_min(0), last)
        taken = maps[axis].gather(1, source)
        maps[axis] = torch.where(place == source, taken, -1) if mode == "constant" else taken
    if mode == "constant":
        canvas.fill = canvas.colour(fill)
    canvas.height, canvas.width = (torch.full_like(canvas.height, size) for _ in range(2))
    canvas.full = True


def _resize(canvas: _Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    if canvas.maps is not None:
        canvas.flush()
    height, width = resized_to(law, canvas.policy.size)
    canvas.image = resize(canvas.image, canvas.height, canvas.width, height, width, law["mode"], canvas.grouped)
    canvas.height, canvas.width = torch.full_like(canvas.height, height), torch.full_like(canvas.width, width)
    canvas.full = canvas.owned = True


def _center(canvas: _Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    size = canvas.policy.size
    if canvas.full and canvas.maps is None and canvas.image.shape[2:] == (size, size):
        return
    first = [(extent - size).div(2, rounding_mode="floor") for extent in (canvas.height, canvas.width)]
    _window(canvas, first, "constant", law["fill"])


def _pad_crop(canvas: _Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    _window(canvas, [drawn["y"] - law["pad"], drawn["x"] - law["pad"]], law["mode"], law["fill"])


def apply_ops(canvas: _Canvas, code: Tensor, a: Tensor, space: Space, fill: tuple[int, ...]) -> None:
    """One op per row (codes and float64 arguments [B]) on ``canvas.image``, kind by kind: a row belongs to one kind at most."""
    grouped, kind = canvas.grouped, constant(KIND, torch.int64, code.device)[code]
    inside = canvas.inside()

    def move(rows: Rows) -> Tensor:
        mine, h, w = _pick(code, rows), _pick(canvas.height, rows), _pick(canvas.width, rows)
        matrix = geometry.coefficients(mine, _pick(a, rows), h, w)
        matrix = geometry.whole_pixels(matrix, mine, tables(space, code.device)["pixels"][mine])
        sample = geometry.nearest if space.resample == "nearest" else geometry.bilinear
        return sample(_pick(canvas.image, rows), matrix, h, w, fill)

    def tone(rows: Rows) -> Tensor:
        mine, image, mask = _pick(code, rows), _pick(canvas.image, rows), None if inside is None else _pick(inside, rows)

        def contrast_mean(among: Rows) -> Tensor:
            return pixels.mean_luma(_pick(image, among), None if mask is None else _pick(mask, among))

        mean = _update(torch.zeros_like(mine), mine == CODE["Contrast"], grouped, contrast_mean)
        return pixels.look_up(image, pixels.tone_table(mine, _pick(a, rows), mean))

    def histogram(rows: Rows, table: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        image = _pick(canvas.image, rows)
        return pixels.look_up(image, table(image, None if inside is None else _pick(inside, rows)))

    def mix(rows: Rows) -> Tensor:
        extent = (None, None) if canvas.full else (_pick(canvas.height, rows), _pick(canvas.width, rows))
        return pixels.blend_op(_pick(canvas.image, rows), _pick(code, rows), _pick(a, rows), *extent)

    stages: list[tuple[Tensor, Callable[[Rows], Tensor]]] = [
        (kind == GEOMETRY, move),
        (kind == TONE, tone),
        (code == CODE["AutoContrast"], partial(histogram, table=pixels.autocontrast_table)),
        (code == CODE["Equalize"], partial(histogram, table=pixels.equalize_table)),
        (kind == BLEND, mix),
    ]
    for chosen, compute in stages:
        canvas.image = _update(canvas.image, chosen, grouped, compute)


def _randaugment(canvas: _Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    canvas.flush()
    space = SPACES[law["space"]]
    fill = canvas.colour(0)
    if space.fill_mean:
        fill = tuple(round(255 * m) for m in canvas.policy.mean)
    code = torch.where(drawn["applied"], drawn["code"], CODE["Identity"])
    a = argument(space, code, drawn["level"], drawn["sign"])
    for k in range(law["n"]):
        apply_ops(canvas, code[:, k], a[:, k], space, fill)


def _cutout(canvas: _Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    canvas.flush()
    y0, x0, y1, x1 = drawn["box"].unsqueeze(2).unbind(1)
    row = torch.arange(canvas.image.shape[2], device=y0.device).unsqueeze(0)
    col = torch.arange(canvas.image.shape[3], device=y0.device).unsqueeze(0)
    hit = ((row >= y0) & (row <= y1)).to(torch.uint8).unsqueeze(2) * ((col >= x0) & (col <= x1)).to(torch.uint8).unsqueeze(1)
    canvas.image = pixels.paint(canvas.image, hit, canvas.colour(law["fill"]))


LAWS: dict[str, Callable[[_Canvas, Law, dict[str, Tensor]], None]] = {
    "resize": _resize,
    "center": _center,
    "flip": _flip,
    "pad_crop": _pad_crop,
    "randaugment": _randaugment,
    "cutout": _cutout,
    "cutout_fraction": _cutout,
}


def render_uint8(policy: Policy, plan: Plan, pixels_BHWC: Tensor, extent_B2: Tensor, *, mode: str | None = None) -> Tensor:
    """The views before normalisation: uint8 [B, C, size, size].  ``mode``: grouped, dense or None (grouped on the CPU)."""
    if pixels_BHWC.dtype != torch.uint8 or pixels_BHWC.dim() != 4 or pixels_BHWC.shape[3] != policy.channels:
        raise DataError(f"canvases must be uint8 [B, H, W, {policy.channels}], got {pixels_BHWC.dtype} {list(pixels_BHWC.shape)}")
    grouped = pixels_BHWC.device.type == "cpu" if mode is None else mode == "grouped"
    canvas = _Canvas(pixels_BHWC, extent_B2, policy, grouped)
    for law, drawn in zip(policy.laws, plan.laws, strict=True):
        LAWS[law.name](canvas, law, drawn)
    canvas.flush()
    return canvas.image


def normalise(policy: Policy, image_BCHW: Tensor, out_BCHW: Tensor) -> Tensor:
    """out = image * 1/(255 std) - mean/std, computed in float32, written into ``out_BCHW`` (float32, bfloat16 or float16)."""
    b, c, height, width = image_BCHW.shape
    # constants repeated along a row of pixels keep the innermost loop long; channels are innermost in memory
    scale = constant(tuple(1 / (255 * s) for s in policy.std) * width, torch.float32, image_BCHW.device)
    shift = constant(tuple(-m / s for m, s in zip(policy.mean, policy.std, strict=True)) * width, torch.float32, image_BCHW.device)
    direct = out_BCHW.dtype == torch.float32 and out_BCHW.is_contiguous(memory_format=torch.channels_last)
    buffer = out_BCHW if direct else torch.empty(b, c, height, width, device=image_BCHW.device, memory_format=torch.channels_last)
    buffer.copy_(image_BCHW)
    buffer.permute(0, 2, 3, 1).view(b * height, width * c).mul_(scale).add_(shift)
    return out_BCHW if direct else out_BCHW.copy_(buffer)


def render(policy: Policy, plan: Plan, pixels_BHWC: Tensor, extent_B2: Tensor, out_BCHW: Tensor, *, mode: str | None = None) -> Tensor:
    """Render and normalise into ``out_BCHW``; returns it."""
    image = render_uint8(policy, plan, pixels_BHWC, extent_B2, mode=mode)
    if out_BCHW.shape != image.shape:
        raise DataError(f"the output buffer has shape {list(out_BCHW.shape)}, the views {list(image.shape)}")
    return normalise(policy, image, out_BCHW)
