"""In which form an image is stored: its own JPEG bytes, new JPEG bytes, raw pixels or PNG; decided for each row alone, so that any worker decides the same."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from data_tools.collection import BadImage
from data_tools.images import Picture

MODES = ("auto", "raw", "jpg", "proportion", "smart")
JPEG, RAW, PNG = 0, 1, 2  # code of a stored row; 0 and 1 are FFCV's numbers


@dataclass(frozen=True)
class Storage:
    """``lossless`` is the code for pixels that must not change (RAW, or PNG in tar shards).  ``jpeg`` False = never JPEG bytes (arrays).  ``modes``:

    auto: JPEGs stay JPEGs (their own bytes where the rules left the image as it was, else encoded again), everything else lossless; raw: all lossless;
    jpg: JPEG bytes for all; proportion: JPEG for the share ``proportion`` of the rows, chosen by a hash of the key; smart: JPEG where the pixels
    take more than ``smart_threshold`` bytes.  New JPEGs: ``quality``, accurate transform, 4:2:0 chroma where the image was a JPEG and 4:4:4 otherwise.
    ``stored_channels`` 3 stores grey as three equal channels (a beton knows no grey).
    """

    mode: str = "auto"
    quality: int = 95
    lossless: int = RAW
    jpeg: bool = True
    stored_channels: int = 3
    channels: int = 3
    proportion: float = 0.5
    smart_threshold: int = 1_000_000
    side_limit: int = 0

    def encode(self, picture: Picture, key: str) -> tuple[int, bytes | memoryview]:
        """(code, bytes) of one row.  After this ``picture.pixels``, where not None, are what a reader will see."""
        if self.side_limit and max(picture.height, picture.width) > self.side_limit:
            raise BadImage(f"a side of {max(picture.height, picture.width)} pixels; this format stores up to {self.side_limit}")
        if self._wants_jpeg(picture, key):
            if picture.jpeg is not None:
                return JPEG, picture.jpeg
            return JPEG, self._to_jpeg(picture)
        pixels = picture.decoded(self.channels)
        if self.lossless == PNG:
            buffer = io.BytesIO()
            Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels).save(buffer, "PNG")
            return PNG, buffer.getvalue()
        if self.stored_channels != pixels.shape[2]:
            pixels = np.repeat(pixels, self.stored_channels, axis=2)
        return RAW, np.ascontiguousarray(pixels).data.cast("B")

    def _wants_jpeg(self, picture: Picture, key: str) -> bool:
        if not self.jpeg or self.mode == "raw":
            return False
        if self.mode == "proportion":
            share = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
            return share < self.proportion
        if self.mode == "smart":
            return picture.height * picture.width * self.stored_channels > self.smart_threshold
        return self.mode == "jpg" or picture.lossy

    def _to_jpeg(self, picture: Picture) -> bytes:
        pixels = np.ascontiguousarray(picture.decoded(self.channels))
        grey = pixels.shape[2] == 1
        data = simplejpeg.encode_jpeg(pixels, self.quality, "GRAY" if grey else "RGB", "Gray" if grey else ("420" if picture.lossy else "444"))
        picture.pixels, picture.jpeg = None, data
        return data
