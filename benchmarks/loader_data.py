"""An ImageNet-shaped set of JPEGs made from real photographs, as a class-per-folder tree and converted to every format.

    python benchmarks/loader_data.py data/raw/photos --count 64 [--photos FOLDER]      # the tree alone, for fastssl-data convert

Sides are drawn as ImageNet has them (most photographs 500x375, about a quarter upright, some smaller); the few larger originals are what
``fastssl-data convert --max-side 500`` reduces, so there are none.  Qualities are drawn around a level that is chosen so that the mean file
has 110 KB.  Everybody who is measured reads these same bytes: the tree's files, the .beton and the shards hold them unchanged.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.photos import as_jpeg, cut, photographs  # noqa: E402

MEAN_KB = 110.0
CLASSES = 8
# (height, width): share of the images
SIDES = {
    (375, 500): 0.44,
    (500, 375): 0.14,
    (333, 500): 0.14,
    (500, 333): 0.06,
    (500, 500): 0.04,
    (300, 400): 0.06,
    (400, 300): 0.02,
    (281, 500): 0.04,
    (240, 320): 0.04,
    (200, 250): 0.02,
}
FORMATS = ("arrays", "ffcv", "dali")


@dataclass(frozen=True)
class Sets:
    """Where the collection lies: the tree of JPEG files, and a dataset folder for each format; ``cifar`` is a dataset of 32x32 images."""

    tree: Path
    arrays: Path
    ffcv: Path
    dali: Path
    cifar: Path


def shaped(photos: list[Image.Image], count: int, mean_kb: float = MEAN_KB, seed: int = 0) -> list[bytes]:
    """``count`` JPEGs with ImageNet's sides whose mean size is close to ``mean_kb``."""
    random = np.random.RandomState(seed)
    sides, shares = list(SIDES), np.asarray(list(SIDES.values()))
    drawn = [sides[k] for k in random.choice(len(sides), size=count, p=shares / shares.sum())]
    images = [cut([photos[i % len(photos)]], 1, height, width, seed=seed + i)[0] for i, (height, width) in enumerate(drawn)]
    around = random.randint(-12, 5, size=count)

    def encode(level: float, which: range) -> list[bytes]:
        """Whole levels; between two of them a matching share of the images gets the higher one."""
        up = np.modf(np.arange(count) * 0.618)[0] < level - np.floor(level)
        return [as_jpeg(images[i], int(np.clip(np.floor(level) + up[i] + around[i], 50, 100))) for i in which]

    low, high, sample = 60.0, 112.0, range(min(count, 64))  # the mean size grows with the level
    while high - low > 0.1:
        middle = (low + high) / 2
        if np.mean([len(jpeg) for jpeg in encode(middle, sample)]) <= mean_kb * 1000:
            low = middle
        else:
            high = middle
    return encode(low, range(count))


def write_tree(jpegs: list[bytes], root: Path) -> Path:
    """``root``/train/<class>/<number>.jpg with all of them, and a test split of one per class."""
    for i, jpeg in enumerate(jpegs):
        for split in ("train", "test") if i < CLASSES else ("train",):
            file = root / split / f"class{i % CLASSES}" / f"{i:06}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg)
    return root


def small_images(photos: list[Image.Image], count: int) -> np.ndarray:
    """uint8 [count, 32, 32, 3]: cuts of the photographs, for where CIFAR-10 is not at hand."""
    return np.stack(cut(photos, count, 32, 32))


def build(folder: Path, photos: list[Image.Image], count: int, cifar: Path | None = None, small: int = 4096) -> tuple[Sets, dict[str, object]]:
    """All formats below ``folder``, and what they hold. ``cifar``: a converted CIFAR-10 to use; without one, ``small`` reductions of the photographs."""
    from data_tools.convert import convert

    jpegs = shaped(photos, count)
    tree = write_tree(jpegs, folder / "tree")
    made = {format: convert(tree, folder / format, format=format, name="photographs") for format in FORMATS}
    facts: dict[str, object] = {"photographs": len(photos), "images": count, "mean_kb": round(float(np.mean([len(j) for j in jpegs])) / 1000, 1)}
    if cifar is not None and (cifar / "dataset.json").is_file():
        facts["small_images"] = "CIFAR-10"
    else:
        raw = folder / "small-tree"
        for i, image in enumerate(small_images(photos, small)):
            for split in ("train", "test") if i < CLASSES else ("train",):
                file = raw / split / f"class{i % CLASSES}" / f"{i:06}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(file, compress_level=1)
        cifar = convert(raw, folder / "small", format="arrays", name="small")
        facts["small_images"] = "32x32 reductions of the photographs"
    return Sets(tree, made["arrays"], made["ffcv"], made["dali"], cifar), facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, help="folder to make")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: those of scikit-image and scikit-learn)")
    args = parser.parse_args()
    if args.dest.exists():
        raise SystemExit(f"{args.dest} exists already")
    jpegs = shaped(photographs(args.photos), args.count)
    write_tree(jpegs, args.dest)
    print(f"{len(jpegs)} JPEGs, {np.mean([len(j) for j in jpegs]) / 1000:.1f} KB on average, in {args.dest}")


if __name__ == "__main__":
    main()
