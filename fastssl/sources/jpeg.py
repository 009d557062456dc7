"""JPEG decoding into a corner of a canvas, whole or reduced by libjpeg's own scaling.

Pixels are those of libjpeg's default decoder (accurate integer cosine transform, smooth chroma upsampling).  The "fast" transform is never used: it is 3 %
faster and moves pixels by up to 8 levels.

Reduced decoding (``data.scaled_decode`` = s > 0; off by default).  Rule: an image of height x width is decoded at 1/d, d the largest of 8, 4, 2 for which both
ceil(height / d) and ceil(width / d) are at least ceil(s * V), V the side of the largest view; otherwise whole.  With s = 1 a view of the whole image is never
enlarged, but a crop of less than (V / side)^2 of the image is: its detail is gone.  Stored raw pixels are not reduced.

What that does to pixels, by `python benchmarks/bench_engines.py` (resized crops with the usual 8-100 % of the area of 500x375 photographs, bilinear, against
the same crops of the whole decode; mean absolute difference in levels of 255, median PSNR, PSNR that nine in ten exceed):

====================  ====  =======  =======
1/2, view of 224      2.44  37.4 dB  29.1 dB   (s = 0.8: the short side is 188)
1/2, view of 160      1.78  40.6 dB  31.3 dB
1/2, view of 128      1.35  44.1 dB  33.7 dB
1/4, view of 64       1.71  41.5 dB  32.2 dB
====================  ====  =======  =======

The gain is bounded by entropy decoding, which no reduction avoids: by the same command, decoding takes 1 / 1.2 of the time at 1/2 and 1 / 1.45 at 1/8, where
little else is left.  What helps more is fewer stored bytes: smaller images from conversion.
"""

from __future__ import annotations

import math

import numpy as np
import simplejpeg

FACTORS = (8, 4, 2)
SMALLEST_SIDE = 8  # below this libjpeg's other scalings (n/8) round to the same sizes and the factor is no longer unique


def reductions(sizes_N2: np.ndarray, view_size: int, scaled_decode: float) -> np.ndarray:
    """The denominator 1, 2, 4 or 8 for images of these (height, width), int32 [N]; all 1 when ``scaled_decode`` or ``view_size`` is 0."""
    chosen = np.ones(len(sizes_N2), np.int32)
    if scaled_decode <= 0 or view_size <= 0:
        return chosen
    need = max(SMALLEST_SIDE, math.ceil(scaled_decode * view_size))
    short = sizes_N2.min(axis=1)
    for factor in sorted(FACTORS):
        chosen[-(-short // factor) >= need] = factor
    return chosen


def reduced_sizes(sizes_N2: np.ndarray, factor_N: np.ndarray) -> np.ndarray:
    """What libjpeg makes of these sizes at 1/factor: ceil(side / factor), int32 [N, 2]."""
    return (-(-sizes_N2 // factor_N[:, None])).astype(np.int32)


def decode_into(data: np.ndarray, slot: np.ndarray, size: tuple[int, int], extent: tuple[int, int], scratch: np.ndarray) -> None:
    """Decode ``data`` (uint8 bytes of one JPEG) into the top-left ``extent`` (height, width) of ``slot`` (uint8 [H, W, 3 or 1]; 1 = the JPEG's luma).

    ``size`` is the size that the JPEG must have; an ``extent`` smaller than it is reached by reducing (1/2, 1/4, 1/8).  ``scratch``: uint8 of at least
    3 * height * width of the extent, used when the canvas is wider than the image; keep it per thread, it stays in the processor's cache.
    The interpreter lock is free while libjpeg works.  Raises ValueError for damage of any kind (warnings of libjpeg included) and another size; ``slot`` is
    then undefined inside the extent.
    """
    height, width = extent
    if simplejpeg.decode_jpeg_header(data)[:2] != size:
        raise ValueError("its JPEG's size differs from the recorded one")
    direct, color = slot.shape[1] == width and slot.flags.c_contiguous, "RGB" if slot.shape[2] == 3 else "GRAY"
    buffer = slot[:height] if direct else scratch[: height * width * slot.shape[2]]
    if extent == size:
        image = simplejpeg.decode_jpeg(data, color, buffer=buffer)
    else:
        image = simplejpeg.decode_jpeg(data, color, min_height=height, min_width=width, buffer=buffer)
    if image.shape[:2] != extent:
        raise ValueError(f"libjpeg reduced it to {image.shape[:2]} instead of {extent}")
    if not direct:
        slot[:height, :width] = image
