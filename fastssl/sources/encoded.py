"""One stored image (JPEG, PNG) into a canvas, and the rule for images that cannot be decoded."""

from __future__ import annotations

import io
import threading
import warnings

import numpy as np
from PIL import Image

from fastssl.sources import jpeg

BAD_PIXEL = 127  # mid-grey: what a row shows that cannot be decoded
_scratch = threading.local()


class BadRows:
    """The rows of a dataset that were delivered as mid-grey; the first one is warned about. Safe to use from several threads."""

    def __init__(self, where: str):
        self.where, self.ids = where, set[int]()
        self._lock = threading.Lock()

    def add(self, row: int, reason: str) -> None:
        with self._lock:
            first = not self.ids
            self.ids.add(row)
        if first:
            warnings.warn(
                f"{self.where!r}: row {row} cannot be decoded ({reason}); such rows are delivered as mid-grey images and counted in bad_rows. "
                "`fastssl-data verify` lists all of them.",
                RuntimeWarning,
                stacklevel=3,
            )


def decode_into(data: bytes, slot: np.ndarray, size: tuple[int, int], factor: int = 1) -> None:
    """Decode ``data``, an image of ``size`` (height, width), into the top-left corner of ``slot`` (uint8 [H, W, C], C = 1 or 3), reduced by ``factor``.

    A JPEG is reduced by libjpeg while it decodes (1, 2, 4 or 8); any other image is decoded whole and its factor x factor blocks are averaged.
    Raises ValueError for damage of any kind and for an image of another size; ``slot`` is then undefined inside the reduced extent.
    """
    height, width = (-(-side // factor) for side in size)
    if data[:2] == b"\xff\xd8":
        jpeg.decode_into(np.frombuffer(data, np.uint8), slot, size, (height, width), _buffer(height * width * 3))
        return
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.size != size[::-1]:
                raise ValueError(f"its size {image.height}x{image.width} differs from the recorded {size[0]}x{size[1]}")
            whole = image.convert("RGB" if slot.shape[2] == 3 else "L")
            pixels = np.asarray(whole.reduce(factor) if factor > 1 else whole)
    except Exception as error:  # each of Pillow's decoders has its own idea of what to raise for damage
        raise ValueError(str(error)) from error
    slot[:height, :width] = pixels.reshape(height, width, -1)


def _buffer(size: int) -> np.ndarray:
    """This thread's own memory for an image that does not fill its canvas in width."""
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.size < size:
        buffer = _scratch.buffer = np.empty(size, np.uint8)
    return buffer[:size]
