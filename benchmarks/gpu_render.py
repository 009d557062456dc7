"""Part 3 of the GPU suite: rendered views per second and their equality with the reference, beside torchvision v2 and kornia on the same device.

Peers render whole batches of uint8 images that lie on the device, in the form their documentation shows.  torchvision v2 draws once for a whole batch, so all
images get the same crop and colors: less work than asked for, and named "one draw for all"; drawn per image it needs a loop, which is measured too.
DALI is not compared here: it decodes as well, and the loader benchmark (benchmarks/bench_loader.py) is where it competes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_common import Item, Settings, ceiling, seconds, share
from fastssl.augment import build_policy
from fastssl.augment.parity import compare, measure, sample_canvases

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR, IMAGENET = ("fixmatch_weak", "fixmatch_strong", "torchssl_strong"), ("imagenet_weak", "imagenet_strong", "eman_strong")


def items(settings: Settings) -> dict[str, Item]:
    found: dict[str, Item] = {}
    for name in settings.pick(CIFAR, CIFAR[1:2]):
        found[name] = lambda n=name: ours(settings, n, settings.pick(448, 3), settings.pick(32, 16), settings.pick(32, 16))  # type: ignore[misc]
    for name in settings.pick(IMAGENET, IMAGENET[:1]):
        found[name] = lambda n=name: ours(settings, n, settings.pick(256, 2), settings.pick(256, 20), settings.pick(224, 16))  # type: ignore[misc]
    for name, side in (("fixmatch_weak", 32), ("imagenet_weak", 224), ("imagenet_strong", 224)):
        for how in ("torchvision one draw for all", "torchvision per image", "kornia"):
            found[f"{name} by {how}"] = lambda n=name, s=side, h=how: peer(settings, n, s, h)  # type: ignore[misc]
    return found


def ours(settings: Settings, name: str, rows: int, canvas: int, size: int) -> dict[str, Any]:
    policy = build_policy(name, size=size, channels=3, mean=MEAN, std=STD)
    pixels, extent = (t.to(settings.device) for t in sample_canvases(rows, canvas, canvas, 3))
    cuda = settings.device.type == "cuda"
    found = compare(policy, pixels, extent, replayed=False)
    again = compare(policy, pixels, extent, replayed=True) if cuda else found
    took = measure(policy, pixels, extent, dtype=torch.float32, repeats=settings.pick(20, 1))
    best = took.graph_s or took.eager_s
    return {
        "views": rows, "size": size, "values": found.values, "different": found.different, "largest": found.largest, "different_replayed": again.different,
        "equal": found.different == 0 and again.different == 0, "eager_s": took.eager_s, "graph_s": took.graph_s, "views_per_s": rows / best,
        "bytes_floor": took.bytes_floor, "bandwidth_share": share(took.bytes_floor, best, ceiling(settings, "copy")),
    }  # fmt: skip


def peer(settings: Settings, name: str, side: int, how: str) -> dict[str, Any]:
    rows, side = settings.pick(256, 2), settings.pick(side, 16)
    pixels, _ = sample_canvases(rows, settings.pick(32 if side == 32 else 256, 20), settings.pick(32 if side == 32 else 256, 20), 3, mixed=False)
    images = pixels.permute(0, 3, 1, 2).contiguous().to(settings.device)
    if how == "kornia":
        if importlib.util.find_spec("kornia") is None:
            return {"skipped": "kornia is not installed"}
        one = kornia(name, side).to(settings.device)
        call: Callable[[], object] = lambda: one(images.float() / 255)  # noqa: E731
    else:
        transform = torchvision(name, side)
        call = (lambda: transform(images)) if "all" in how else (lambda: torch.stack([transform(image) for image in images]))
    took = seconds(call, settings.device, dry=settings.dry)
    return {"views": rows, "size": side, "seconds": took, "views_per_s": rows / took}


def torchvision(name: str, side: int) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    if name == "fixmatch_weak":
        return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(side, padding=4, padding_mode="reflect"), *end])
    crop = [v2.RandomResizedCrop(side, scale=(0.2, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    colors = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2), v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5)]
    return v2.Compose([*crop, *(colors if "strong" in name and side > 32 else []), *end])


def kornia(name: str, side: int) -> Any:
    from kornia import augmentation as k

    end = [k.Normalize(torch.tensor(MEAN), torch.tensor(STD))]
    if name == "fixmatch_weak":
        return k.AugmentationSequential(k.RandomHorizontalFlip(), k.RandomCrop((side, side), padding=4, padding_mode="reflect"), *end)
    colors = [k.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), k.RandomGrayscale(p=0.2), k.RandomGaussianBlur((23, 23), (0.1, 2.0), p=0.5)]
    return k.AugmentationSequential(k.RandomResizedCrop((side, side), scale=(0.2, 1.0)), k.RandomHorizontalFlip(), *(colors if "strong" in name else []), *end)
