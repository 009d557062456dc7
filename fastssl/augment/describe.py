"""What was drawn for one row, in a few words: the label of a view on a contact sheet."""

from __future__ import annotations

from fastssl.augment.ops import OPS, SPACES, argument
from fastssl.augment.plan import Plan
from fastssl.augment.policy import CROPS, Policy, resized_to


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


def describe(policy: Policy, plan: Plan, row: int) -> str:
    """The laws that touched this row, in order: ``flip, crop +2,-1, Rotate -12°, Solarize 128, cutout``.

    Crop offsets are (x, y) shifts of the window against the unpadded image.  "unchanged" when nothing was drawn.  Reads the plan on the host.
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
        if law.name in CROPS:
            bottom = right = policy.size - 1
        elif law.name == "resize":
            bottom, right = (side - 1 for side in resized_to(law, policy.size))
    return ", ".join(w for w in words if w) or "unchanged"
