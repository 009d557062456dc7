"""How far apart two ways of rendering the same plans are, on photographs cut to 500 x 375: mean absolute difference in levels of 0..255.

    python benchmarks/compare_views.py [--policies eman_strong fixmatch_strong] [--images 64] [--photos FOLDER]

``geometry``: composed against per_op (every row; and the rows that an affine op moves).  ``fast``: the CPU's own resize and blur kernels against the
exact ones, and the share of values that differ.  A policy named fixmatch_*, longtail_*, shrinkmatch_cifar_* is rendered at 32 from 32 x 32 reductions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.photos import cut, photographs  # noqa: E402
from fastssl.augment import Plan, Policy, build_policy, draw  # noqa: E402
from fastssl.augment.ops import GEOMETRY, KIND  # noqa: E402
from fastssl.augment.reference import render_uint8  # noqa: E402

SMALL = ("fixmatch_", "longtail_", "shrinkmatch_cifar_", "torchssl_")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def moved_rows(plan: Plan) -> torch.Tensor | None:
    """Which rows an applied affine op of a RandAugment moves; None without one."""
    for law in plan.laws:
        if "code" in law:
            return ((torch.tensor(KIND)[law["code"]] == GEOMETRY) & law["applied"]).any(1)
    return None


def compare(name: str, images: list[np.ndarray]) -> str:
    small = name.startswith(SMALL)
    if small:
        images = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.LANCZOS)) for image in images]
    pixels = torch.from_numpy(np.stack(images))
    extent = torch.tensor(pixels.shape[1:3]).expand(len(images), 2)

    def policy(geometry: str) -> Policy:
        return build_policy(name, size=32 if small else 224, channels=3, mean=MEAN, std=STD, geometry=geometry)

    plan = draw(policy("per_op"), seed=0, stream=1, view=0, draw_B=torch.arange(len(images)), extent_B2=extent)
    exact, once = (render_uint8(policy(g), plan, pixels, extent, mode="grouped").float() for g in ("per_op", "composed"))
    fast = render_uint8(policy("per_op"), plan, pixels, extent, mode="fast").float()
    apart, moved = (once - exact).abs().mean((1, 2, 3)), moved_rows(plan)
    geometry = "-" if moved is None else f"{apart.mean():.2f} (moved rows, {moved.float().mean():.0%}: {apart[moved].mean():.2f})"
    return f"{name:24s} geometry {geometry:40s} fast {(fast - exact).abs().mean():.4f}, {(fast != exact).float().mean():.2%} of the values"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["eman_strong", "tllib_default_strong", "imagenet_strong", "fixmatch_strong"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: those of scikit-image and scikit-learn)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = cut(photographs(args.photos), args.images)
    for name in args.policies:
        print(compare(name, images))


if __name__ == "__main__":
    main()
