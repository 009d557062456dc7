"""Resized crops, short sides and crops before a resize, against Pillow and torchvision on the same boxes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from fastssl.augment import Plan, build_policy, describe, draw, render
from fastssl.augment.reference import render_uint8
from tests.augment.test_render import MODES, on_canvas, photo, to_pil
from tests.augment.test_resize import pillow

SHAPES = ((61, 83), (83, 61), (40, 90), (90, 40), (17, 11), (64, 64), (32, 32))


def policy(spec, size=32, channels=3):
    return build_policy(spec, size=size, channels=channels, mean=(0.49, 0.48, 0.45)[:channels], std=(0.24, 0.25, 0.26)[:channels])


def batch(channels=3, repeat=3, seed=0):
    rng = np.random.default_rng(seed)
    images = [photo(rng, *shape, channels) for shape in SHAPES * repeat]
    return images, *on_canvas(images, 90, 90)


def drawn(rule, extent, **keys):
    return draw(rule, **{"seed": 5, "stream": 1, "view": 0, **keys}, draw_B=torch.arange(len(extent)), extent_B2=extent)


def hwc(images):
    return images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_resized_crop_is_pillows_resize_of_the_cut_box(channels, filter):
    images, pixels, extent = batch(channels)
    rule = policy([{"resized_crop": {"scale": [0.05, 1.0], "mode": filter}}, "flip"], 32, channels)
    plan = drawn(rule, extent)
    exact = [hwc(render_uint8(rule, plan, pixels, extent, mode=mode)) for mode in MODES]
    fast = hwc(render_uint8(rule, plan, pixels, extent))
    assert np.array_equal(*exact)
    off = 0
    for row, image in enumerate(images):
        top, left, height, width = plan.laws[0]["box"][row].tolist()
        expected = pillow(image[top : top + height, left : left + width], 32, 32, filter)
        expected = expected[:, ::-1] if plan.laws[1]["flip"][row] else expected
        assert np.array_equal(exact[0][row], expected), f"{image.shape} box {plan.laws[0]['box'][row].tolist()}"
        assert np.abs(fast[row].astype(int) - expected).max() <= (1 if filter == "bilinear" else 2)
        off += (fast[row] != expected).mean() / len(images)
    assert off < 0.01, "the fast kernel is a level off in under 1 % of the values"


def test_a_resized_crop_is_torchvisions():
    """Through torchvision's own function on Pillow images, whose order of axes differs from ours for tall boxes in Pillow 13."""
    images, pixels, extent = batch()
    rule = policy("torchvision_train")
    plan = drawn(rule, extent)
    got = hwc(render_uint8(rule, plan, pixels, extent, mode="grouped"))
    for row, image in enumerate(images):
        expected = np.asarray(F.resized_crop(to_pil(image), *plan.laws[0]["box"][row].tolist(), [32, 32]))
        expected = expected[:, ::-1] if plan.laws[1]["flip"][row] else expected
        assert np.abs(got[row].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_short_side_then_middle_is_torchvisions(channels):
    images, pixels, extent = batch(channels, repeat=1)
    rule = policy([{"resize": {"short": 37, "mode": "bilinear"}}, "center"], 32, channels)
    plan = drawn(rule, extent)
    exact = [hwc(render_uint8(rule, plan, pixels, extent, mode=mode)) for mode in MODES]
    fast = hwc(render_uint8(rule, plan, pixels, extent))
    assert np.array_equal(*exact)
    for row, image in enumerate(images):
        resized = F.resize(to_pil(image), 37)
        assert (resized.height, resized.width) == (int(plan.laws[0]["height"][row]), int(plan.laws[0]["width"][row]))
        ours = pillow(image, resized.height, resized.width, "bilinear")
        expected = np.asarray(F.center_crop(to_pil(ours), 32)).reshape(32, 32, channels)
        assert np.array_equal(exact[0][row], expected), image.shape
        assert np.abs(fast[row].astype(int) - expected).max() <= 1
    assert describe(rule, plan, 0) == "unchanged"


def test_any_crop_of_a_short_side_works():
    """A shifted window with reflected borders, of an image whose size no host has read."""
    images, pixels, extent = batch(repeat=1)
    rule = policy([{"resize": {"short": 34}}, {"pad_crop": {"pad": 3}}, "flip"])
    plan = drawn(rule, extent)
    exact = [hwc(render_uint8(rule, plan, pixels, extent, mode=mode)) for mode in MODES]
    assert np.array_equal(*exact)
    for row, image in enumerate(images):
        resized = pillow(image, int(plan.laws[0]["height"][row]), int(plan.laws[0]["width"][row]), "bicubic")
        y, x = int(plan.laws[1]["y"][row]), int(plan.laws[1]["x"][row])
        expected = np.pad(resized, [(3, 3), (3, 3), (0, 0)], mode="reflect")[y : y + 32, x : x + 32]
        assert np.array_equal(exact[0][row], expected[:, ::-1] if plan.laws[2]["flip"][row] else expected)


def test_a_small_crop_is_enlarged_to_the_view():
    """The transfer library's CIFAR views: reflect padding, crop 32, enlarge, mirror."""
    rng = np.random.default_rng(1)
    images = [photo(rng, 32, 32, 3) for _ in range(6)]
    pixels, extent = on_canvas(images, 32, 32)
    rule = policy("tllib_cifar_weak", 56)
    plan = drawn(rule, extent)
    exact = [hwc(render_uint8(rule, plan, pixels, extent, mode=mode)) for mode in MODES]
    assert np.array_equal(*exact) and exact[0].shape[1:] == (56, 56, 3) and len({int(f) for f in plan.laws[2]["flip"]}) == 2
    for row, image in enumerate(images):
        y, x = int(plan.laws[0]["y"][row]), int(plan.laws[0]["x"][row])
        cut = np.pad(image, [(4, 4), (4, 4), (0, 0)], mode="reflect")[y : y + 32, x : x + 32]
        expected = pillow(np.ascontiguousarray(cut), 56, 56, "bicubic")
        assert np.array_equal(exact[0][row], expected[:, ::-1] if plan.laws[2]["flip"][row] else expected)


def test_zero_padding_before_the_mirror():
    rng = np.random.default_rng(1)
    images = [photo(rng, 32, 32, 3) for _ in range(20)]
    rule = policy("acr_imagenet_labeled")
    pixels, extent = on_canvas(images, 32, 32)
    plan = drawn(rule, extent)
    got = hwc(render_uint8(rule, plan, pixels, extent))
    for row, image in enumerate(images):
        y, x = int(plan.laws[0]["y"][row]), int(plan.laws[0]["x"][row])
        cut = np.pad(image, [(4, 4), (4, 4), (0, 0)])[y : y + 32, x : x + 32]
        assert np.array_equal(got[row], cut[:, ::-1] if plan.laws[1]["flip"][row] else cut)


def test_padding_given_as_a_share_of_the_window():
    assert [policy("longtail_weak", size).laws[1]["pad"] for size in (32, 64, 96)] == [4, 8, 12]
    assert policy([{"pad_crop": {"pad": 0.1, "size": 28}}, "resize"], 56).laws[0]["pad"] == 2


def test_a_mirror_before_a_resized_crop_moves_the_box():
    image = np.arange(40 * 60 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 60, 3)
    rule = policy([{"flip": {"p": 1.0}}, "resized_crop"], 16)
    pixels, extent = torch.from_numpy(image).unsqueeze(0), torch.tensor([[40, 60]])
    plan = Plan(({"flip": torch.tensor([True])}, {"box": torch.tensor([[5, 7, 20, 30]])}))
    for mode in MODES:
        got = hwc(render_uint8(rule, plan, pixels, extent, mode=mode))[0]
        assert np.array_equal(got, pillow(np.ascontiguousarray(image[:, ::-1][5:25, 7:37]), 16, 16, "bilinear"))


def test_boxes_outside_the_canvas_read_nothing_outside():
    rule, pixels = policy("imagenet_weak"), torch.full((3, 20, 30, 3), 77, dtype=torch.uint8)
    plan = Plan(({"box": torch.tensor([[0, 0, 500, 500], [-5, -5, 10, 10], [100, 100, 4, 4]])}, {"flip": torch.tensor([True, False, True])}))
    for mode in (*MODES, None):
        assert bool((render_uint8(rule, plan, pixels, torch.tensor([[20, 30]] * 3), mode=mode) == 77).all())


@pytest.mark.parametrize("name", ["imagenet_weak", "imagenet_strong", "eman_strong", "tllib_default_strong", "imagenet_eval"])
def test_every_mode_at_full_size_from_large_canvases(name):
    """Size 224 from canvases of about 250 x 300; the fast kernels stay close to the exact ones through every law that follows."""
    rng = np.random.default_rng(7)
    images = [photo(rng, *shape, 3) for shape in ((250, 300), (300, 230), (199, 300))]
    pixels, extent = on_canvas(images, 300, 300)
    rule = policy(name, 224)
    plan = drawn(rule, extent, seed=2)
    exact = [render_uint8(rule, plan, pixels, extent, mode=mode) for mode in MODES]
    assert torch.equal(*exact)
    out = [render(rule, plan, pixels, extent, torch.empty(3, 3, 224, 224), backend=backend) for backend in ("auto", "reference")]
    assert float((out[0] - out[1]).abs().mean()) < 0.02, "mean difference in standard deviations"
    if name in ("imagenet_weak", "imagenet_eval"):
        assert float((out[0] - out[1]).abs().max()) <= 1.001 / (255 * 0.24)


def test_boxes_are_described():
    rule = policy("imagenet_weak")
    plan = Plan(({"box": torch.tensor([[5, 7, 20, 30]])}, {"flip": torch.tensor([True])}))
    assert describe(rule, plan, 0) == "box 30x20 +7,+5, flip"


def test_pillow_agrees_with_itself():
    """The two-call resize that the exact tests compare with is Pillow's own wherever its versions agree."""
    image = photo(np.random.default_rng(0), 60, 90, 3)
    assert np.array_equal(pillow(image, 40, 40, "bilinear"), np.asarray(Image.fromarray(image).resize((40, 40), Image.Resampling.BILINEAR)))
