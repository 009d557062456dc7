"""One raw image into pixels by stated rules, whatever its kind; what no rule covers is a BadImage with the reason.

Rules, in this order (docs/data/convert.md says the same for people):
- empty file, not an image, truncated or damaged, sides beyond ``max_pixels``: bad.
- animated: the first frame.  16 bits per channel: the high byte.  32-bit integers or floating point: bad.
- palette, 1-bit, CMYK, YCbCr, LAB: Pillow's conversion to RGB.  Transparency: laid over white.  Grey in an RGB collection: three equal channels.
  Colour in a grey collection: ITU-R 601 luma.
- EXIF orientation: applied (``exif="ignore"`` leaves the pixels as stored, as torchvision's loader does).
- longer side beyond ``max_side``: Pillow's box filter (each new pixel is the mean of the old ones it covers), in one step, to ``reduced_size``.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from data_tools.collection import BadImage
from data_tools.jpeg_scan import START, scan_jpeg

EXIF = ("apply", "ignore")
CHECKS = ("structure", "decode")
MAX_PIXELS = 100_000_000
PILLOW_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF", "ICO", "TGA", "PCX")
Image.MAX_IMAGE_PIXELS = None  # our own limit, checked from the header before anything is decoded, replaces Pillow's warning


@dataclass(frozen=True)
class Rules:
    """What conversion does to an image: ``max_side`` in pixels (0 = any), ``max_pixels`` and ``exif`` as above, ``channels`` 1 or 3 of the result.

    ``check`` of JPEGs that are kept as they are: structure walks their segments and decodes only doubtful ones, decode decodes all.
    """

    max_side: int = 0
    max_pixels: int = MAX_PIXELS
    exif: str = "apply"
    check: str = "structure"
    channels: int = 3


@dataclass
class Picture:
    """One image after the rules.  ``jpeg``: the file's own bytes where they may be kept; ``pixels`` uint8 [H, W, C], None where nothing had to be decoded.

    ``height`` and ``width`` are of the result, ``own`` (height, width) of the image before reduction.  ``lossy``: it came from a JPEG.
    """

    height: int
    width: int
    own: tuple[int, int]
    pixels: np.ndarray | None = None
    jpeg: bytes | None = None
    lossy: bool = False

    def decoded(self, channels: int) -> np.ndarray:
        """The pixels, decoding kept JPEG bytes as training will.  Raises BadImage where they cannot be decoded."""
        if self.pixels is None:
            assert self.jpeg is not None
            self.pixels = decode_jpeg(self.jpeg, channels)
        return self.pixels


def reduced_size(height: int, width: int, max_side: int) -> tuple[int, int]:
    """The size after ``max_side``: the longer side becomes max_side, the other keeps the aspect, rounded half up, at least 1.  0 = no limit."""
    longer = max(height, width)
    if not max_side or longer <= max_side:
        return height, width
    first, second = (max(1, (2 * side * max_side + longer) // (2 * longer)) for side in (height, width))
    return first, second


def prepare(raw: bytes | np.ndarray, rules: Rules) -> Picture:
    """Apply the rules to an encoded file or to decoded uint8 pixels [H, W, 1 or 3]."""
    if isinstance(raw, np.ndarray):
        _limit(raw.shape[0], raw.shape[1], rules)
        return _reduced(raw, rules, lossy=False)
    if not raw:
        raise BadImage("empty file")
    if raw[:2] == START:
        return _prepare_jpeg(raw, rules)
    return _reduced(_decode_other(raw, rules), rules, lossy=False)


def _prepare_jpeg(data: bytes, rules: Rules) -> Picture:
    facts = scan_jpeg(data)
    if facts.fault:
        raise BadImage(f"JPEG {facts.fault}")
    _limit(facts.height, facts.width, rules)
    turned = rules.exif == "apply" and facts.orientation != 1
    if facts.unusual:
        return _reduced(_decode_other(data, rules), rules, lossy=True)
    size = facts.height, facts.width
    keep = not turned and reduced_size(*size, rules.max_side) == size and facts.components in (1, rules.channels)
    if keep:
        picture = Picture(*size, size, jpeg=data, lossy=True)
        if rules.check == "decode" or facts.doubtful:
            picture.decoded(rules.channels)
        return picture
    pixels = decode_jpeg(data, rules.channels)
    if turned:
        pixels = upright(pixels, facts.orientation)
    return _reduced(pixels, rules, lossy=True)


def decode_jpeg(data: bytes, channels: int) -> np.ndarray:
    """uint8 [H, W, channels] by the decoder that training uses.  Raises BadImage for damage of any kind, libjpeg's warnings included."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    except ValueError as error:
        raise BadImage(f"JPEG damaged ({str(error).strip()[:80]})") from error


def _decode_other(data: bytes, rules: Rules) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata; the pixels decide
        try:
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                _limit(image.height, image.width, rules)
                image.seek(0)
                image.load()
                if rules.exif == "apply" and image.getexif().get(274, 1) in range(2, 9):
                    image = ImageOps.exif_transpose(image)
                return _to_pixels(image, rules.channels)
        except Image.UnidentifiedImageError as error:
            raise BadImage("not an image (no known file format)") from error
        except BadImage:
            raise
        except MemoryError as error:
            raise BadImage("too large for the memory of this machine") from error
        # Pillow's plugins let errors of many kinds through when a file is damaged.
        except (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, AttributeError, EOFError, OverflowError, struct.error, zlib.error) as error:
            raise BadImage(f"truncated or damaged ({str(error).strip()[:80] or type(error).__name__})") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's plugins for the formats of pictures: others call programs (EPS) or answer to almost any bytes."""
    Image.init()
    return tuple(name for name in PILLOW_FORMATS if name in Image.OPEN)


def _to_pixels(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode in ("I", "F"):
        raise BadImage(f"its pixels are {'32-bit integers' if image.mode == 'I' else 'floating-point numbers'}; no rule makes 8 bits of them")
    if image.mode.startswith("I;16"):
        high = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        image = Image.fromarray(high)
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels[..., None] if channels == 1 else pixels


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation 1..8 (EXIF 2.3, tag 274) on [H, W, C]."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _limit(height: int, width: int, rules: Rules) -> None:
    if height < 1 or width < 1:
        raise BadImage(f"{height}x{width} pixels")
    if height * width > rules.max_pixels:
        raise BadImage(f"huge: {height}x{width} is more than {rules.max_pixels} pixels (--max-pixels)")


def _reduced(pixels: np.ndarray, rules: Rules, *, lossy: bool) -> Picture:
    own = pixels.shape[0], pixels.shape[1]
    size = reduced_size(*own, rules.max_side)
    if pixels.shape[2] != rules.channels:
        pixels = np.repeat(pixels, 3, axis=2) if rules.channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    if size != own:
        grey = pixels.shape[2] == 1
        image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels)).resize((size[1], size[0]), Image.Resampling.BOX)
        pixels = np.asarray(image)[..., None] if grey else np.asarray(image)
    return Picture(*size, own, pixels=np.ascontiguousarray(pixels), lossy=lossy)
