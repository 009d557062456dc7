"""What a reader test needs of a small collection built in its published layout: where it lies, and every image and label that must come out of it."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from tests.data_tools.collections import smooth


@dataclass
class Layout:
    """``splits``: name -> (images uint8 [H, W, C] or encoded bytes, labels) in row order."""

    kind: str
    source: str
    classes: tuple[str, ...]
    splits: dict[str, tuple[list, list[int]]]
    options: dict[str, str] = field(default_factory=dict)
    channels: int = 3


def jpeg(seed: int, height: int = 12, width: int = 10) -> bytes:
    return simplejpeg.encode_jpeg(smooth(height, width, seed), 92, "RGB", "444")


def png(seed: int, height: int = 9, width: int = 11) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(smooth(height, width, seed)).save(buffer, "PNG")
    return buffer.getvalue()


def put(file: Path, data: bytes | str) -> bytes | str:
    """Write a file with its folders; returns the data."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return data


def pixels(image: np.ndarray | bytes) -> np.ndarray:
    """Decoded as training decodes: [H, W, C]."""
    if isinstance(image, np.ndarray):
        return image
    if image[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(image, "RGB")
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def noise(count: int, side: int, seed: int, channels: int = 3) -> np.ndarray:
    """uint8 [count, side, side, channels]."""
    return np.random.RandomState(seed).randint(0, 256, (count, side, side, channels)).astype(np.uint8)


def planes(images: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> [N, C * H * W], colour planes row by row."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
