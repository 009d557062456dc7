"""Rendered pixels against Pillow and NumPy, in both modes, at any extent, for grey and colour."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl.augment import POLICIES, Plan, build_policy, describe, draw, render
from fastssl.augment.ops import CODE, SPACES, Space, argument
from fastssl.augment.pixels import smooth
from fastssl.augment.reference import render_uint8
from fastssl.errors import DataError

MODES = ("grouped", "dense")


def policy(spec, size=32, channels=3):
    return build_policy(spec, size=size, channels=channels, mean=(0.49, 0.48, 0.45)[:channels], std=(0.24, 0.25, 0.26)[:channels])


def photo(rng, height, width, channels):
    """Smooth blobs with noise in a random range: histograms like a photograph's."""
    y, x = np.mgrid[:height, :width]
    waves = sum(np.sin(x * rng.uniform(0, 0.5) + y * rng.uniform(0, 0.5) + rng.uniform(0, 6))[..., None] * rng.uniform(0, 1, channels) for _ in range(4))
    image = 128 + rng.uniform(10, 60) * waves + rng.normal(0, 8, (height, width, channels)) + rng.uniform(-60, 60)
    return np.clip(image, 0, 255).astype(np.uint8)


def to_pil(image):
    return Image.fromarray(image if image.shape[2] == 3 else image[..., 0])


def from_pil(image):
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def pillow_op(op, a, image, whole=True):
    """The op as users of Pillow write it; ``whole``: translations in whole pixels."""
    w, h = image.size
    enhancers = {"Brightness": ImageEnhance.Brightness, "Contrast": ImageEnhance.Contrast, "Color": ImageEnhance.Color}
    if op in enhancers:
        return enhancers[op](image).enhance(a)
    if op == "Sharpness":
        return Image.blend(image.filter(ImageFilter.SMOOTH), image, a)
    if op == "Rotate":
        return image.rotate(a)
    if op in ("AutoContrast", "Equalize", "Invert"):
        return getattr(ImageOps, op.lower())(image)
    if op == "Posterize":
        return ImageOps.posterize(image, int(a))
    if op == "Solarize":
        return ImageOps.solarize(image, a)
    if op == "SolarizeAdd":
        return ImageOps.solarize(Image.fromarray(np.clip(np.asarray(image).astype(int) + int(a), 0, 255).astype(np.uint8)), 128)
    matrix = {
        "ShearX": (1, a, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, a, 1, 0),
        "TranslateX": (1, 0, int(a * w) if whole else a * w, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, int(a * h) if whole else a * h),
    }
    return image if op == "Identity" else image.transform(image.size, Image.Transform.AFFINE, matrix[op])


def chosen(space: Space, draws):
    """The drawn tensors of a one-op RandAugment for given (op, level, sign)."""
    code, level, sign = (torch.from_numpy(np.array(c)).unsqueeze(1) for c in zip(*[(CODE[o], v, s) for o, v, s in draws], strict=True))
    drawn = {"code": code, "level": level, "sign": sign, "applied": torch.ones_like(code, dtype=torch.bool)}
    return drawn, argument(space, code, level, sign)[:, 0].tolist()


