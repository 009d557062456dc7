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

    return _paint(columns, [("original", 1), *((heading, views) for heading in policies)], tile, title)


def difference_sheet(
    who: Sequence[str], lines: Sequence[tuple[str, Sequence[np.ndarray]]], *, tile: int = 128, title: str = "", amplify: int = 64
) -> Image.Image:
    """Pictures of the same thing by several makers, side by side, each but the first followed by its distance from the first.

    ``lines``: (caption, one picture uint8 [h, w, C] per maker in the order of ``who``).  The distance is drawn as min(255, amplify * |a - b|) per
    channel; under it stand mean and largest distance in levels and the share of values that differ.  Pictures of different sizes have no distance:
    the sheet says so.
    """
    columns: list[list[tuple[np.ndarray, str]]] = [[(pictures[0], caption) for caption, pictures in lines]]
    for number in range(1, len(who)):
        columns.append([(pictures[number], "") for _, pictures in lines])
        columns.append([_distance(pictures[0], pictures[number], amplify) for _, pictures in lines])
    return _paint(columns, [(who[0], 1), *((f"{name}, and {amplify} times its distance", 2) for name in who[1:])], tile, title)


def _distance(first: np.ndarray, other: np.ndarray, amplify: int) -> tuple[np.ndarray, str]:
    if first.shape != other.shape:
        return np.full_like(other, 255), f"{first.shape[1]}x{first.shape[0]} against {other.shape[1]}x{other.shape[0]}"
    apart = np.abs(first.astype(np.int32) - other)
    return np.minimum(255, amplify * apart).astype(np.uint8), f"mean {apart.mean():.3f}, most {apart.max()}, {(apart > 0).mean():.1%} differ"


def _paint(columns: Sequence[Sequence[tuple[np.ndarray, str]]], groups: Sequence[tuple[str, int]], tile: int, title: str) -> Image.Image:
    """Columns of (picture, text below) under headings, each of which stands over the given number of columns."""
    font, bold = _font(TEXT_PX), _font(TEXT_PX + 3)
    line_px, rows = TEXT_PX + 3, len(columns[0])
    wrapped = [[_wrap(text, font, tile) for _, text in column] for column in columns]
    text_px = [max(len(column[row]) for column in wrapped) * line_px for row in range(rows)]
    group_of = [group for group, (_, count) in enumerate(groups) for _ in range(count)]
    left = [MARGIN + c * (tile + GAP) + group_of[c] * 2 * GAP for c in range(len(columns))]
    over = [[c for c in range(len(columns)) if group_of[c] == group] for group in range(len(groups))]
    heads = [_wrap(heading, font, left[mine[-1]] + tile - left[mine[0]] - 10) for (heading, _), mine in zip(groups, over, strict=True)]
    band_px = max(map(len, heads)) * line_px + 5
    top = MARGIN + (line_px + 10 if title else 0)
    sheet = Image.new("RGB", (left[-1] + tile + MARGIN, top + band_px + 7 + sum(tile + 4 + t + GAP for t in text_px) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((MARGIN, MARGIN), title, fill=INK, font=bold)
    for lines, mine in zip(heads, over, strict=True):
        pen.rectangle((left[mine[0]], top, left[mine[-1]] + tile - 1, top + band_px), fill=BAND)
        for i, line in enumerate(lines):
            pen.text((left[mine[0]] + 5, top + 3 + i * line_px), line, fill=INK, font=font)
    top += band_px + 7
    for row in range(rows):
        for c, column in enumerate(columns):
            picture = _tile(column[row][0], tile)
            sheet.paste(picture, (left[c] + (tile - picture.width) // 2, top + (tile - picture.height) // 2))
            for i, line in enumerate(wrapped[c][row]):
                pen.text((left[c], top + tile + 4 + i * line_px), line, fill=FAINT if line == "unchanged" else INK, font=font)
        top += tile + 4 + text_px[row] + GAP
    return sheet
