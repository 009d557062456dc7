"""Images that conversion must have a rule for, each with what the rule makes of it."""

import io
import struct

import numpy as np
import simplejpeg
from PIL import Image

from tests.data_tools.collections import smooth

PHOTO = smooth(20, 30, 5)
JPEG = simplejpeg.encode_jpeg(PHOTO, 92, "RGB", "420")
DECODED = simplejpeg.decode_jpeg(JPEG, "RGB")


def saved(image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(jpeg: bytes, value: int) -> bytes:
    """The JPEG with an EXIF segment that holds nothing but its orientation."""
    tiff = b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHIHH", 274, 3, 1, value, 0) + bytes(4)
    exif = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def stored_rgb_jpeg() -> bytes:
    """A JPEG whose three components are R, G and B themselves (Adobe marker, transform 0)."""
    return saved(PHOTO, "JPEG", quality=95, keep_rgb=True)


def animated_gif() -> bytes:
    frames = [Image.fromarray(np.full((6, 8), level, np.uint8)) for level in (200, 10, 90)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def alpha_png() -> bytes:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (10, 20, 30, 255)
    pixels[2] = (200, 0, 0, 0)  # transparent red
    pixels[3] = (100, 0, 0, 51)  # one fifth
    return saved(pixels, "PNG")


def alpha_truth() -> np.ndarray:
    truth = np.zeros((4, 4, 3), np.uint8)
    truth[:2], truth[2], truth[3] = (10, 20, 30), 255, (224, 204, 204)
    return truth


def palette_with_transparency() -> bytes:
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    image.putdata([0, 1, 0, 1, 0, 1, 0, 1])
    return saved(image, "PNG", transparency=0)


HIGH = (np.arange(48, dtype=np.uint16).reshape(6, 8) * 1300 + 200).astype(np.uint16)
GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def turned(orientation: int) -> np.ndarray:
    """By Pillow's own rule."""
    from PIL import ImageOps

    image = Image.fromarray(DECODED)
    image.getexif()[274] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


# name -> (file bytes, expected pixels, largest difference allowed): JPEGs that are encoded again differ a little, another libjpeg by 2 levels.
GOOD = {
    "jpeg": (JPEG, DECODED, 0),
    "grey.jpeg": (simplejpeg.encode_jpeg(PHOTO[..., :1].copy(), 90, "GRAY", "Gray"), rgb(PHOTO[..., 0]), 40),
    "rgb-stored.jpeg": (stored_rgb_jpeg(), PHOTO, 60),
    "cmyk.jpeg": (saved(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=95), PHOTO, 60),
    "progressive.jpeg": (saved(PHOTO, "JPEG", quality=95, progressive=True), PHOTO, 60),
    "blank-optimised.jpeg": (saved(np.full((64, 64, 3), 77, np.uint8), "JPEG", optimize=True), np.full((64, 64, 3), 77, np.uint8), 2),
    "png": (saved(PHOTO, "PNG"), PHOTO, 0),
    "grey.png": (saved(GREY, "PNG"), rgb(GREY), 0),
    "16bit.png": (saved(HIGH, "PNG"), rgb((HIGH >> 8).astype(np.uint8)), 0),
    "1bit.png": (saved(Image.fromarray((GREY > 99).astype(np.uint8) * 255).convert("1"), "PNG"), rgb((GREY > 99).astype(np.uint8) * 255), 0),
    "alpha.png": (alpha_png(), alpha_truth(), 1),
    "palette.png": (palette_with_transparency(), np.array([[[255] * 3, [0, 0, 255]] * 2] * 2, np.uint8), 0),
    "animated.gif": (animated_gif(), np.full((6, 8, 3), 200, np.uint8), 1),
    "webp": (saved(PHOTO, "WEBP", lossless=True), PHOTO, 0),
    "bmp": (saved(PHOTO, "BMP"), PHOTO, 0),
    "1x1.png": (saved(PHOTO[:1, :1].copy(), "PNG"), PHOTO[:1, :1], 0),
    "1x1.jpeg": (simplejpeg.encode_jpeg(PHOTO[:1, :1].copy(), 95, "RGB", "444"), PHOTO[:1, :1], 8),
} | {f"turned{n}.jpeg": (with_orientation(JPEG, n), turned(n), 40) for n in range(2, 9)}

ZEROED = bytearray(simplejpeg.encode_jpeg(np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8), 95, "RGB", "444"))
ZEROED[-3000:-1500] = bytes(1500)

# name -> (file bytes, part of the reason)
BAD = {
    "empty.jpeg": (b"", "empty file"),
    "text.jpeg": (b"<html>not found</html>", "not an image"),
    "cut.jpeg": (JPEG[: len(JPEG) * 2 // 3], "truncated"),
    "cut-header.jpeg": (JPEG[:100], "truncated"),
    "start-only.jpeg": (JPEG[:2], "truncated"),
    "no-frame.jpeg": (b"\xff\xd8\xff\xd9", "no image in it"),
    "stray.jpeg": (JPEG[:2] + b"\0\0" + JPEG[2:], "no marker"),
    "lost-block.jpeg": (bytes(ZEROED), "damaged"),
    "cut.png": (saved(PHOTO, "PNG")[:61], "truncated or damaged"),
    "flipped.png": (saved(PHOTO, "PNG")[:60] + b"\xff\xff\xff" + saved(PHOTO, "PNG")[63:], "truncated or damaged"),
    "float.tiff": (saved(GREY.astype(np.float32), "TIFF"), "floating-point"),
    "int32.tiff": (saved(GREY.astype(np.int32), "TIFF"), "32-bit integers"),
    "huge.png": (saved(np.zeros((40, 60, 3), np.uint8), "PNG"), "huge"),
    "huge.jpeg": (simplejpeg.encode_jpeg(np.zeros((40, 60, 3), np.uint8), 50, "RGB", "420"), "huge"),
}
