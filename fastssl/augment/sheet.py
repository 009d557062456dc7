"""A contact sheet: canvases beside the views that policies make of them, each view labelled with the laws that were drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastssl.augment.describe import describe
from fastssl.augment.plan import draw
from fastssl.augment.policy import Policy
from fastssl.augment.reference import render_uint8

PAPER, INK, FAINT, BAND = (255, 255, 255), (25, 25, 25), (120, 120, 120), (236, 240, 245)
GAP, MARGIN, TEXT_PX = 8, 12, 12


def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size only
        return ImageFont.load_default()


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines no wider than ``width`` pixels, broken after commas first and at blanks where one law is too long."""
    lines: list[str] = []
    for part in text.replace(", ", ",\n").split("\n"):
        for i, word in enumerate(part.split(" ")):
            glue = "" if not lines else " "
            joined = lines[-1] + glue + word if lines else word
            # a law stays on one line where it fits: start a new line when the whole law would not fit behind what stands there
            rest = lines[-1] + glue + part if lines and i == 0 else joined
            if lines and font.getlength(rest) > width and (i == 0 or font.getlength(joined) > width):
                lines.append(word)
            elif lines:
                lines[-1] = joined
            else:
                lines.append(word)
    return lines


def _tile(image_HWC: np.ndarray, side: int) -> Image.Image:
    """The image as RGB fitted into side x side: whole-number nearest enlargement for small images, reduction for large ones."""
    picture = Image.fromarray(image_HWC if image_HWC.shape[2] == 3 else image_HWC[..., 0]).convert("RGB")
    longest = max(picture.size)
    if longest <= side:
        factor = side // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return picture.resize((max(1, picture.width * side // longest), max(1, picture.height * side // longest)), Image.Resampling.BILINEAR)


def contact_sheet(
    pixels_BHWC: Tensor,
    extent_B2: Tensor,
    policies: Mapping[str, Policy],
    *,
    views: int = 4,
    seed: int = 0,
    stream: int = 1,
    captions: Sequence[str] | None = None,
    tile: int = 128,
    title: str = "",
    size_B2: Tensor | None = None,
) -> Image.Image:
    """One line of pictures per canvas: the original, then ``views`` draws of each policy, in the mapping's order.

    ``policies``: column heading -> policy; the i-th is drawn as view number i.  Draw j of row r has draw number r * views + j, so a sheet is
    as repeatable as training.  ``captions``: a text per row under its original (else its size).  ``tile``: side of a picture in screen pixels.
    ``size_B2``: sizes of the original images, where the canvases are reduced ones.
    """
    pixels_BHWC, extent_B2 = pixels_BHWC.cpu(), extent_B2.cpu()
    rows = pixels_BHWC.shape[0]
    font, bold = _font(TEXT_PX), _font(TEXT_PX + 3)
    line_px = TEXT_PX + 3

    columns: list[list[tuple[np.ndarray, str]]] = [[]]
    for row in range(rows):
        h, w = extent_B2[row].tolist()
        columns[0].append((pixels_BHWC[row, :h, :w].numpy(), captions[row] if captions else f"{w}x{h}"))
    for number, policy in enumerate(policies.values()):
        position = torch.arange(rows * views)
        source = position // views
        size = None if size_B2 is None else size_B2.cpu()[source]
        plan = draw(policy, seed=seed, stream=stream, view=number, draw_B=position, extent_B2=extent_B2[source], size_B2=size)
        made = render_uint8(policy, plan, pixels_BHWC[source], extent_B2[source]).permute(0, 2, 3, 1).numpy()
        for j in range(views):
            columns.append([(made[r * views + j], describe(policy, plan, r * views + j)) for r in range(rows)])

    wrapped = [[_wrap(text, font, tile) for _, text in column] for column in columns]
    text_px = [max(len(column[row]) for column in wrapped) * line_px for row in range(rows)]
    heads = (line_px + 10 if title else 0) + line_px + 12
    group_of = [0] + [1 + i // views for i in range(len(columns) - 1)]
    left = [MARGIN + c * (tile + GAP) + group_of[c] * 2 * GAP for c in range(len(columns))]
    sheet = Image.new("RGB", (left[-1] + tile + MARGIN, MARGIN + heads + sum(tile + 4 + t + GAP for t in text_px) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((MARGIN, MARGIN), title, fill=INK, font=bold)
    for group, heading in enumerate(["original", *policies]):
        mine = [c for c in range(len(columns)) if group_of[c] == group]
        top = MARGIN + heads - line_px - 12
        pen.rectangle((left[mine[0]], top, left[mine[-1]] + tile - 1, top + line_px + 5), fill=BAND)
        pen.text((left[mine[0]] + 5, top + 3), heading, fill=INK, font=font)
    top = MARGIN + heads
    for row in range(rows):
        for c, column in enumerate(columns):
            picture = _tile(column[row][0], tile)
            sheet.paste(picture, (left[c] + (tile - picture.width) // 2, top + (tile - picture.height) // 2))
            for i, line in enumerate(wrapped[c][row]):
                pen.text((left[c], top + tile + 4 + i * line_px), line, fill=FAINT if line == "unchanged" else INK, font=font)
        top += tile + 4 + text_px[row] + GAP
    return sheet
