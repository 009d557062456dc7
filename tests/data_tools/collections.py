"""Small raw image collections for tests, made from seeded numbers."""

import gzip
import struct
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_folder(root: Path, *, train: int = 40, test: int = 20, side: int = 8, seed: int = 0, packed: bool = False) -> Path:
    """MNIST-like: grey images, labels 0..9 in turn."""
    random = np.random.RandomState(seed)
    root.mkdir(parents=True, exist_ok=True)
    for stem, count in (("train", train), ("t10k", test)):
        for part, array in (
            ("images-idx3-ubyte", random.randint(0, 256, (count, side, side))),
            ("labels-idx1-ubyte", np.arange(count) % 10),
        ):
            data = idx_bytes(array)
            file = root / f"{stem}-{part}"
            (file.with_name(file.name + ".gz") if packed else file).write_bytes(gzip.compress(data) if packed else data)
    return root


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A picture that JPEG can hold: a colour gradient and a block."""
    random = np.random.RandomState(seed)
    down, across = np.mgrid[0:height, 0:width]
    image = np.stack([(down * a + across * b + c) % 256 for a, b, c in random.randint(0, 9, (3, 3))], axis=-1).astype(np.uint8)
    image[: height // 3, : width // 3] = random.randint(0, 256, 3)
    return image


def photo_folders(root: Path, *, per_class: int = 4, classes: tuple[str, ...] = ("cat", "dog", "emu"), same_size: bool = False) -> Path:
    """Class folders with JPEG (RGB and grey) and PNG images; sizes differ unless ``same_size``."""
    seed = 0
    for split, count in (("train", per_class), ("test", 2)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                seed += 1
                height, width = (24, 24) if same_size else (20 + seed % 7, 30 - seed % 5)
                image = smooth(height, width, seed)
                if i == 1:
                    Image.fromarray(image).save(folder / f"{i}.png")
                elif i == 2:
                    (folder / f"{i}.jpg").write_bytes(simplejpeg.encode_jpeg(image[..., :1].copy(), 90, "GRAY", "Gray"))
                else:
                    (folder / f"{i}.jpg").write_bytes(simplejpeg.encode_jpeg(image, 90, "RGB", "420"))
    return root


def sheet_folder(root: Path) -> Path:
    """CIFAR-like PNG sheets with 4 images each."""
    import json

    random = np.random.RandomState(3)
    root.mkdir(parents=True, exist_ok=True)
    for stem in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        Image.fromarray(random.randint(0, 256, (4, 1024, 3), dtype=np.uint8)).save(root / f"{stem}.png")
    (root / "train_lables.json").write_text(json.dumps([i % 10 for i in range(20)]))
    (root / "test_lables.json").write_text(json.dumps([3, 8, 8, 0]))
    return root


def pixels_of(split, row: int, channels: int = 3) -> np.ndarray:
    """What conversion makes of a row by its default rules, decoded."""
    from data_tools.images import Rules, prepare

    return prepare(split.read(row), Rules(channels=channels)).decoded(channels)


def write_beton(folder: Path, images: list[np.ndarray]) -> Path:
    """A beton of raw images [H, W, 3] with labels 0, 1, ..., by the writer's own door."""
    import io

    from data_tools.beton_writer import BetonWriter
    from data_tools.collection import ArraySplit
    from data_tools.images import Rules
    from data_tools.plan import plan_split
    from data_tools.storage import Storage
    from data_tools.units import Task, convert_rows

    (folder / "out").mkdir(exist_ok=True)
    payload = io.BytesIO()
    task = Task("0", folder, ArraySplit(np.stack(images), np.arange(len(images)), "train"), 0, Rules(), Storage(mode="raw"))
    unit = convert_rows(task, payload.write)
    (folder / "part").write_bytes(payload.getvalue())
    writer = BetonWriter(folder / "out", plan_split("train", 3, len(images), ["0"], [unit]))
    with open(folder / "part", "rb") as part:
        writer.append(unit.rows, part)
    return folder / "out" / writer.finish()["beton"]
