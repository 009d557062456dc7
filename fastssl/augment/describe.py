"""What was drawn for one row, in a few words: the label of a view on a contact sheet."""

from __future__ import annotations

from torch import Tensor

from fastssl.augment.ops import OPS, SPACES, argument
from fastssl.augment.plan import Plan
from fastssl.augment.policy import COLOUR_PARTS, CROPS, Law, Policy, cropped_to, resized_to


def _op(op: str, a: float) -> str:
    if op in ("Brightness", "Contrast", "Color", "Sharpness"):
        return f"{op} {a:.2f}"
    if op == "Rotate":
        return f"Rotate {a:+.0f}°"
    if op.startswith(("Shear", "Translate")):
        return f"{op} {a:+.2f}"
    if op == "Posterize":
        return f"Posterize {int(a)} bits"
    return f"{op} {a:.0f}" if op.startswith("Solarize") else op


def _jitter(law: Law, drawn: dict[str, Tensor]) -> list[str]:
    """``brightness 0.81``, ..., ``hue -12°`` in the order in which they act."""
    factors = dict(zip(COLOUR_PARTS, drawn["factor"][0].tolist(), strict=True))
    named = [COLOUR_PARTS[part] for part in drawn["order"][0].tolist()]
    return [f"hue {360 * factors[name]:+.0f}°" if name == "hue" else f"{name} {factors[name]:.2f}" for name in named if law[name]]


def describe(policy: Policy, plan: Plan, row: int) -> str:
    """The laws that touched this row, in order: ``flip, crop +2,-1, Rotate -12°, Solarize 128, cutout`` or ``box 300x200 +12,+40, grey, blur 1.3``.

    Boxes are width x height and top-left (x, y) in canvas pixels; crop offsets are (x, y) shifts of the window against the unpadded image.
    "unchanged" when nothing was drawn.  Reads the plan on the host.
    """
    words: list[str] = []
    bottom = right = 1 << 31  # last row and column of the image, known once it is resized or cropped
    for law, drawn in zip(policy.laws, plan.rows(slice(row, row + 1)).laws, strict=True):
        if law.name == "flip" and bool(drawn["flip"]):
            words.append("flip")
        elif law.name == "pad_crop":
            x, y = int(drawn["x"]) - law["pad"], int(drawn["y"]) - law["pad"]
            words.append(f"crop {x:+d},{y:+d}" if x or y else "")
        elif law.name == "randaugment":
            a = argument(SPACES[law["space"]], drawn["code"], drawn["level"], drawn["sign"])[0].tolist()
            for code, applied, value in zip(drawn["code"][0].tolist(), drawn["applied"][0].tolist(), a, strict=True):
                words.append(_op(OPS[code], value) if applied and OPS[code] != "Identity" else "")
        elif law.name in ("cutout", "cutout_fraction"):
            y0, x0, y1, x1 = drawn["box"][0].tolist()
            y1, x1 = min(y1, bottom), min(x1, right)
            words.append(f"cutout {x1 - x0 + 1}x{y1 - y0 + 1}" if y1 >= y0 else "")
        elif law.name == "resized_crop":
            top, left, height, width = drawn["box"][0].tolist()
            words.append(f"box {width}x{height} {left:+d},{top:+d}")
        elif "applied" in drawn and law.name != "randaugment" and bool(drawn["applied"]):
            if law.name == "color_jitter":
                words += _jitter(law, drawn)
            else:
                value = f" {float(drawn['sigma']):.1f}" if law.name == "blur" else f" {law['threshold']}" if law.name == "solarize" else ""
                words.append(law.name.replace("grayscale", "grey") + value)
        if law.name in CROPS:
            bottom = right = cropped_to(law, policy.size) - 1
        elif law.name == "resize" and law["short"] is not None:
            bottom, right = int(drawn["height"]) - 1, int(drawn["width"]) - 1
        elif law.name == "resize":
            bottom, right = (side - 1 for side in resized_to(law, policy.size))
    return ", ".join(w for w in words if w) or "unchanged"
