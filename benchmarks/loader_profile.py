"""Where the time of a canvas and of its views goes: microseconds per image on one core, decoder, copies and laws apart, ours and Pillow's.

    python benchmarks/loader_profile.py [--images 128] [--photos FOLDER]

Decoding at 1/8 does almost nothing but read the entropy-coded bits: what it takes bounds every reduced decode.  A law's time is that of the policy up to it
less that of the policy before it, medians of repeats; the named operators are torch's own account of the strong view.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.loader_cases import BATCH, MEAN, PAIRS, SCALED, STD, open_photos  # noqa: E402
from benchmarks.loader_data import Sets, build  # noqa: E402
from benchmarks.loader_peers import _pil  # noqa: E402
from benchmarks.photos import photographs  # noqa: E402
from fastssl.augment import build_policy, draw, render  # noqa: E402
from fastssl.augment.policy import Policy  # noqa: E402
from fastssl.augment.reference import normalise, render_uint8  # noqa: E402
from fastssl.types import RawBatch  # noqa: E402

REPEATS = 5
Profile = dict[str, dict[str, float]]


def _median_us(work: Callable[[int], object], images: int, repeats: int = REPEATS) -> float:
    """Microseconds of processor time per image; ``work`` gets the number of the repeat, so that draws can differ."""
    work(0)
    times = []
    for i in range(repeats):
        start = time.process_time()
        work(i + 1)
        times.append(time.process_time() - start)
    return round(statistics.median(times) / images * 1e6, 1)


def decoding(files: list[bytes]) -> dict[str, float]:
    """Decoding into one warm buffer, whole and reduced."""
    arrays = [np.frombuffer(data, np.uint8) for data in files]
    sizes = [simplejpeg.decode_jpeg_header(data)[:2] for data in files]
    buffer = np.empty(max(h * w for h, w in sizes) * 3, np.uint8)

    def decode(factor: int) -> Callable[[int], object]:
        def work(_: int) -> None:
            for data, (h, w) in zip(arrays, sizes, strict=True):
                simplejpeg.decode_jpeg(data, "RGB", min_height=-(-h // factor), min_width=-(-w // factor), buffer=buffer)

        return work

    found = {"headers": _median_us(lambda _: [simplejpeg.decode_jpeg_header(data) for data in arrays], len(files))}
    found |= {f"decode at 1/{factor}" if factor > 1 else "decode": _median_us(decode(factor), len(files)) for factor in (1, 2, 4, 8)}
    return found


def filling(sets: Sets) -> dict[str, float]:
    """Whole calls of the sources' fill."""
    found = {}
    options: dict[str, dict[str, Any]] = {"ffcv": {"kind": "ffcv"}, f"ffcv, scaled_decode={SCALED}": {"kind": "ffcv", "scaled": SCALED}}
    options |= {"shards": {"kind": "shards"}, "dali-cpu": {"kind": "dali"}, "arrays": {"kind": "arrays"}}
    for name, wish in options.items():
        try:
            source = open_photos(sets, 1, **wish)
        except Exception as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        rows = np.arange(source.num_rows)
        ring = [RawBatch.allocate(BATCH, *source.canvas) for _ in range(2)]
        parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]

        def work(_: int, source: Any = source, parts: Any = parts, ring: Any = ring) -> None:
            for i, part in enumerate(parts):
                source.fill(part, ring[i % 2])

        found[name] = _median_us(work, len(rows))
        source.close()
    return found


def _policy(name: str, size: int, geometry: str) -> Policy:
    return build_policy(name, size=size, channels=3, mean=MEAN, std=STD, geometry=geometry)


