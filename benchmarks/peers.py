"""Augmentation as the published semi-supervised code does it: one image at a time, Pillow and torchvision transforms, on the CPU.

Written from the specifications of the policies (not copied), in the form those projects use, so that a comparison runs the same laws.
"""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision import transforms

LEVELS = 10


def _enhance(kind):
    return lambda image, v: kind(image).enhance(v * 0.9 / LEVELS + 0.05)


def _signed(value: float) -> float:
    return -value if random.random() < 0.5 else value


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


POOL = [
    lambda image, v: ImageOps.autocontrast(image),
    lambda image, v: ImageOps.equalize(image),
    lambda image, v: image,
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Sharpness),
    lambda image, v: ImageOps.posterize(image, int(v * 4 / LEVELS) + 4),
    lambda image, v: ImageOps.solarize(image, 256 - int(v * 256 / LEVELS)),
    lambda image, v: image.rotate(_signed(int(v * 30 / LEVELS))),
    lambda image, v: _affine(image, 1, _signed(v * 0.3 / LEVELS), 0, 0, 1, 0),
    lambda image, v: _affine(image, 1, 0, 0, _signed(v * 0.3 / LEVELS), 1, 0),
    lambda image, v: _affine(image, 1, 0, int(_signed(v * 0.3 / LEVELS) * image.size[0]), 0, 1, 0),
    lambda image, v: _affine(image, 1, 0, 0, 0, 1, int(_signed(v * 0.3 / LEVELS) * image.size[1])),
]


class RandAugmentMC:
    """n ops with replacement, each applied with probability one half at level 1..9, then a 16-pixel cutout (spec: simmatch family, 6.1)."""

    def __init__(self, n: int = 2):
        self.n = n

    def __call__(self, image: Image.Image) -> Image.Image:
        for op in random.choices(POOL, k=self.n):
            level = np.random.randint(1, LEVELS)
            if random.random() < 0.5:
                image = op(image, level)
        w, h = image.size
        x, y = np.random.uniform(0, w), np.random.uniform(0, h)
        x0, y0 = int(max(0, x - 8)), int(max(0, y - 8))
        image = image.copy()
        ImageDraw.Draw(image).rectangle((x0, y0, int(min(w, x0 + 16)), int(min(h, y0 + 16))), (127, 127, 127))
        return image


def pipelines(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, transforms.Compose]:
    """Weak and strong torchvision pipelines from a PIL image to a normalised CHW float tensor."""
    weak = [transforms.RandomHorizontalFlip(), transforms.RandomCrop(size, padding=4, padding_mode="reflect")]
    end = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return {"fixmatch_weak": transforms.Compose(weak + end), "fixmatch_strong": transforms.Compose([*weak, RandAugmentMC(2), *end])}
