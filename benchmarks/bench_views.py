"""Views per second of one CPU core: fastssl's batched rendering against per-image PIL pipelines, measured in turns in one process.

    python benchmarks/bench_views.py [--quick]

Both sides start from uint8 32x32x3 arrays in memory and end with normalised float32 views of a whole batch: fastssl in its preallocated
channels-last buffer (drawing its random numbers included), the peer as the stacked batch that a data loader's worker delivers.  The peer gets
no process transport and no decoding, which a real loader adds.  Repeats of the two sides alternate, so a change of the machine's load hits
both; the ratio per repeat is taken and its median reported.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import PIL.Image
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.host import commit, machine, versions  # noqa: E402
from benchmarks.peers import pipelines  # noqa: E402
from fastssl.augment import build_policy, draw, render  # noqa: E402

MEAN, STD, SIZE = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616), 32


def natural_like(count: int) -> np.ndarray:
    """Smooth random images [count, 32, 32, 3] with the spread of CIFAR's pixels."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, images: np.ndarray, repeats: int, inner: int, peer_images: int) -> dict[str, object]:
    batch = len(images)
    pixels, extent = torch.from_numpy(images), torch.full((batch, 2), SIZE, dtype=torch.int32)
    policy = build_policy(name, size=SIZE, channels=3, mean=MEAN, std=STD)
    out = torch.empty(batch, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    peer = pipelines(SIZE, MEAN, STD)[name]
    drawn = 0

    def ours() -> None:
        nonlocal drawn
        for _ in range(inner):
            plan = draw(policy, seed=0, stream=1, view=0, draw_B=torch.arange(drawn, drawn + batch), extent_B2=extent)
            render(policy, plan, pixels, extent, out)
            drawn += batch

    def theirs() -> None:
        torch.stack([peer(PIL.Image.fromarray(image)) for image in images[:peer_images]])

    ours()
    theirs()
    mine, other = [], []
    for _ in range(repeats):
        mine.append(batch * inner / timed(ours))
        other.append(peer_images / timed(theirs))
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    return {
        "policy": name,
        "fastssl_views_per_s": round(statistics.median(mine)),
        "pil_views_per_s": round(statistics.median(other)),
        "ratio_median": round(statistics.median(ratios), 1),
        "ratio_min": round(min(ratios), 1),
        "ratio_max": round(max(ratios), 1),
        "repeats": repeats,
        "fastssl_all": [round(v) for v in mine],
        "pil_all": [round(v) for v in other],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 repeats instead of 9")
    parser.add_argument("--batch", type=int, default=448, help="views per batch (default 448 = 7 x 64)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bench_views.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    host = machine()
    images = natural_like(args.batch)
    repeats = 3 if args.quick else 9
    rows = [measure(name, images, repeats, inner, args.batch) for name, inner in (("fixmatch_weak", 40), ("fixmatch_strong", 15))]
    print(f"{'policy':18s}{'fastssl views/s':>18s}{'PIL views/s':>14s}{'ratio (min..max)':>24s}")
    for row in rows:
        span = f"{row['ratio_median']} ({row['ratio_min']}..{row['ratio_max']})"
        print(f"{row['policy']:18s}{row['fastssl_views_per_s']:>18,}{row['pil_views_per_s']:>14,}{span:>24s}")
    result = {
        "benchmark": "views per second on one CPU core, 32x32x3, batch " + str(args.batch),
        "command": f"python benchmarks/bench_views.py --batch {args.batch}" + " --quick" * args.quick,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": host,
        "versions": versions("torch", "torchvision", "pillow"),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("wrote", args.out.relative_to(ROOT) if args.out.is_relative_to(ROOT) else args.out)


if __name__ == "__main__":
    main()