def rendering(raw: RawBatch, name: str, size: int, geometry: str = "per_op") -> dict[str, float]:
    """Drawing, each law, normalising. A law that composition moves elsewhere shows where its time is spent, not where it is written."""
    policy, count = _policy(name, size, geometry), len(raw)

    def plan(upto: Policy, i: int) -> Any:
        return draw(upto, seed=i, stream=1, view=0, draw_B=torch.arange(count), extent_B2=raw.extent_B2, size_B2=raw.size_B2)

    found = {"draw": _median_us(lambda i: plan(policy, i), count)}
    plans = [plan(policy, i) for i in range(REPEATS + 1)]
    before = 0.0
    for k in range(1, len(policy.laws) + 1):
        part = replace(policy, laws=policy.laws[:k])
        cut = [replace(p, laws=p.laws[:k]) for p in plans]
        now = _median_us(lambda i, part=part, cut=cut: render_uint8(part, cut[i], raw.pixels_BHWC, raw.extent_B2), count)
        found[policy.laws[k - 1].name] = round(now - before, 1)
        before = now
    out = torch.empty(count, 3, size, size).to(memory_format=torch.channels_last)
    image = render_uint8(policy, plans[0], raw.pixels_BHWC, raw.extent_B2)
    found["normalise"] = _median_us(lambda _: normalise(policy, image, out), count)
    found["whole"] = _median_us(lambda i: render(policy, plan(policy, i), raw.pixels_BHWC, raw.extent_B2, out), count)
    return found


def operators(raw: RawBatch, name: str, size: int, geometry: str = "per_op", most: int = 6) -> dict[str, float]:
    """torch's own account of one view: microseconds per image of the ``most`` dearest operators."""
    from torch.profiler import ProfilerActivity, profile

    policy, count = _policy(name, size, geometry), len(raw)
    out = torch.empty(count, 3, size, size).to(memory_format=torch.channels_last)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for i in range(3):
            plan = draw(policy, seed=i, stream=1, view=0, draw_B=torch.arange(count), extent_B2=raw.extent_B2, size_B2=raw.size_B2)
            render(policy, plan, raw.pixels_BHWC, raw.extent_B2, out)
    events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)[:most]
    return {event.key: round(event.self_cpu_time_total / 3 / count, 1) for event in events}


def pillow(files: list[bytes], pair: str) -> dict[str, float]:
    """The peer's steps: Pillow's decoding, then each transform of the strong view."""
    steps = _pil(pair).strong.transforms
    images: list[Any] = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    found = {"decode": _median_us(lambda _: [Image.open(io.BytesIO(data)).convert("RGB") for data in files], len(files), 3)}
    for step in steps:
        found[type(step).__name__] = _median_us(lambda _, step=step, images=images: [step(image) for image in images], len(files), 3)
        images = [step(image) for image in images]
    return found


def profile_all(sets: Sets) -> Profile:
    """All of it, printed and returned."""
    torch.set_num_threads(1)
    files = [file.read_bytes() for file in sorted((sets.tree / "train").rglob("*.jpg"))]
    found: Profile = {"decoder": decoding(files), "fill": filling(sets)}
    source = open_photos(sets, 1, "ffcv")
    rows = np.arange(BATCH) % source.num_rows
    raw = RawBatch.allocate(BATCH, *source.canvas)
    source.fill(rows, raw)
    raw.size_B2.copy_(torch.from_numpy((source.extents_N2 if source.sizes_N2 is None else source.sizes_N2)[rows]))
    for pair in ("imagenet", "tllib"):
        weak, strong, size = PAIRS[pair]
        found[f"{weak}"] = rendering(raw, weak, size)
        found[f"{strong}"] = rendering(raw, strong, size)
        if pair == "tllib":
            found[f"{strong}, composed"] = rendering(raw, strong, size, "composed")
            found[f"{strong}, composed: operators"] = operators(raw, strong, size, "composed")
        found[f"{strong}: operators"] = operators(raw, strong, size)
        found[f"Pillow, {strong}"] = pillow(files, pair)
    source.close()
    print("\nmicroseconds of one core per image")
    for name, steps in found.items():
        print(f"  {name}: " + ", ".join(f"{step} {value:,.0f}" for step, value in steps.items()))
    whole, eighth = found["decoder"]["decode"], found["decoder"]["decode at 1/8"]
    print(
        f"reading the entropy-coded bits alone takes {eighth / whole:.0%} of a whole decode, so no reduction gains more than {whole / eighth:.2f} times; "
        "fewer stored bytes do: fastssl-data convert --max-side"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--photos", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        profile_all(build(Path(folder), photographs(args.photos), args.images, small=16)[0])


if __name__ == "__main__":
    main()
