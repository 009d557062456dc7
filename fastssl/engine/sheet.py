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

DRAWS = 3  # pictures of each view per image


def write_views(recipe: Recipe, out: str | Path, rows: int = 8) -> Path:
    """Write a contact sheet of every view of ``rows`` training images to ``out`` (.png) and return the path."""
    data = open_data(recipe, torch.device("cpu"))
    views = get_method(recipe.method.name).views(recipe.method.config)
    try:
        return draw_views(recipe, data, views, build_view_policies(recipe, views, data.manifest, data.channels), Path(out), rows)
    finally:
        data.source.close()


def draw_views(recipe: Recipe, data: Data, views: Mapping[str, View], policies: Mapping[str, Any], out: Path, rows: int) -> Path:
    """The same with data and policies that are open already. Rows are labelled ones, spread evenly over the label split."""
    labeled = np.asarray(data.split.labeled, dtype=np.int64)
    picked = labeled[np.linspace(0, len(labeled) - 1, min(rows, len(labeled))).astype(np.int64)]
    device = getattr(data.source, "device", "cpu")
    raw = RawBatch.allocate(len(picked), *data.source.canvas, device=device)
    data.source.fill(picked, raw)
    headings = {f"{name}: {views[name].policy}, {views[name].stream}": policy for name, policy in policies.items()}
    captions = [f"row {row}: {data.manifest.classes[data.labels_N[row]]}" for row in picked.tolist()]
    title = recipe.title or recipe.name
    picture = contact_sheet(raw.pixels_BHWC, raw.extent_B2, headings, views=DRAWS, seed=recipe.seed, captions=captions, title=title, size_B2=raw.size_B2)
    picture.save(out)
    return out
