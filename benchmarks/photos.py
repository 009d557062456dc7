"""Photographs to measure with: those that scikit-image and scikit-learn carry inside their packages, cut to ImageNet's usual shape."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

PICTURES = {
    "skimage": [f"data/{name}" for name in ("coffee.png", "astronaut.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}
HOW = "python -m pip install scikit-image scikit-learn, or name a folder of photographs with --photos"


def photographs(folder: Path | None = None) -> list[Image.Image]:
    """RGB photographs of a folder (.jpg, .png), or of the two packages. SystemExit that says what to do when there are none."""
    if folder is not None:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    else:
        specs = {name: importlib.util.find_spec(name) for name in PICTURES}
        files = [Path(spec.origin).parent / picture for name, spec in specs.items() if spec and spec.origin for picture in PICTURES[name]]
        files = [file for file in files if file.is_file()]
    if not files:
        raise SystemExit(f"no photographs found; {HOW}")
    return [Image.open(file).convert("RGB") for file in files]


def cut(photos: list[Image.Image], count: int, height: int = 375, width: int = 500, seed: int = 0) -> list[np.ndarray]:
    """``count`` images uint8 [height, width, 3]: random cuts (60-100 % of the largest that fits) of the photographs in turn, resized to one size."""
    random = np.random.RandomState(seed)
    cuts = []
    for i in range(count):
        photo = photos[i % len(photos)]
        wide = min(photo.width, photo.height * width / height) * random.uniform(0.6, 1.0)
        high = wide * height / width
        left, top = random.uniform(0, photo.width - wide), random.uniform(0, photo.height - high)
        cuts.append(np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + wide, top + high))))
    return cuts


def as_jpeg(image: np.ndarray, quality: int = 90) -> bytes:
    """4:2:0, as cameras and ImageNet have it."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420")
