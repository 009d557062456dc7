"""Color jitter, grey, blur and solarize against torchvision on Pillow images, at the numbers that were drawn: every value equal."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as F

from fastssl.augment import Plan, build_policy, describe, draw
from fastssl.augment.blur import box_weights, gaussian, gaussian_fast, reach_of
from fastssl.augment.hue import shift
from fastssl.augment.reference import render_uint8
from tests.augment.test_render import MODES, from_pil, on_canvas, photo, to_pil
from tests.augment.test_resize import pillow

ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def policy(spec, size=32, channels=3):
    return build_policy(spec, size=size, channels=channels, mean=(0.49, 0.48, 0.45)[:channels], std=(0.24, 0.25, 0.26)[:channels])


def drawn(rule, extent, seed=5):
    return draw(rule, seed=seed, stream=1, view=0, draw_B=torch.arange(len(extent)), extent_B2=extent)


def as_torchvision(image, rule, plan, row):
    """The laws on one Pillow image, with the drawn numbers."""
    for law, numbers in zip(rule.laws, plan.laws, strict=True):
        mine = {key: value[row] for key, value in numbers.items()}
        if law.name == "resized_crop":
            top, left, height, width = mine["box"].tolist()
            image = to_pil(pillow(from_pil(image)[top : top + height, left : left + width], rule.size, rule.size, law["mode"]))
        elif law.name == "flip" and mine["flip"]:
            image = ImageOps.mirror(image)
        elif not mine.get("applied", False):
            continue
        elif law.name == "color_jitter":
            for part in mine["order"].tolist():
                if law[("brightness", "contrast", "saturation", "hue")[part]]:
                    image = ADJUST[part](image, float(mine["factor"][part]))
        elif law.name == "grayscale":
            image = F.to_grayscale(image, num_output_channels=len(image.getbands()))
        elif law.name == "blur":
            image = image.filter(ImageFilter.GaussianBlur(float(mine["sigma"])))
        elif law.name == "solarize":
            image = ImageOps.solarize(image, law["threshold"])
    return from_pil(image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["imagenet_strong", "simmatchv2_crop_96", "simclr"])
def test_whole_views_equal_torchvisions(name, channels):
    rng = np.random.default_rng(3)
    images = [photo(rng, *shape, channels) for shape in ((50, 70), (70, 50), (33, 35), (64, 64)) * 10]
    pixels, extent = on_canvas(images, 70, 70)
    rule = policy(name, 32, channels)
    plan = drawn(rule, extent)
    for mode in MODES:
        got = render_uint8(rule, plan, pixels, extent, mode=mode).permute(0, 2, 3, 1).numpy()
        for row, image in enumerate(images):
            assert np.array_equal(got[row], as_torchvision(to_pil(image), rule, plan, row)), (mode, row, describe(rule, plan, row))


@pytest.mark.parametrize("mode", [*MODES, None])
def test_statistics_and_borders_are_those_of_the_image_not_of_its_canvas(mode):
    """Contrast and blur before a crop, at extents smaller than the canvas."""
    rng = np.random.default_rng(4)
    images = [photo(rng, *rng.integers(3, 41, 2), 3) for _ in range(24)]
    pixels, extent = on_canvas(images, 40, 40)
    laws = [{"color_jitter": {"p": 1.0}}, {"blur": {"p": 1.0, "sigma_high": 5.0}}, {"solarize": {"p": 0.5}}, {"center": {"fill": 9}}]
    rule = policy(laws, 40)
    plan = drawn(rule, extent)
    got = render_uint8(rule, plan, pixels, extent, mode=mode).permute(0, 2, 3, 1).numpy()
    for row, image in enumerate(images):
        top, left = (40 - image.shape[0] + 1) // 2, (40 - image.shape[1] + 1) // 2
        assert np.array_equal(got[row, top : top + image.shape[0], left : left + image.shape[1]], as_torchvision(to_pil(image), rule, plan, row))


@pytest.mark.parametrize("amount", [0, 1, 128, 255])
def test_hue_of_every_fourth_colour(amount):
    level = torch.arange(0, 256, 3, dtype=torch.uint8)
    colours = torch.cartesian_prod(level, level, level)
    side = len(level)
    image = colours.view(side * side, side, 3)
    h, s, v = Image.fromarray(image.numpy()).convert("HSV").split()
    turned = Image.fromarray(((np.asarray(h).astype(int) + amount) % 256).astype(np.uint8))
    expected = np.asarray(Image.merge("HSV", (turned, s, v)).convert("RGB"))
    assert np.array_equal(shift(image.permute(2, 0, 1).unsqueeze(0), torch.tensor([amount]))[0].permute(1, 2, 0).numpy(), expected)


@given(st.floats(0, 16), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 99))
def test_blur_equals_pillow(sigma, height, width, channels, extreme, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = image if not extreme else (image > 127).astype(np.uint8) * 255
    expected = from_pil(to_pil(image).filter(ImageFilter.GaussianBlur(sigma)))
    pixels, radius = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0), torch.tensor([sigma], dtype=torch.float64)
    got = gaussian(pixels, radius, 16.0, None, None)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(got, expected)
    near = gaussian(pixels, radius, sigma, torch.tensor([height]), torch.tensor([width]))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(near, expected), "the bound on the radius is not too tight"


def test_fast_blur_is_rarely_a_level_off():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (40, 3, 50, 50), dtype=np.uint8))
    sigma = torch.from_numpy(rng.uniform(0.1, 2, 40))
    exact, fast = gaussian(images, sigma, 2.0, None, None).int(), gaussian_fast(images, sigma).int()
    assert int((exact - fast).abs().max()) <= 1 and float((exact != fast).float().mean()) < 1e-3


@given(st.floats(0, 16))
def test_box_weights_sum_to_one_and_reach_no_farther_than_said(sigma):
    reach, inner, edge = (int(v[0]) for v in box_weights(torch.tensor([sigma], dtype=torch.float64)))
    assert 0 <= (1 << 24) - ((2 * reach + 1) * inner + 2 * edge) <= 1 and reach + 1 <= reach_of(sigma) + (edge == 0)


def test_parts_of_strength_zero_are_left_out():
    """A hue of 0 would still round colours through HSV; it must not."""
    image = photo(np.random.default_rng(0), 32, 32, 3)
    pixels, extent = on_canvas([image] * 20, 32, 32)
    rule = policy([{"color_jitter": {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "p": 1.0}}])
    plan = drawn(rule, extent)
    for mode in MODES:
        assert np.array_equal(render_uint8(rule, plan, pixels, extent, mode=mode)[7].permute(1, 2, 0).numpy(), image)
    assert describe(rule, plan, 0) == "unchanged"


def test_colours_are_described():
    rule = policy(["resized_crop", "color_jitter", "grayscale", "blur", {"solarize": {"threshold": 100}}])
    yes = torch.tensor([True])
    jitter = {"applied": yes, "order": torch.tensor([[3, 0, 2, 1]]), "factor": torch.tensor([[0.75, 1.25, 1.0, -0.1]])}
    box = {"box": torch.tensor([[0, 0, 9, 9]])}
    plan = Plan((box, jitter, {"applied": yes}, {"applied": yes, "sigma": torch.tensor([1.26])}, {"applied": yes}))
    said = "box 9x9 +0,+0, hue -36°, brightness 0.75, saturation 1.00, contrast 1.25, grey, blur 1.3, solarize 100"
    assert describe(rule, plan, 0) == said
    plan = Plan((box, *({**law, "applied": ~yes} for law in plan.laws[1:])))
    assert describe(rule, plan, 0) == "box 9x9 +0,+0"
