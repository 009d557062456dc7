"""The pixel operations of RandAugment and the published spaces that choose among them; pixels themselves live in ``pixels.py``/``geometry.py``.

Every operation has one definition, Pillow's, on uint8 images (mode RGB for 3 channels, L for 1); ``a`` is its argument:

| op                     | out pixel                                                                     | a                |
|------------------------|-------------------------------------------------------------------------------|------------------|
| Identity               | v                                                                             | none             |
| Invert                 | 255 - v                                                                       | none             |
| AutoContrast           | per channel: trunc(v * s - lo * s), s = 255 / (hi - lo); v where hi <= lo     | none             |
| Equalize               | per channel: (step // 2 + #pixels below v) // step, step = (n - #hi) // 255   | none             |
| Posterize              | v with the lowest 8 - a bits cleared                                          | bits 1..8        |
| Solarize               | v if v < a else 255 - v                                                       | threshold        |
| SolarizeAdd            | t = clip(v + a); t if t < 128 else 255 - t                                    | signed increment |
| SolarizeAddDark        | min(255, v + a) if v < 128 else v                                             | increment        |
| Brightness             | clip(trunc(a * v))                                                            | factor           |
| Contrast               | clip(trunc(g + a * (v - g))), g = rounded mean of the luma                    | factor           |
| Color                  | the same with g = the pixel's luma (19595 R + 38470 G + 7471 B + 32768) >> 16 | factor           |
| Sharpness              | the same with g = 3x3 smoothing (weights 1, centre 5, /13), borders unchanged | factor           |
| Rotate                 | affine map about the centre, counter-clockwise                                | degrees          |
| ShearX, ShearY         | source x = x + a * y (y = y + a * x)                                          | slope            |
| TranslateX, TranslateY | source x = x + a * width (y = y + a * height)                                 | share of side    |

Blends are float32.  Geometric maps take output to source positions in Pillow's 16.16 fixed point with nearest sampling, or its bilinear filter;
what falls outside the image is the space's fill colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from fastssl.augment.constants import kept

OPS = (
    "Identity Invert AutoContrast Equalize Posterize Solarize SolarizeAdd SolarizeAddDark Brightness Contrast Color Sharpness "
    "Rotate ShearX ShearY TranslateX TranslateY"
).split()
CODE = {name: code for code, name in enumerate(OPS)}
# How an op touches pixels: one table per image, one table per channel, a blend with a second image, or a map of positions.
NONE, TONE, HISTOGRAM, BLEND, GEOMETRY = range(5)
KIND = (NONE, TONE, HISTOGRAM, HISTOGRAM, TONE, TONE, TONE, TONE, TONE, TONE, BLEND, BLEND, *[GEOMETRY] * 5)
NORMAL_TABLE = 1 << 12


@dataclass(frozen=True)
class OpLaw:
    """Level to argument: ``a = sign * (bias + direction * T(level * scale / denominator))``.

    T truncates to an integer where ``integer``; ``sign`` is drawn (+1 or -1 with equal chance) where ``signed``, else +1.
    ``pixels``: a translation is truncated to whole pixels; ``least`` and ``most`` bound the argument before the sign.
    """

    op: str
    scale: float = 0.0
    bias: float = 0.0
    direction: int = 1
    integer: bool = False
    signed: bool = False
    pixels: bool = False
    least: float = -1e9
    most: float = 1e9


@dataclass(frozen=True)
class Space:
    """A published set of op laws, drawn uniformly with replacement.  The level law is one of

    ``integer``: uniform on low..high inclusive, over ``denominator``;  ``uniform``: u in [0, 1) with 24 bits, denominator 2^24;
    ``normal``: magnitude clip(N(mean, std), 0, 10) by 4096 equally likely quantiles, in units of 2^-16 (denominator 10 * 2^16).
    """

    name: str
    laws: tuple[OpLaw, ...]
    level: str = "integer"
    low: int = 1
    high: int = 9
    denominator: int = 10
    mean: float = 10.0
    std: float = 2.0
    resample: str = "nearest"
    fill_mean: bool = False  # fill with round(255 * mean) of the dataset instead of black

    @property
    def pool(self) -> tuple[int, ...]:
        return tuple(CODE[law.op] for law in self.laws)


def _factors(scale: float, bias: float) -> list[OpLaw]:
    return [OpLaw(op, scale, bias) for op in ("Brightness", "Color", "Contrast", "Sharpness")]


def _moves(translate: float) -> list[OpLaw]:
    shears = [OpLaw(op, 0.3, signed=True) for op in ("ShearX", "ShearY")]
    return [OpLaw("Rotate", 30, integer=True, signed=True), *shears] + [OpLaw(op, translate, signed=True, pixels=True) for op in ("TranslateX", "TranslateY")]


_PLAIN = [OpLaw("AutoContrast"), OpLaw("Equalize"), OpLaw("Identity")]
_CODED = [OpLaw("Posterize", 4, 4, integer=True), OpLaw("Solarize", 256, 256, direction=-1, integer=True)]

SPACES = {
    # FixMatch's RandAugment as in the common PyTorch code: 14 ops, integer levels 1..9 of 10.
    "mc": Space("mc", tuple(_PLAIN + _factors(0.9, 0.05) + _CODED + _moves(0.3))),
    # The 16 ops of SimMatch's and FixMatch-EMAN's ImageNet code.
    "imagenet": Space(
        "imagenet",
        tuple(_PLAIN + [OpLaw("Invert")] + _factors(1.8, 0.1) + _CODED + [OpLaw("SolarizeAdd", 110, integer=True, signed=True)] + _moves(0.45)),
    ),
    # TorchSSL/USB: 14 ops, continuous magnitudes, ranges instead of signs.
    "torchssl": Space(
        "torchssl",
        (
            *_PLAIN,
            *_factors(0.9, 0.05),
            OpLaw("Posterize", 4, 4, integer=True),
            OpLaw("Solarize", 256),
            OpLaw("Rotate", 60, -30),
            *[OpLaw(op, 0.6, -0.3) for op in ("ShearX", "ShearY", "TranslateX", "TranslateY")],
        ),
        level="uniform",
        denominator=1 << 24,
    ),
    # timm's rand-m10-n2-mstd2, as used by the transfer-learning library: 15 ops, not "increasing", bilinear, mean fill.
    "timm": Space(
        "timm",
        (
            OpLaw("AutoContrast"),
            OpLaw("Equalize"),
            OpLaw("Invert"),
            *_factors(1.8, 0.1),
            OpLaw("Rotate", 30, signed=True),
            *[OpLaw(op, 0.3, signed=True) for op in ("ShearX", "ShearY")],
            *[OpLaw(op, 0.45, signed=True) for op in ("TranslateX", "TranslateY")],
            OpLaw("Posterize", 4, integer=True),
            OpLaw("Solarize", 256, integer=True, most=256),
            OpLaw("SolarizeAddDark", 110, integer=True, most=128),
        ),
        level="normal",
        denominator=10 << 16,
        resample="bilinear",
        fill_mean=True,
    ),
}


@kept
def _tables(space: Space, device: torch.device) -> dict[str, Tensor]:
    laws = {CODE[law.op]: law for law in space.laws}
    rows = [laws.get(code, OpLaw("Identity")) for code in range(len(OPS))]
    columns = {
        "scale": torch.tensor([r.scale for r in rows], dtype=torch.float64),
        "bias": torch.tensor([r.bias for r in rows], dtype=torch.float64),
        "direction": torch.tensor([float(r.direction) for r in rows], dtype=torch.float64),
        "integer": torch.tensor([r.integer for r in rows]),
        "signed": torch.tensor([r.signed for r in rows]),
        "pixels": torch.tensor([r.pixels for r in rows]),
        "least": torch.tensor([r.least for r in rows], dtype=torch.float64),
        "most": torch.tensor([r.most for r in rows], dtype=torch.float64),
        "pool": torch.tensor(space.pool),
        "denominator": torch.tensor(float(space.denominator), dtype=torch.float64),
    }
    if space.level == "normal":
        law = NormalDist(space.mean, space.std)
        marks = [min(10.0, max(0.0, law.inv_cdf((i + 0.5) / NORMAL_TABLE))) for i in range(NORMAL_TABLE)]
        columns["normal"] = torch.tensor([round(m * 65536) for m in marks])
    return {name: column.to(device) for name, column in columns.items()}


def tables(space: Space, device: torch.device) -> dict[str, Tensor]:
    """The space's constants as tensors on ``device``, made once (before any graph capture) and kept."""
    return _tables(space, torch.device(device))


def argument(space: Space, code: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """float64 argument of each (op code, level, sign); any shape.  Only exactly rounded operations, so equal on every device."""
    t = tables(space, code.device)
    scale, denominator = t["scale"][code], t["denominator"]  # a tensor: CUDA divides by a number through its rounded reciprocal
    # the published codes multiply first for integer levels and divide first for continuous ones; the last bit can decide a pixel
    a = level * scale / denominator if space.level == "integer" else level / denominator * scale
    a = torch.where(t["integer"][code], a.trunc(), a)
    a = t["bias"][code] + t["direction"][code] * a
    a = torch.minimum(torch.maximum(a, t["least"][code]), t["most"][code])
    return torch.where(t["signed"][code], a * sign, a)
