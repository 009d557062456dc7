"""fastssl's own turns of the loader benchmark, and the decoder's limit beside them: each opens one way to canvases or views and runs passes over the set.

A case opens as (sets, cores) -> :class:`Turn`.  A turn does the same work every time, starts with nothing read ahead and leaves nothing
running behind, so that cases can take turns on one machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader_data import Sets
from fastssl.augment import build_policy
from fastssl.engine.step import ViewRenderer
from fastssl.sources import open_source
from fastssl.sources.feed import Feed, Stream
from fastssl.sources.order import parse_order
from fastssl.sources.pack import packed_bytes
from fastssl.types import RawBatch, View

BATCH, SMALL_BATCH, VIEW, RING = 64, 448, 224, 4
SMALL_UNIT = 4 * SMALL_BATCH  # images of one pass over 32x32 images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAIRS = {  # weak and strong policy, side
    "imagenet": ("imagenet_weak", "imagenet_strong", VIEW),
    "tllib": ("tllib_default_weak", "tllib_default_strong", VIEW),
    "cifar": ("fixmatch_weak", "fixmatch_strong", 32),
}
SEVERAL = ("ffcv", "dali-cpu")  # sources that are measured on several processors, too
SCALED = 0.8  # 188 of 375 lines are at least 0.8 x 224: the value at which 500x375 photographs are decoded at one half


@dataclass
class Turn:
    """``run(passes)`` does them and returns the number of images; ``lead_in`` runs before, untimed; ``facts`` go to the result."""

    run: Callable[[int], int]
    lead_in: Callable[[], object] = lambda: None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What the table calls it, what it makes (limit, canvas, views, render), by which policies, and how it is opened."""

    name: str
    makes: str
    pair: str
    open: Callable[[Sets, int], Turn]
    ours: bool = True
    many_cores: bool = True


# --- (a) the decoder alone -----------------------------------------------------------------------------------------------------------


def _files(sets: Sets) -> list[np.ndarray]:
    return [np.frombuffer(file.read_bytes(), np.uint8) for file in sorted((sets.tree / "train").rglob("*.jpg"))]


def limit_simplejpeg(sets: Sets, cores: int) -> Turn:
    import simplejpeg

    files, buffer = _files(sets), np.empty(500 * 500 * 3, np.uint8)

    def run(passes: int) -> int:
        for _ in range(passes):
            for data in files:
                simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
        return passes * len(files)

    return Turn(run)


def limit_torchvision(sets: Sets, cores: int) -> Turn:
    from torchvision.io import decode_jpeg

    files = [torch.from_numpy(data.copy()) for data in _files(sets)]

    def run(passes: int) -> int:
        for _ in range(passes):
            for data in files:
                decode_jpeg(data)
        return passes * len(files)

    return Turn(run)


# --- (b) canvases --------------------------------------------------------------------------------------------------------------------


def open_photos(sets: Sets, cores: int, kind: str, engine: str = "auto", scaled: float = 0.0) -> Any:
    folder: Path = {"arrays": sets.arrays, "ffcv": sets.ffcv}.get(kind, sets.dali)
    return open_source(folder, "train", kind=kind, workers=cores, engine=engine, view_size=VIEW, scaled_decode=scaled)