def on_canvas(images, height, width):
    """Images of different extents on one canvas whose padding is noise."""
    canvas = np.random.default_rng(1).integers(0, 256, (len(images), height, width, images[0].shape[2]), dtype=np.uint8)
    for row, image in zip(canvas, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(canvas), torch.tensor([i.shape[:2] for i in images], dtype=torch.int32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("space", ["mc", "imagenet", "torchssl"])
def test_every_op_equals_pillow_at_any_extent(space, channels, mode):
    rng = np.random.default_rng(channels)
    laws, size = SPACES[space], 31
    draws, images = [], []
    for repeat in range(3):
        for law in laws.laws:
            level = int(rng.integers(1 << 24)) if laws.level == "uniform" else int(rng.integers(1, 10))
            draws.append((law.op, level, int(rng.choice([-1, 1]))))
            # the whole canvas once, then smaller extents whose padding must not leak in
            images.append(photo(rng, *((size, size) if repeat == 0 else rng.integers(3, size + 1, 2)), channels))
    drawn, arguments = chosen(laws, draws)
    rule = policy([{"randaugment": {"space": space, "n": 1, "p": 1.0}}, {"center": {"fill": 9}}], size, channels)
    got = render_uint8(rule, Plan((drawn, {})), *on_canvas(images, size, size), mode=mode).permute(0, 2, 3, 1).numpy()
    for row, (image, (op, level, sign), a) in enumerate(zip(images, draws, arguments, strict=True)):
        expected = from_pil(pillow_op(op, a, to_pil(image), whole=space != "torchssl"))
        top, left = (size - image.shape[0] + 1) // 2, (size - image.shape[1] + 1) // 2
        inside = got[row, top : top + image.shape[0], left : left + image.shape[1]]
        assert np.array_equal(inside, expected), f"{op} level {level} sign {sign} argument {a} extent {image.shape}: {(inside != expected).sum()} values differ"
        assert (got[row].astype(int).sum() - inside.astype(int).sum()) == 9 * channels * (size * size - image.shape[0] * image.shape[1])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_colour_ops_on_extreme_images(data):
    """Flat, two-level and saturated images, where Pillow's special cases live."""
    low, high = sorted(data.draw(st.tuples(st.integers(0, 255), st.integers(0, 255))))
    share = data.draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    channels = data.draw(st.sampled_from([1, 3]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    image = np.where(rng.random((16, 24, channels)) < share, high, low).astype(np.uint8)
    ops = [law.op for law in SPACES["imagenet"].laws]
    draws = [(op, data.draw(st.integers(1, 9)), data.draw(st.sampled_from([-1, 1]))) for op in ops]
    drawn, arguments = chosen(SPACES["imagenet"], draws)
    rule = policy([{"randaugment": {"space": "imagenet", "n": 1, "p": 1.0}}, "center"], 24, channels)
    got = render_uint8(rule, Plan((drawn, {})), *on_canvas([image] * len(ops), 16, 24)).permute(0, 2, 3, 1).numpy()
    for row, (op, a) in enumerate(zip(ops, arguments, strict=True)):
        assert np.array_equal(got[row, 4:20], from_pil(pillow_op(op, a, to_pil(image)))), (op, a)


def test_smoothing_divides_exactly():
    """The multiply-and-shift used for the division by 26 over its whole range."""
    value = torch.arange(2 * 13 * 255 + 14)
    assert torch.equal((value * 20165) >> 19, value // 26)
    image = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = [np.asarray(Image.fromarray(i.permute(1, 2, 0).numpy()).filter(ImageFilter.SMOOTH)) for i in image]
    assert np.array_equal(smooth(image, None, None).permute(0, 2, 3, 1).numpy(), np.stack(expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["reflect", "edge", "constant"])
def test_flip_then_crop_equals_numpy(padding, mode):
    rng = np.random.default_rng(5)
    images = [photo(rng, *rng.integers(24, 41, 2), 3) for _ in range(40)]
    rule = policy(["flip", {"pad_crop": {"pad": 4, "mode": padding, "fill": [1, 2, 3]}}])
    pixels, extent = on_canvas(images, 40, 40)
    plan = draw(rule, seed=0, stream=0, view=0, draw_B=torch.arange(40), extent_B2=extent)
    got = render_uint8(rule, plan, pixels, extent, mode=mode).permute(0, 2, 3, 1).numpy()
    assert 5 < int(plan.laws[0]["flip"].sum()) < 35
    for row, image in enumerate(images):
        image = image[:, ::-1] if plan.laws[0]["flip"][row] else image
        y, x = int(plan.laws[1]["y"][row]), int(plan.laws[1]["x"][row])
        pads = [(4, 4), (4, 4), (0, 0)]
        if padding == "constant":
            padded = np.stack([np.pad(image[..., c], 4, constant_values=c + 1) for c in range(3)], axis=2)
        else:
            padded = np.pad(image, pads, mode=padding)
        assert np.array_equal(got[row], padded[y : y + 32, x : x + 32])


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_both_modes_agree_and_leave_the_canvas_alone(name, channels):
    rng, rows = np.random.default_rng(2), 10 if name == "tllib_eval" else 60
    for shapes in ([(32, 32)] * rows, [tuple(rng.integers(20, 33, 2)) for _ in range(rows)]):
        pixels, extent = on_canvas([photo(rng, h, w, channels) for h, w in shapes], 32, 32)
        before = pixels.clone()
        rule = policy(name, 32, channels)
        plan = draw(rule, seed=1, stream=0, view=1, draw_B=torch.arange(rows), extent_B2=extent)
        views = [render_uint8(rule, plan, pixels, extent, mode=mode) for mode in MODES]
        assert torch.equal(*views) and torch.equal(pixels, before)
        noise = torch.from_numpy(on_canvas([photo(np.random.default_rng(0), 32, 32, channels)] * rows, 32, 32)[0].numpy())
        for row, (h, w) in enumerate(shapes):
            noise[row, :h, :w] = pixels[row, :h, :w]
        assert torch.equal(render_uint8(rule, plan, noise, extent, mode="grouped"), views[0]), "padding leaked into the view"
        assert torch.equal(render_uint8(rule, plan, noise, extent), render_uint8(rule, plan, pixels, extent)), "padding leaked into the fast view"


def test_a_batch_renders_as_its_rows_do():
    rule, extent = policy("fixmatch_strong"), torch.full((12, 2), 32)
    pixels, _ = on_canvas([photo(np.random.default_rng(s), 32, 32, 3) for s in range(12)], 32, 32)
    plan = draw(rule, seed=1, stream=1, view=0, draw_B=torch.arange(12), extent_B2=extent)
    whole = render_uint8(rule, plan, pixels, extent)
    for row in range(12):
        one = slice(row, row + 1)
        assert torch.equal(render_uint8(rule, plan.rows(one), pixels[one], extent[one]), whole[one])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "rows of a larger buffer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_output(dtype, layout, channels):
    rule = policy("plain", 32, channels)
    pixels = torch.randint(0, 256, (4, 32, 32, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    buffer = torch.full((10, channels, 32, 32), 77.0, dtype=dtype)
    if layout != "contiguous":
        buffer = buffer.to(memory_format=torch.channels_last)
    out = buffer[3:7]
    extent = torch.full((4, 2), 32, dtype=torch.int32)
    assert render(rule, draw(rule, seed=0, stream=2, view=0, draw_B=torch.arange(4), extent_B2=extent), pixels, extent, out) is out
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (rule.mean, rule.std))
    expected = (pixels.permute(0, 3, 1, 2).double() / 255 - mean) / std
    assert torch.allclose(out.double(), expected, atol=1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)
    assert bool((buffer[:3] == 77).all()) and bool((buffer[7:] == 77).all())


def test_plain_fits_other_sizes_in_the_middle():
    rule = policy([{"center": {"fill": 5}}], 6, 1)
    small, large = np.full((4, 3, 1), 100, np.uint8), np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    got = render_uint8(rule, Plan(({},)), *on_canvas([small, large], 8, 8))
    assert torch.equal(got[1, 0], torch.from_numpy(large[1:7, 1:7, 0]))
    assert int((got[0] == 100).sum()) == 12 and int((got[0] == 5).sum()) == 24


@pytest.mark.parametrize("name", POLICIES)
def test_an_accelerator_draws_and_renders_the_same_integers(name, device):
    """On a machine without one this holds the accelerator's mode against the CPU's."""
    rng = np.random.default_rng(4)
    rows = 20 if name == "tllib_eval" else 200  # it draws nothing, and its images are 256 x 256
    pixels, extent = on_canvas([photo(rng, *rng.integers(28, 33, 2), 3) for _ in range(rows)], 32, 32)
    rule, position = policy(name), torch.arange(rows)
    host = draw(rule, seed=9, stream=1, view=1, draw_B=position, extent_B2=extent)
    there = draw(rule, seed=9, stream=1, view=1, draw_B=position.to(device), extent_B2=extent.to(device))
    for (key, a), (_, b) in zip(host.tensors(), there.tensors(), strict=True):
        assert torch.equal(a, b.cpu()), key
    images = render_uint8(rule, there, pixels.to(device), extent.to(device), mode="dense").cpu()
    assert torch.equal(images, render_uint8(rule, host, pixels, extent, mode="grouped"))


@pytest.mark.parametrize("name", POLICIES)
def test_dense_mode_never_reads_the_device(name):
    """Under fake tensors any read of a value by the host raises, as would a host read during graph capture."""
    rule, kept = policy(name), []
    with FakeTensorMode(allow_non_fake_inputs=True):
        extent = torch.full((5, 2), 32, dtype=torch.int32)
        plan = draw(rule, seed=0, stream=0, view=0, draw_B=torch.arange(5), extent_B2=extent)
        kept.append(render_uint8(rule, plan, torch.zeros(5, 40, 32, 3, dtype=torch.uint8), extent, mode="dense"))
    assert kept[0].shape == (5, 3, 32, 32)
    # constants made under the fake mode must not be remembered
    extent = torch.full((5, 2), 32, dtype=torch.int32)
    plan = draw(rule, seed=0, stream=0, view=0, draw_B=torch.arange(5), extent_B2=extent)
    assert type(render_uint8(rule, plan, torch.zeros(5, 32, 32, 3, dtype=torch.uint8), extent)) is torch.Tensor


def test_wrong_buffers_are_named():
    rule, extent = policy("plain"), torch.full((2, 2), 32)
    with pytest.raises(DataError, match=r"uint8 \[B, H, W, 3\]"):
        render(rule, Plan(({},)), torch.zeros(2, 32, 32, 1, dtype=torch.uint8), extent, torch.zeros(2, 3, 32, 32))
    with pytest.raises(DataError, match="output buffer"):
        render(rule, Plan(({},)), torch.zeros(2, 32, 32, 3, dtype=torch.uint8), extent, torch.zeros(2, 3, 28, 28))


@pytest.mark.parametrize("wrong", [(0, 32), (32, 0), (-1, 5), (33, 32), (32, 40)])
def test_impossible_extents_are_named(wrong):
    rule, extent = policy("fixmatch_weak"), torch.tensor([[32, 32], wrong], dtype=torch.int32)
    plan = draw(rule, seed=0, stream=0, view=0, draw_B=torch.arange(2), extent_B2=extent)
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(DataError, match=rf"row 1 of the batch has an extent of {wrong[0]}x{wrong[1]} pixels.*1..32"):
        render(rule, plan, pixels, extent, torch.zeros(2, 3, 32, 32))
    # an accelerator cannot say so, but must neither crash nor read past the canvas
    assert render_uint8(rule, plan, pixels, extent, mode="dense").shape == (2, 3, 32, 32)


def test_a_large_cutout_on_tiny_digits_follows_the_published_law():
    rule = policy("digits_strong", 8, 1)
    extent = torch.full((50, 2), 8)
    plan = draw(rule, seed=0, stream=1, view=0, draw_B=torch.arange(50), extent_B2=extent)
    views = render_uint8(rule, plan, torch.zeros(50, 8, 8, 1, dtype=torch.uint8), extent)
    assert bool((views == 127).all()), "a side of 16 covers 8 x 8 pixels wherever its centre lies"


def test_describe_names_what_was_drawn():
    rule = policy("fixmatch_strong")
    code = torch.tensor([[CODE["Rotate"], CODE["Solarize"]]])
    ops = {"code": code, "level": torch.tensor([[4, 5]]), "sign": torch.tensor([[-1, 1]]), "applied": torch.tensor([[True, True]])}
    cut = {"box": torch.tensor([[3, 4, 19, 20]])}
    plan = Plan(({"flip": torch.tensor([True])}, {"y": torch.tensor([3]), "x": torch.tensor([6])}, ops, cut))
    assert describe(rule, plan, 0) == "flip, crop +2,-1, Rotate -12°, Solarize 128, cutout 17x17"
    plan.laws[3]["box"] = torch.tensor([[20, 16, 32, 32]])
    assert describe(rule, plan, 0).endswith("cutout 16x12"), "what lies past the edge is not counted"
    still = {**ops, "applied": torch.tensor([[False, False]])}
    plan = Plan(({"flip": torch.tensor([False])}, {"y": torch.tensor([4]), "x": torch.tensor([4])}, still, {"box": torch.tensor([[0, 0, -1, -1]])}))
    assert describe(rule, plan, 0) == "unchanged"


def test_fast_bilinear_moves_are_at_most_a_level_off():
    """One timm op on images that fill their canvas: torch's sampler against Pillow's arithmetic, whole-pixel moves exactly."""
    rule = build_policy(["center", {"randaugment": {"space": "timm", "n": 1, "p": 1.0}}], size=36, channels=3, mean=[0.5, 0.4, 0.3], std=[0.2] * 3)
    pixels = torch.randint(0, 256, (200, 36, 36, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    extent = torch.full((200, 2), 36, dtype=torch.int32)
    plan = draw(rule, seed=0, stream=1, view=0, draw_B=torch.arange(200), extent_B2=extent)
    fast, exact = (render_uint8(rule, plan, pixels, extent, mode=mode).int() for mode in ("fast", "grouped"))
    off = (fast - exact).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.02
    moved = plan.laws[1]["code"][:, 0]
    shifts = (moved == CODE["TranslateX"]) | (moved == CODE["TranslateY"])
    assert shifts.any() and (off[moved == CODE["Rotate"]] > 0).any(), "both kinds were drawn"
