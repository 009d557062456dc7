"""Walking a JPEG file's segments without decoding it: size, components, EXIF orientation, and whether its structure is whole."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

START, END = b"\xff\xd8", b"\xff\xd9"
# Inside coded data 0xFF is followed by 0 or a restart number, anything else is a marker.  One plain first byte: the search then runs at memory speed.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xff]")
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive: what libjpeg decodes
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ZEROS = bytes(64)  # a stretch that real coded data hardly ever has and a lost disk block always has


@dataclass(frozen=True)
class JpegFacts:
    """``height`` and ``width`` in pixels, ``components`` 1, 3 or 4, ``precision`` bits per sample, EXIF ``orientation`` 1..8.

    ``unusual``: not the 8-bit grey or YCbCr that every decoder takes (CMYK, stored RGB, 12 bits).  ``fault`` says what is broken ("" = nothing seen);
    ``doubtful`` files should be decoded to find out.
    """

    height: int
    width: int
    components: int
    precision: int
    orientation: int
    unusual: bool
    fault: str
    doubtful: bool


def scan_jpeg(data: bytes) -> JpegFacts:
    """Facts of a file that begins with the JPEG start marker.  Reads every marker; of coded data only where it could hide one."""
    height = width = components = precision = 0
    orientation, unusual, position, scans, coded, ids = 1, False, 2, 0, 0, b""
    adobe: int | None = None
    jfif = False

    def facts(fault: str = "", doubtful: bool = False) -> JpegFacts:
        return JpegFacts(height, width, components, precision, orientation, unusual, fault, doubtful)

    while True:
        if position + 2 > len(data):
            return facts("truncated: it ends without an end marker")
        if data[position] != 0xFF:
            return facts("damaged: no marker where one must be")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xD9:
            break
        if position + 4 > len(data):
            return facts("truncated inside its headers")
        (length,) = struct.unpack_from(">H", data, position + 2)
        end = position + 2 + length
        if length < 2 or end > len(data):
            return facts("truncated inside its headers")
        if marker in _FRAMES and length >= 8:
            precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            ids = data[position + 10 : end : 3]
        elif marker in _OTHER_FRAMES:
            return facts("a JPEG of a kind that decoders do not read (lossless or arithmetic)")
        elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _orientation(data[position + 10 : end])
        elif marker == 0xE0 and data[position + 4 : position + 9] == b"JFIF\0":
            jfif = True
        elif marker == 0xEE and data[position + 4 : position + 9] == b"Adobe" and length >= 14:
            adobe = data[position + 15]
        position = end
        if marker == 0xDA:
            coded = coded if scans else position
            scans += 1
            found = _MARKER.search(data, position)
            if found is None:
                return facts("truncated: it ends without an end marker")
            position = found.start()
    if not scans or not height or not width:
        return facts("damaged: it has no image in it")
    unusual = components not in (1, 3) or precision != 8 or (components == 3 and (adobe == 0 or (adobe is None and not jfif and ids == b"RGB")))
    return facts("", data.find(_ZEROS, coded) >= 0)


def _orientation(exif: bytes) -> int:
    """EXIF tag 274 of the first directory; 1 (upright) where it is missing or nonsense."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 8:
        return 1
    (start,) = struct.unpack_from(order + "I", exif, 4)
    if start + 2 > len(exif):
        return 1
    (count,) = struct.unpack_from(order + "H", exif, start)
    for place in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", exif, place)
        if tag == 274 and kind == 3:
            (value,) = struct.unpack_from(order + "H", exif, place + 8)
            return value if 1 <= value <= 8 else 1
    return 1
