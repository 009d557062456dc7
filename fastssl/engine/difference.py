"""The same images and views by several readers and renderers, side by side, with their differences amplified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.augment import Plan, Policy, draw, render
from fastssl.augment.sheet import difference_sheet
from fastssl.engine.assemble import Data, build_view_policies, open_data, workers_of
from fastssl.engine.sheet import captions_of, pick_rows, read_rows
from fastssl.errors import DataError, FastSSLError, RecipeError, nearest
from fastssl.methods import get as get_method
from fastssl.schema import Recipe
from fastssl.sources import open_source
from fastssl.types import STREAM_IDS, RawBatch, View

READERS = {  # name -> data.source, data.engine
    "arrays": ("arrays", "auto"),
    "ffcv": ("ffcv", "native"),
    "ffcv-engine": ("ffcv", "ffcv"),
    "shards": ("shards", "auto"),
    "dali": ("dali", "auto"),
}
RENDERERS = ("auto", "reference", "triton")
OWN = "recipe"  # the recipe's own reader and renderer


@dataclass(frozen=True)
class Maker:
    """A column of the sheet: who reads (from ``folder`` instead of the recipe's, if given) or who renders."""

    name: str
    folder: str = ""


def parse(spec: str) -> list[Maker]:
    """``ffcv,dali=DIR,triton`` as makers; one alone is compared with the recipe's own. Raises RecipeError for what is none of them."""
    known = [*READERS, *RENDERERS]
    makers = []
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, _, folder = part.partition("=")
        if name not in known:
            raise RecipeError(f"--diff: nobody is called {name!r}{nearest(name, known)}; there are {', '.join(known)}, each once, commas between")
        if folder and name in RENDERERS:
            raise RecipeError(f"--diff: {name} renders and reads no folder; leave out ={folder}")
        makers.append(Maker(name, folder))
    if not makers or len(set(makers)) != len(makers):
        raise RecipeError(f"--diff {spec!r}: name one or more of {', '.join(known)}, each once, commas between")
    return makers if len(makers) > 1 else [Maker(OWN), *makers]


def write_difference(recipe: Recipe, out: str | Path, spec: str, *, rows: int = 8, tile: int = 128) -> list[str]:
    """Write a sheet of ``rows`` training images and each of their views by every maker of ``spec`` to ``out`` (.png).

    Returns lines for people: who was left out and why (a package, a device or the dataset's format is missing), and how far each of the others is
    from the first.  Numbers of the views are drawn once per maker from the same keys, so that they differ only where sizes do.
    Raises RecipeError if fewer than two makers can work here.
    """
    makers = parse(spec)
    data = open_data(recipe, torch.device("cpu"))
    said, names, made = [], [], []
    try:
        views = get_method(recipe.method.name).views(recipe.method.config)
        policies = build_view_policies(recipe, views, data.manifest, data.channels)
        picked = pick_rows(data, rows)
        for maker in makers:
            try:
                pictures = _pictures(recipe, data, maker, picked, views, policies)
            except FastSSLError as error:
                said.append(f"{maker.name}: left out: {error}")
                continue
            names.append(maker.name if not maker.folder else f"{maker.name}={Path(maker.folder).name}")
            made.append(pictures)
        if len(made) < 2:
            raise RecipeError(f"--diff {spec}: fewer than two can work here; " + "; ".join(said))
        captions = captions_of(data, picked)
    finally:
        data.source.close()
    headings = {"canvas": "canvas", **{name: f"{name}: {view.policy}" for name, view in views.items()}}
    lines = [(f"{caption}, {headings[group]}", [maker[group][row] for maker in made]) for row, caption in enumerate(captions) for group in made[0]]
    difference_sheet(names, lines, tile=tile, title=recipe.title or recipe.name).save(out, optimize=True)
    for group, first in made[0].items():
        said += [f"{group}: {name} against {names[0]}: {_apart(first, other[group])}" for name, other in zip(names[1:], made[1:], strict=True)]
    return said


def _pictures(
    recipe: Recipe, data: Data, maker: Maker, picked: np.ndarray, views: Mapping[str, View], policies: Mapping[str, Policy]
) -> dict[str, list[np.ndarray]]:
    """``canvas`` and every view's name -> one picture uint8 [h, w, C] per row."""
    backend = maker.name if maker.name in RENDERERS else recipe.augment.backend
    source = _open(recipe, data, maker, views) if maker.name in READERS else data.source
    try:
        raw = read_rows(source, picked)
    finally:
        if source is not data.source:
            source.close()
    raw = _where_it_renders(raw, backend)
    extents = raw.extent_B2.tolist()
    found = {"canvas": [raw.pixels_BHWC[i, :h, :w].cpu().numpy() for i, (h, w) in enumerate(extents)]}
    position = torch.arange(len(picked), device=raw.pixels_BHWC.device)
    for number, (name, policy) in enumerate(policies.items()):
        stream = STREAM_IDS[views[name].stream]
        plan = draw(policy, seed=recipe.seed, stream=stream, view=number, draw_B=position, extent_B2=raw.extent_B2, size_B2=raw.size_B2)
        found[name] = list(_levels(policy, plan, raw, backend).permute(0, 2, 3, 1).cpu().numpy())
    return found


def _levels(policy: Policy, plan: Plan, raw: RawBatch, backend: str) -> Tensor:
    """The rendered view before normalisation, uint8 [B, C, size, size]: every level comes back from float32 exactly."""
    shape = (len(raw), policy.channels, policy.size, policy.size)
    out = torch.empty(shape, device=raw.pixels_BHWC.device).to(memory_format=torch.channels_last)
    render(policy, plan, raw.pixels_BHWC, raw.extent_B2, out, backend=backend)
    mean, std = (torch.tensor(values, device=out.device).view(1, -1, 1, 1) for values in (policy.mean, policy.std))
    return ((out * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _where_it_renders(raw: RawBatch, backend: str) -> RawBatch:
    """Triton works on a GPU, if there is one; everything else on the CPU, so that readers are compared by one renderer."""
    device = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    if raw.pixels_BHWC.device.type == device.type:
        return raw
    return RawBatch.allocate(*raw.pixels_BHWC.shape, device=device).copy_(raw)


def _open(recipe: Recipe, data: Data, maker: Maker, views: Mapping[str, View]) -> Any:
    kind, engine = READERS[maker.name]
    folder = maker.folder or recipe.data.path
    side = max((view.size or recipe.augment.size for view in views.values()), default=recipe.augment.size)
    scaled = recipe.data.scaled_decode
    source = open_source(folder, data.split.of, kind=kind, workers=workers_of(recipe), engine=engine, view_size=side, scaled_decode=scaled)
    if source.num_rows != data.source.num_rows or not np.array_equal(source.labels_N, data.labels_N):
        source.close()
        raise DataError(f"{folder} holds other images than {recipe.data.path}: {source.num_rows} rows against {data.source.num_rows}, or other labels")
    return source


def _apart(first: list[np.ndarray], other: list[np.ndarray]) -> str:
    if any(a.shape != b.shape for a, b in zip(first, other, strict=True)):
        return "other sizes"
    apart = np.concatenate([np.abs(a.astype(np.int32) - b).ravel() for a, b in zip(first, other, strict=True)])
    return f"mean {apart.mean():.4f} levels, most {apart.max()}, {(apart > 0).mean():.2%} of the values differ"
