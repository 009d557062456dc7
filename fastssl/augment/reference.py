"""Pixels of a plan in plain torch, on any device: uint8 throughout, normalised once at the end.

Three modes.  ``grouped`` sorts rows by kind of op and works on each group alone, which reads row numbers on the host.  ``dense`` (accelerators)
gives every row every stage with parameters that leave it unchanged: fixed shapes, no host reads; its results are identical.  ``fast`` (CPU) is
``grouped`` with torch's own resize kernel (``resize.boxes_fast``: a level off in under 1 % of the values) and float32 blurs (``blur.gaussian_fast``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastssl.augment import blur, geometry, jitter, pixels
from fastssl.augment.canvas import Canvas, Rows, pick, update
from fastssl.augment.constants import constant
from fastssl.augment.ops import CODE, GEOMETRY, KIND, SPACES, TONE, Space, argument, tables
from fastssl.augment.plan import Plan
from fastssl.augment.policy import Law, Policy, cropped_to, resized_to
from fastssl.errors import DataError


def _flip(canvas: Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    canvas.flip(drawn["flip"])


def _whole_image(canvas: Canvas) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    zero = torch.zeros_like(canvas.height)
    return zero, zero, canvas.height, canvas.width


def _resize(canvas: Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    if law["short"] is not None:
        canvas.resize(_whole_image(canvas), (drawn["height"], drawn["width"]), (law["short"],) * 2, law["mode"], equal=False)
    else:
        _resize_all(canvas, _whole_image(canvas), resized_to(law, canvas.policy.size), law["mode"])


def _resize_all(canvas: Canvas, box_4: tuple[Tensor, Tensor, Tensor, Tensor], to: tuple[int, int], mode: str) -> None:
    height, width = (torch.full_like(canvas.height, side) for side in to)
    canvas.resize(box_4, (height, width), to, mode, equal=True)


def _resized_crop(canvas: Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    top, left, height, width = drawn["box"].unbind(1)
    _resize_all(canvas, (top, left, height, width), (canvas.policy.size,) * 2, law["mode"])


def _center(canvas: Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    size = canvas.policy.size
    if canvas.full and canvas.shape() == (size, size):
        return
    canvas.window([geometry.centred(extent, size) for extent in (canvas.height, canvas.width)], size, "constant", law["fill"])


def _pad_crop(canvas: Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    canvas.window([drawn["y"] - law["pad"], drawn["x"] - law["pad"]], cropped_to(law, canvas.policy.size), law["mode"], law["fill"])


def apply_ops(canvas: Canvas, code: Tensor, a: Tensor, space: Space, fill: tuple[int, ...]) -> None:
    """One op per row (codes and float64 arguments [B]) on ``canvas.image``, kind by kind: a row belongs to one kind at most."""
    grouped, kind = canvas.grouped, constant(KIND, torch.int64, code.device)[code]
    inside = canvas.inside()

    def move(rows: Rows) -> Tensor:
        mine, h, w = pick(code, rows), pick(canvas.height, rows), pick(canvas.width, rows)
        matrix = geometry.coefficients(mine, pick(a, rows), h, w)
        matrix = geometry.whole_pixels(matrix, mine, tables(space, code.device)["pixels"][mine])
        if space.resample != "nearest" and canvas.fast and canvas.full:
            return geometry.bilinear_fast(pick(canvas.image, rows), matrix, fill)
        sample = geometry.nearest if space.resample == "nearest" else geometry.bilinear
        return sample(pick(canvas.image, rows), matrix, h, w, fill)

    def tone(rows: Rows) -> Tensor:
        mine, image, mask = pick(code, rows), pick(canvas.image, rows), None if inside is None else pick(inside, rows)

        def contrast_mean(among: Rows) -> Tensor:
            return pixels.mean_luma(pick(image, among), None if mask is None else pick(mask, among))

        mean = update(torch.zeros_like(mine), mine == CODE["Contrast"], grouped, contrast_mean)
        return pixels.look_up(image, pixels.tone_table(mine, pick(a, rows), mean))

    def histogram(rows: Rows, table: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        image = pick(canvas.image, rows)
        return pixels.look_up(image, table(image, None if inside is None else pick(inside, rows)))

    def mix(rows: Rows, base: Callable[[Tensor, Rows], Tensor]) -> Tensor:
        image = pick(canvas.image, rows)
        return pixels.blend(base(image, rows).float(), image.float(), pick(a, rows).float().view(-1, 1, 1, 1))

    def smooth(image: Tensor, rows: Rows) -> Tensor:
        extent = (None, None) if canvas.full else (pick(canvas.height, rows), pick(canvas.width, rows))
        return pixels.smooth(image, *extent)

    stages: list[tuple[Tensor, Callable[[Rows], Tensor]]] = [
        (kind == GEOMETRY, move),
        (kind == TONE, tone),
        (code == CODE["AutoContrast"], partial(histogram, table=pixels.autocontrast_table)),
        (code == CODE["Equalize"], partial(histogram, table=pixels.equalize_table)),
        (code == CODE["Color"], partial(mix, base=lambda image, rows: pixels.luma(image).unsqueeze(1))),
        (code == CODE["Sharpness"], partial(mix, base=smooth)),
    ]
    for chosen, compute in stages:
        canvas.image = update(canvas.image, chosen, grouped, compute)


def _turn(canvas: Canvas, code: Tensor, a: Tensor, space: Space, fill: tuple[int, ...]) -> Tensor:
    """Composed geometry: all affine ops [B, n] with what is pending; returns the codes that are left to do."""
    moves, whole = constant(KIND, torch.int64, code.device)[code] == GEOMETRY, tables(space, code.device)["pixels"]
    matrices = []
    for k in range(code.shape[1]):
        matrix = geometry.coefficients(code[:, k], a[:, k], canvas.height, canvas.width)
        matrices.append(geometry.whole_pixels(matrix, code[:, k], whole[code[:, k]]))
    canvas.turn(matrices, moves.any(1), fill)
    return torch.where(moves, CODE["Identity"], code)


def _randaugment(canvas: Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    space = SPACES[law["space"]]
    fill = canvas.colour(0)
    if space.fill_mean:
        fill = tuple(round(255 * m) for m in canvas.policy.mean)
    code = torch.where(drawn["applied"], drawn["code"], CODE["Identity"])
    a = argument(space, code, drawn["level"], drawn["sign"])
    if canvas.policy.geometry == "composed":
        code = _turn(canvas, code, a, space, fill)
    canvas.flush()
    for k in range(law["n"]):
        apply_ops(canvas, code[:, k], a[:, k], space, fill)


def _cutout(canvas: Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    canvas.flush()
    y0, x0, y1, x1 = drawn["box"].unsqueeze(2).unbind(1)
    row = torch.arange(canvas.image.shape[2], device=y0.device).unsqueeze(0)
    col = torch.arange(canvas.image.shape[3], device=y0.device).unsqueeze(0)
    hit = ((row >= y0) & (row <= y1)).to(torch.uint8).unsqueeze(2) * ((col >= x0) & (col <= x1)).to(torch.uint8).unsqueeze(1)
    canvas.image = pixels.paint(canvas.image, hit, canvas.colour(law["fill"]))


def _color_jitter(canvas: Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    canvas.flush()
    if canvas.grouped:
        jitter.by_image(canvas.image, law, drawn, canvas.inside())
    else:
        canvas.image = jitter.dense(canvas.image, law, drawn, canvas.inside())


def _grayscale(canvas: Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    canvas.flush()
    if canvas.policy.channels == 3:
        canvas.image = update(
            canvas.image, drawn["applied"], canvas.grouped, lambda rows: pixels.luma(pick(canvas.image, rows)).unsqueeze(1).expand(-1, 3, -1, -1)
        )


def _blur(canvas: Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    canvas.flush()

    def smooth(rows: Rows) -> Tensor:
        if canvas.fast and canvas.full and law["sigma_low"] < law["sigma_high"]:  # a fixed radius may meet a half at every other value
            return blur.gaussian_fast(pick(canvas.image, rows), pick(drawn["sigma"], rows))
        extent = (None, None) if canvas.full else (pick(canvas.height, rows), pick(canvas.width, rows))
        return blur.gaussian(pick(canvas.image, rows), pick(drawn["sigma"], rows), law["sigma_high"], *extent)

    canvas.image = update(canvas.image, drawn["applied"], canvas.grouped, smooth)


def _solarize(canvas: Canvas, law: Law, drawn: dict[str, Tensor]) -> None:
    canvas.flush()
    code = torch.where(drawn["applied"], CODE["Solarize"], CODE["Identity"])
    apply_ops(canvas, code, torch.full_like(code, law["threshold"], dtype=torch.float64), SPACES["mc"], (0,) * canvas.policy.channels)


LAWS: dict[str, Callable[[Canvas, Law, dict[str, Tensor]], None]] = {
    "resize": _resize,
    "center": _center,
    "flip": _flip,
    "pad_crop": _pad_crop,
    "randaugment": _randaugment,
    "cutout": _cutout,
    "cutout_fraction": _cutout,
    "resized_crop": _resized_crop,
    "color_jitter": _color_jitter,
    "grayscale": _grayscale,
    "blur": _blur,
    "solarize": _solarize,
}


def render_uint8(policy: Policy, plan: Plan, pixels_BHWC: Tensor, extent_B2: Tensor, *, mode: str | None = None) -> Tensor:
    """The views before normalisation: uint8 [B, C, size, size].  ``mode``: fast, grouped, dense or None (fast on the CPU)."""
    if pixels_BHWC.dtype != torch.uint8 or pixels_BHWC.dim() != 4 or pixels_BHWC.shape[3] != policy.channels:
        raise DataError(f"canvases must be uint8 [B, H, W, {policy.channels}], got {pixels_BHWC.dtype} {list(pixels_BHWC.shape)}")
    if mode is None:
        mode = "fast" if pixels_BHWC.device.type == "cpu" else "dense"
    canvas = Canvas(pixels_BHWC, extent_B2, policy, mode)
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
