"""The Triton renderer's pixels against the reference, to the last bit: every policy, every op at several levels, odd extents, grey and colour.

Without a GPU the same kernels run in Triton's interpreter.
"""

import numpy as np
import pytest
import torch

from fastssl.augment import POLICIES, Plan, build_policy, draw, philox, reference, render, triton_philox
from fastssl.augment.ops import CODE, SPACES
from fastssl.augment.parity import compare, sample_canvases
from fastssl.augment.policies import NAMED


def policy(spec, size=32, channels=3, **options):
    return build_policy(spec, size=size, channels=channels, mean=(0.49, 0.48, 0.45)[:channels], std=(0.24, 0.25, 0.26)[:channels], **options)


def both(rule, plan, pixels, extent, device="cpu"):
    """(reference, Triton) renderings as float32."""
    views = [torch.zeros(len(pixels), rule.channels, rule.size, rule.size, device=device).to(memory_format=torch.channels_last) for _ in range(2)]
    pixels, extent, plan = pixels.to(device), extent.to(device), plan.to(device)
    reference.render(rule, plan, pixels, extent, views[0], mode="dense")
    render(rule, plan, pixels, extent, views[1], backend="triton")
    return views


def distinct():
    """One name of each list of laws: several papers share theirs."""
    return sorted({repr(laws): name for name, laws in reversed(POLICIES.items())}.values())


def test_distinct_policies_stand_for_all():
    assert {repr(POLICIES[name]) for name in distinct()} == {repr(laws) for _, laws in NAMED.values()}


@pytest.mark.parametrize("name", distinct())
def test_every_policy_equals_the_reference(name, device):
    pixels, extent = (t.to(device) for t in sample_canvases(4, 40, 36, 3, seed=1))
    extent[1] = torch.tensor([33, 29])
    found = compare(policy(name), pixels, extent, seed=3)
    assert found.different == 0, found


