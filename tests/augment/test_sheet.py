"""The contact sheet shows the true pixels, at the right place, and its labels fit their column."""

import numpy as np
import torch

from fastssl.augment import build_policy, describe, draw
from fastssl.augment.reference import render_uint8
from fastssl.augment.sheet import GAP, MARGIN, TEXT_PX, _font, _wrap, contact_sheet


def test_original_and_views_are_the_pixels_themselves():
    pixels = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extent = torch.full((2, 2), 24, dtype=torch.int32)
    rule = build_policy("fixmatch_strong", size=24, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    sheet = np.asarray(contact_sheet(pixels, extent, {"strong": rule}, views=3, seed=5, tile=48, title="a"))
    plan = draw(rule, seed=5, stream=1, view=0, draw_B=torch.arange(6), extent_B2=extent[:1].expand(6, 2))
    views = render_uint8(rule, plan, pixels[[0, 0, 0, 1, 1, 1]], extent[:1].expand(6, 2)).permute(0, 2, 3, 1).numpy()
    assert len({describe(rule, plan, row) for row in range(6)}) > 1
    tops = []
    for row in range(2):
        wanted = [pixels[row].numpy(), *views[3 * row : 3 * row + 3]]
        for column, image in enumerate(wanted):
            left = MARGIN + column * (48 + GAP) + (column > 0) * 2 * GAP
            large = image.repeat(2, 0).repeat(2, 1)
            found = [top for top in range(sheet.shape[0] - 47) if np.array_equal(sheet[top : top + 48, left : left + 48], large)]
            assert len(found) == 1, f"row {row} column {column}"
            tops.append(found[0])
    assert len(set(tops[:4])) == 1 and len(set(tops[4:])) == 1 and tops[4] > tops[0] + 48


def test_grey_and_large_images_fit():
    pixels = torch.zeros(1, 200, 100, 1, dtype=torch.uint8)
    rule = build_policy("digits_weak", size=28, channels=1, mean=(0.5,), std=(0.2,))
    sheet = contact_sheet(pixels, torch.tensor([[200, 100]]), {"weak": rule}, views=1, tile=64, captions=["seven"])
    assert sheet.mode == "RGB" and sheet.width == 2 * MARGIN + 2 * 64 + GAP + 2 * GAP


def test_labels_wrap_inside_their_column():
    font, text = _font(TEXT_PX), "flip, crop +2,-1, TranslateX +0.27, SolarizeAdd -110, cutout 17x17"
    lines = _wrap(text, font, 128)
    assert " ".join(lines) == text and len(lines) > 2
    assert all(font.getlength(line) <= 128 for line in lines)
    assert "TranslateX +0.27," in " | ".join(lines), "a law is not torn apart where it fits"


def test_views_of_reduced_canvases_are_drawn_on_the_original_size():
    """The sheet shows the boxes that training draws: on the image before its reduction."""
    pixels = torch.randint(0, 256, (1, 30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extent, size = torch.tensor([[30, 40]]), torch.tensor([[300, 400]])
    rule = build_policy("imagenet_strong", size=24, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    sheets = [contact_sheet(pixels, extent, {"strong": rule}, views=3, seed=5, tile=48, size_B2=given) for given in (size, None)]
    plan = draw(rule, seed=5, stream=1, view=0, draw_B=torch.arange(3), extent_B2=extent.expand(3, 2), size_B2=size.expand(3, 2))
    view = render_uint8(rule, plan, pixels[[0, 0, 0]], extent.expand(3, 2))[0].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
    for sheet, wanted in zip(sheets, (True, False), strict=True):
        shown = np.asarray(sheet)
        left = MARGIN + 48 + GAP + 2 * GAP
        assert any(np.array_equal(shown[top : top + 48, left : left + 48], view) for top in range(shown.shape[0] - 47)) == wanted
