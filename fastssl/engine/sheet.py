"""A picture of what a recipe's views look like, drawn from its own data with its own seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastssl.augment.sheet import contact_sheet
from fastssl.engine.assemble import Data, build_view_policies, open_data
from fastssl.methods import get as get_method
from fastssl.schema import Recipe
from fastssl.types import RawBatch, View

DRAWS, TILE = 3, 128  # pictures of each view per image, their side in screen pixels


def write_views(recipe: Recipe, out: str | Path, rows: int = 8, *, draws: int = DRAWS, tile: int = TILE) -> Path:
    """Write a contact sheet of every view of ``rows`` training images to ``out`` (.png) and return the path."""
    data = open_data(recipe, torch.device("cpu"))
    views = get_method(recipe.method.name).views(recipe.method.config)
    try:
        return draw_views(recipe, data, views, build_view_policies(recipe, views, data.manifest, data.channels), Path(out), rows, draws=draws, tile=tile)
    finally:
        data.source.close()


def draw_views(
    recipe: Recipe,
    data: Data,
    views: Mapping[str, View],
    policies: Mapping[str, Any],
    out: Path,
    rows: int,
    *,
    draws: int = DRAWS,
    tile: int = TILE,
) -> Path:
    """The same with data and policies that are open already. Rows are labelled ones, spread evenly over the label split."""
    picked = pick_rows(data, rows)
    raw = read_rows(data.source, picked)
    headings = {f"{name}: {views[name].policy}, {views[name].stream}": policy for name, policy in policies.items()}
    picture = contact_sheet(
        raw.pixels_BHWC,
        raw.extent_B2,
        headings,
        views=draws,
        seed=recipe.seed,
        captions=captions_of(data, picked),
        tile=tile,
        title=recipe.title or recipe.name,
        size_B2=raw.size_B2,
    )
    picture.save(out, optimize=True)
    return out


def pick_rows(data: Data, count: int) -> np.ndarray:
    """``count`` labelled rows (all, if there are fewer), spread evenly over the label split: int64."""
    labeled = np.asarray(data.split.labeled, dtype=np.int64)
    return labeled[np.linspace(0, len(labeled) - 1, min(count, len(labeled))).astype(np.int64)]


def read_rows(source: Any, rows: np.ndarray) -> RawBatch:
    """These rows' canvases with extents and sizes, where the source delivers."""
    raw = RawBatch.allocate(len(rows), *source.canvas, device=getattr(source, "device", "cpu"))
    source.fill(rows, raw)
    sizes = source.extents_N2 if source.sizes_N2 is None else source.sizes_N2
    raw.size_B2.copy_(torch.from_numpy(np.ascontiguousarray(sizes[rows])))
    return raw


def captions_of(data: Data, rows: np.ndarray) -> list[str]:
    return [f"row {row}: {data.manifest.classes[data.labels_N[row]]}" for row in rows.tolist()]