def canvas(sets: Sets, cores: int, **options: Any) -> Turn:
    """Random rows into a ring of batches, as the feed does it."""
    source = open_photos(sets, cores, **options)
    ring = [RawBatch.allocate(BATCH, *source.canvas) for _ in range(RING)]
    random, batches = np.random.RandomState(0), -(-source.num_rows // BATCH)

    def run(passes: int) -> int:
        for i in range(passes * batches):
            source.fill(random.randint(0, source.num_rows, BATCH), ring[i % RING])
        return passes * batches * BATCH

    return Turn(run, facts=_memory(source))


def _memory(source: Any, rows: int = 384) -> dict[str, Any]:
    """What a step of 384 images (64 labelled, 320 unlabelled) brings to a device, in MB: whole canvases, and packed."""
    whole = rows * int(np.prod(source.canvas))
    packed = rows * float(packed_bytes(source.extents_N2, source.canvas).mean())
    return {"canvas": list(source.canvas), "step_of_384_MB": round(whole / 1e6, 1), "step_of_384_packed_MB": round(packed / 1e6, 1)}


# --- (c) canvases and views ----------------------------------------------------------------------------------------------------------


def _renderer(pair: str, batch: int, geometry: str = "per_op") -> ViewRenderer:
    weak, strong, size = PAIRS[pair]
    views = {"weak": View("unlabeled", "weak"), "strong": View("unlabeled", "strong")}
    policies = {
        name: build_policy(policy, size=size, channels=3, mean=MEAN, std=STD, geometry=geometry) for name, policy in (("weak", weak), ("strong", strong))
    }
    return ViewRenderer(views, policies, {"unlabeled": batch}, size=size, channels=3, seed=0, device=torch.device("cpu"), backend="auto")


def _stream(source: Any, batch: int) -> Stream:
    rows = np.arange(source.num_rows, dtype=np.int64)
    order = parse_order("shuffle", length=source.num_rows, seed=0, batch=batch, stream="unlabeled")
    return Stream("unlabeled", source, rows, source.labels_N, source.labels_N, np.zeros(source.num_rows, bool), order, batch)


def views(sets: Sets, cores: int, pair: str, geometry: str = "per_op", **options: Any) -> Turn:
    """What training does before its forward pass: the feed reads ahead in its thread, every batch is rendered twice."""
    small = pair == "cifar"
    batch = SMALL_BATCH if small else BATCH
    source = open_source(sets.cifar, "train") if small else open_photos(sets, cores, **options)
    renderer, stream = _renderer(pair, batch, geometry), _stream(source, batch)
    steps = SMALL_UNIT // batch if small else -(-source.num_rows // batch)
    with Feed([stream], ahead=2) as feed:
        facts = {"feed": feed.describe(), "bytes_per_step": feed.bytes_per_step, "slot_bytes": feed.nbytes}
    position = 0

    def run(passes: int) -> int:
        nonlocal position
        with Feed([stream], start_step=position, stop_step=position + passes * steps, ahead=2) as feed:
            for raw in feed:
                renderer(raw)
        position += passes * steps
        return passes * steps * batch

    return Turn(run, facts=facts)


def render(sets: Sets, cores: int, pair: str, geometry: str = "per_op") -> Turn:
    """The renderer apart from decoding: one batch stays, its draws move on."""
    small = pair == "cifar"
    batch = SMALL_BATCH if small else BATCH
    source = open_source(sets.cifar, "train") if small else open_photos(sets, cores, "ffcv")
    raw = RawBatch.allocate(batch, *source.canvas)
    rows = np.arange(batch, dtype=np.int64) % source.num_rows
    source.fill(rows, raw)
    sizes = source.extents_N2 if source.sizes_N2 is None else source.sizes_N2
    raw.size_B2.copy_(torch.from_numpy(sizes[rows]))
    raw.draw_B.copy_(torch.arange(batch))
    renderer = _renderer(pair, batch, geometry)

    def run(passes: int) -> int:
        for _ in range(passes):
            renderer({"unlabeled": raw})
            raw.draw_B.add_(batch)
        return passes * batch

    return Turn(run)


def cases() -> list[Case]:
    """The limit and everything of ours, in the table's order."""
    sources = {
        "ffcv": {"kind": "ffcv", "engine": "native"},
        "ffcv, FFCV's engine": {"kind": "ffcv", "engine": "ffcv"},
        "shards": {"kind": "shards"},
        "dali-cpu": {"kind": "dali"},
        "arrays": {"kind": "arrays"},
    }
    scaled = {"kind": "ffcv", "engine": "native", "scaled": SCALED}
    found = [
        Case("limit: libjpeg-turbo (simplejpeg)", "limit", "", limit_simplejpeg, many_cores=False),
        Case("libjpeg-turbo (torchvision)", "limit", "", limit_torchvision, many_cores=False),
    ]
    found += [Case(f"canvas: {name}", "canvas", "", partial(canvas, **options), many_cores=name in SEVERAL) for name, options in sources.items()]
    found += [Case(f"canvas: ffcv, scaled_decode={SCALED}", "canvas", "", partial(canvas, **scaled), many_cores=False)]
    rendered = [name for name in sources if name in (*SEVERAL, "arrays")]
    found += [Case(f"views: {name}", "views", "imagenet", partial(views, pair="imagenet", **sources[name]), many_cores=name in SEVERAL) for name in rendered]
    for pair in ("imagenet", "tllib"):
        if pair == "tllib":
            found += [Case("views: ffcv", "views", pair, partial(views, pair=pair, **sources["ffcv"]))]
        found += [Case("views: ffcv, scaled, composed", "views", pair, partial(views, pair=pair, geometry="composed", **scaled), many_cores=False)]
        found += [Case("render only", "render", pair, partial(render, pair=pair), many_cores=False)]
    found += [Case("render only, composed", "render", "tllib", partial(render, pair="tllib", geometry="composed"), many_cores=False)]
    found += [Case("views: arrays", "views", "cifar", partial(views, pair="cifar"))]
    found += [Case("render only", "render", "cifar", partial(render, pair="cifar"), many_cores=False)]
    return found