@pytest.mark.parametrize("name", ["fixmatch_strong", "torchssl_strong", "imagenet_strong", "tllib_default_strong", "imagenet_eval"])
def test_policies_on_grey_images_and_square_canvases(name, device):
    for canvas, channels in ((32, 3), (40, 1)):
        pixels, extent = (t.to(device) for t in sample_canvases(2, canvas, canvas, channels, seed=2, mixed=channels == 1))
        found = compare(policy(name, channels=channels), pixels, extent, seed=5)
        assert found.different == 0, found


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("space", SPACES)
def test_every_op_at_several_levels(space, channels, device):
    """One row per (op, level, sign), on extents of 33 x 29 pixels of a 40 x 36 canvas."""
    laws, draws = SPACES[space], []
    for law in laws.laws:
        high = {"integer": 9, "uniform": (1 << 24) - 1, "normal": 10 << 16}[laws.level]
        draws += [(CODE[law.op], level, sign) for level, sign in ((1, 1), (high * 5 // 9, -1), (high, 1))]
    code, level, sign = (torch.tensor(column).unsqueeze(1) for column in zip(*draws, strict=True))
    drawn = {"code": code, "level": level, "sign": sign, "applied": torch.ones_like(code, dtype=torch.bool)}
    rule = policy([{"randaugment": {"space": space, "n": 1, "p": 1.0}}, {"center": {"fill": [9, 90, 200]}}], 33, channels)
    pixels, extent = sample_canvases(len(draws), 40, 36, channels, seed=7)
    extent[:] = torch.tensor([33, 29])
    expected, got = both(rule, Plan((drawn, {})), pixels, extent, device)
    wrong = (expected != got).flatten(1).any(1).cpu().tolist()
    assert not any(wrong), [draws[i] for i, hit in enumerate(wrong) if hit]
    shown = expected.flatten(1).cpu()
    assert len({tuple(row.tolist()) for row in shown}) == len(draws), "two rows look alike: the images tell ops apart no longer"


@pytest.mark.parametrize("channels", [1, 3])
def test_ops_on_flat_and_two_level_images(channels, device):
    """Where Pillow's special cases live: nothing to stretch, nothing to equalise."""
    images = np.zeros((4, 24, 24, channels), np.uint8)
    images[1], images[2, :12], images[3, 0, 0] = 255, 200, 77
    ops = ["AutoContrast", "Equalize", "Contrast", "Color", "Sharpness", "Invert", "SolarizeAdd", "Posterize"]
    code = torch.tensor([[CODE[op]] for op in ops for _ in images])
    drawn = {"code": code, "level": torch.full_like(code, 7), "sign": torch.ones_like(code), "applied": torch.ones_like(code, dtype=torch.bool)}
    rule = policy([{"randaugment": {"space": "imagenet", "n": 1, "p": 1.0}}, "center"], 24, channels)
    pixels = torch.from_numpy(np.tile(images, (len(ops), 1, 1, 1)))
    expected, got = both(rule, Plan((drawn, {})), pixels, torch.full((len(pixels), 2), 24, dtype=torch.int32), device)
    assert torch.equal(expected, got)


ORDERS = [
    ["flip", {"pad_crop": {"pad": 3, "mode": "constant", "fill": [1, 2, 3]}}, "flip"],
    [{"pad_crop": {"pad": 9, "mode": "edge"}}, {"randaugment": {"n": 1, "p": 1.0}}, "flip"],
    ["flip", {"randaugment": {"n": 2, "p": 1.0}}, "cutout", {"cutout": {"side": 6, "fill": [5, 6, 7]}}, {"pad_crop": {"pad": 30, "mode": "reflect"}}],
    ["cutout", "flip", {"randaugment": {"space": "timm", "n": 1, "p": 1.0}}, {"center": {"fill": 40}}, "flip", "flip"],
    ["flip", "flip", "flip"],
    [{"resize": {"height": 21, "width": 47, "mode": "bilinear"}}, "flip", {"pad_crop": {"pad": 5, "mode": "constant"}}, "cutout"],
    ["resized_crop", "grayscale", "solarize", {"solarize": {"p": 1.0, "threshold": 90}}, "blur", "color_jitter", "flip"],
    [{"color_jitter": {"p": 1.0, "hue": 0.5}}, {"grayscale": {"p": 0.5}}, {"pad_crop": {"pad": 2}}, {"blur": {"p": 1.0, "sigma_high": 6.0}}],
    [{"blur": {"p": 1.0}}, {"randaugment": {"n": 1, "p": 1.0}}, {"color_jitter": {"contrast": 0, "brightness": 0, "p": 1.0}}, "center"],
    [{"resize": {"short": 37, "mode": "bicubic"}}, "center", {"color_jitter": {"contrast": 1.0, "p": 1.0}}, {"randaugment": {"n": 1}}, "solarize"],
]


@pytest.mark.parametrize("laws", ORDERS, ids=range(len(ORDERS)))
def test_laws_in_any_order(laws, device):
    """Fusing laws into passes must not change what they mean: mirrors on both sides of a window, two boxes, colours before crops."""
    pixels, extent = (t.to(device) for t in sample_canvases(3, 36, 40, 3, seed=11))
    for seed in range(2):
        found = compare(policy(laws), pixels, extent, seed=seed)
        assert found.different == 0, found


def test_a_batch_renders_as_its_rows_do(device):
    rule = policy("fixmatch_strong")
    pixels, extent = (t.to(device) for t in sample_canvases(3, 36, 36, 3))
    plan = draw(rule, seed=1, stream=1, view=0, draw_B=torch.arange(3, device=device), extent_B2=extent)
    whole = both(rule, plan, pixels, extent, device)[1]
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(both(rule, plan.rows(one), pixels[one], extent[one], device)[1], whole[one])


@pytest.mark.parametrize("name", ["fixmatch_strong", "torchssl_strong", "imagenet_strong", "tllib_default_strong", "imagenet_eval"])
def test_images_of_many_blocks(name, monkeypatch, device):
    """Programs that hold a part of an image only, and statistics gathered in several rounds, as for large images on a device."""
    monkeypatch.setattr("fastssl.augment.triton_launch.WIDEST", 512)
    pixels, extent = (t.to(device) for t in sample_canvases(2, 40, 36, 3, seed=21))
    found = compare(policy(name), pixels, extent, seed=2)
    assert found.different == 0, found


@pytest.mark.parametrize("seed", [0, -5, (1 << 63) + 12345, (1 << 32) - 1])
def test_words_drawn_by_the_kernel_are_the_same(seed, device):
    draws = torch.tensor([0, 1, 5, (1 << 31), (1 << 32) - 1, 1 << 32, (1 << 62) + 99])
    for count in (1, 4, 31):
        expected = philox.words(seed, 3, 65535, draws, count)
        assert torch.equal(triton_philox.words(seed, 3, 65535, draws.to(device), count).cpu(), expected)
    assert triton_philox.words(seed, 0, 0, draws[:0].to(device), 5).shape == (0, 5)
