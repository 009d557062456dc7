"""The resize law against Pillow's own Image.resize: every value equal, for any size up and down, grey and colour, on any device."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastssl.augment import Plan, build_policy, draw, render
from fastssl.augment.reference import render_uint8
from fastssl.augment.resize import Boxes, boxes_at, boxes_fast, taps

SIDE = st.integers(1, 70)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def picture(rng, kind, height, width, channels):
    """Noise, saturated checks (where bicubic overshoots) or a ramp."""
    if kind == "noise":
        return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    if kind == "checks":
        return (rng.random((height, width, channels)) < 0.5).astype(np.uint8) * 255
    return np.add.outer(np.arange(height), np.arange(width))[..., None].repeat(channels, 2).astype(np.uint8)


def pillow(image, height, width, mode):
    """Along x, then along y, as two calls: Pillow before 13 does this in one call, Pillow 13 turns it round for images that lose much height."""
    source = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    out = source.resize((width, image.shape[0]), FILTERS[mode]).resize((width, height), FILTERS[mode])
    if image.shape[0] - height <= max(0, 2 * (image.shape[1] - width)):  # every version agrees
        assert out.tobytes() == source.resize((width, height), FILTERS[mode]).tobytes()
    return np.asarray(out).reshape(height, width, image.shape[2])


def whole(extent, height, width, mode):
    """Boxes that are the whole images."""
    h, w = extent.long().unbind(1)
    zero = torch.zeros_like(h)
    return Boxes(zero, zero, h, w, torch.full_like(h, height), torch.full_like(w, width), (height, width), mode)


def on_canvas(rng, images):
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    canvas = rng.integers(0, 256, (len(images), height, width, images[0].shape[2]), dtype=np.uint8)  # what lies outside the images is noise
    for row, image in zip(canvas, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(canvas), torch.tensor([image.shape[:2] for image in images], dtype=torch.int32)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=4), SIDE, SIDE, st.sampled_from([1, 3]), st.sampled_from(list(FILTERS)), st.sampled_from("ncr"),
    st.integers(0, 99),
)  # fmt: skip
@example([(1, 1), (1, 70), (70, 1)], 7, 5, 3, "bicubic", "n", 0)
@example([(7, 1), (2, 2), (9, 5)], 5, 1, 3, "bilinear", "n", 0)
@example([(7, 1), (32, 32)], 1, 1, 3, "bicubic", "n", 0)
@example([(61, 23), (60, 23), (61, 23)], 60, 23, 1, "bicubic", "c", 0)
@example([(300, 3), (2, 290)], 70, 150, 3, "bicubic", "n", 1)
@example([(131, 300)], 130, 129, 1, "bilinear", "c", 1)
def test_equals_pillow_at_any_size(extents, height, width, channels, mode, kind, seed):
    rng = np.random.default_rng(seed)
    images = [picture(rng, {"n": "noise", "c": "checks", "r": "ramp"}[kind], h, w, channels) for h, w in extents]
    pixels, extent = on_canvas(rng, images)
    before = pixels.clone()
    boxes, places = whole(extent, height, width, mode), [torch.arange(n).expand(len(images), n) for n in (height, width)]
    got = boxes_at(pixels.permute(0, 3, 1, 2), boxes, *places)
    near = boxes_fast(pixels.permute(0, 3, 1, 2), boxes, None, None)
    for row, image in enumerate(images):
        expected = pillow(image, height, width, mode)
        assert np.array_equal(got[row].permute(1, 2, 0).numpy(), expected), image.shape
        assert np.abs(near[row].permute(1, 2, 0).numpy().astype(int) - expected).max() <= (1 if mode == "bilinear" else 2), image.shape
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("height, width", [(1, 4000), (3000, 2)])
def test_a_strip_costs_what_is_kept_of_it(monkeypatch, height, width):
    """As a whole, the strip with a shorter side of 256 would be hundreds of megabytes; the middle of it is 150 kB."""
    made = []
    whole_resize = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda x, **how: made.append(how["size"]) or whole_resize(x, **how))
    policy = build_policy("imagenet_eval", size=224, channels=3, mean=[0.5] * 3, std=[0.25] * 3)
    pixels, extent = torch.randint(0, 256, (2, max(height, 300), max(width, 400), 3), dtype=torch.uint8), torch.tensor([[height, width], [300, 400]])
    plan = draw(policy, seed=0, stream=2, view=0, draw_B=torch.arange(2), extent_B2=extent)
    fast, exact = (render_uint8(policy, plan, pixels, extent, mode=mode) for mode in ("fast", "grouped"))
    assert torch.equal(fast[0], exact[0]) and (fast[1].int() - exact[1].int()).abs().max() <= 1
    assert made == [(256, 341)], "the usual image goes through torch's kernel"


@pytest.mark.parametrize("mode", FILTERS)
def test_weights_do_not_depend_on_the_longest_image_of_the_batch(mode):
    extent = torch.tensor([5, 40, 97, 224])
    first, weight = taps(extent, 32, mode, 224)
    for row, n in enumerate(extent.tolist()):
        alone_first, alone = taps(extent[row : row + 1], 32, mode, n)
        assert torch.equal(first[row], alone_first[0]) and torch.equal(weight[row, :, : alone.shape[2]], alone[0])
        assert not weight[row, :, alone.shape[2] :].any()
        assert int((weight[row].sum(1) - (1 << 22)).abs().max()) <= weight.shape[2] // 2


@pytest.mark.parametrize("channels", [1, 3])
def test_the_transfer_learning_evaluations(channels, device):
    rng = np.random.default_rng(0)
    images = [picture(rng, "noise", h, w, channels) for h, w in ((50, 75), (75, 50), (300, 280), (256, 256), (50, 75))]
    pixels, extent = on_canvas(rng, images)
    stats = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    squash, enlarge = (build_policy(name, size=224, channels=channels, **stats) for name in ("tllib_eval", "tllib_cifar_eval"))
    for policy in (squash, enlarge):
        plan = draw(policy, seed=0, stream=2, view=0, draw_B=torch.arange(5), extent_B2=extent)
        assert not list(plan.tensors()), "evaluation draws nothing"
        got = render_uint8(policy, plan, pixels, extent, mode="grouped")
        dense = render_uint8(policy, plan.to(device), pixels.to(device), extent.to(device), mode="dense")
        assert torch.equal(got, dense.cpu())
        for row, image in enumerate(images):
            if policy is squash:
                expected = pillow(image, 256, 256, "bicubic")[16:240, 16:240]
            else:
                expected = pillow(image, 224, 224, "bicubic")
            assert np.array_equal(got[row].permute(1, 2, 0).numpy(), expected), (policy.name, image.shape)
        out = render(policy, plan, pixels, extent, torch.empty(5, channels, 224, 224), backend="reference")
        assert torch.allclose(out, (got.float() / 255 - 0.5) / 0.25, atol=1e-6)


def test_resize_works_among_the_other_laws():
    """Mirror before it, crop and cutout after it, at each row's own extent."""
    rng = np.random.default_rng(3)
    images = [picture(rng, "noise", h, w, 3) for h, w in ((20, 31), (31, 17), (20, 31), (32, 32))]
    pixels, extent = on_canvas(rng, images)
    laws = ["flip", {"resize": {"height": 28, "width": 40, "mode": "bilinear"}}, {"pad_crop": {"pad": 2}}, {"cutout": {"side": 8}}]
    policy = build_policy(laws, size=24, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    plan = draw(policy, seed=1, stream=0, view=0, draw_B=torch.arange(4), extent_B2=extent)
    assert len(set(plan.laws[0]["flip"].tolist())) == 2, "the seed must show both"
    views = {mode: render_uint8(policy, plan, pixels, extent, mode=mode) for mode in ("grouped", "dense")}
    assert torch.equal(views["grouped"], views["dense"])
    for row, image in enumerate(images):
        image = np.ascontiguousarray(image[:, ::-1]) if plan.laws[0]["flip"][row] else image
        padded = np.pad(pillow(image, 28, 40, "bilinear"), [(2, 2), (2, 2), (0, 0)], mode="reflect")
        y, x = int(plan.laws[2]["y"][row]), int(plan.laws[2]["x"][row])
        expected = padded[y : y + 24, x : x + 24].copy()
        y0, x0, y1, x1 = plan.laws[3]["box"][row].tolist()
        expected[y0 : y1 + 1, x0 : x1 + 1] = 127
        assert np.array_equal(views["grouped"][row].permute(1, 2, 0).numpy(), expected)


def test_a_view_smaller_or_larger_than_the_resized_image_is_centred():
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8, 1)
    for side, name in ((4, "small"), (8, "same")):
        policy = build_policy([{"resize": {"size": side}}], size=6, channels=1, mean=(0.5,), std=(0.5,))
        got = render_uint8(policy, Plan(({}, {})), image, torch.tensor([[8, 8]]), mode="grouped")[0, 0].numpy()
        full = pillow(image[0].numpy(), side, side, "bicubic")[..., 0]
        expected = np.pad(full, 1) if name == "small" else full[1:7, 1:7]
        assert np.array_equal(got, expected)
