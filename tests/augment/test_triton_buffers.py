"""What the Triton renderer touches: types and layouts of the view, nothing beyond its buffers, no host reads, the same scratch every time."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl.augment import POLICIES, _backend, build_policy, check_backend, draw, reference, triton_renderer
from fastssl.augment.parity import measure, sample_canvases
from fastssl.augment.triton_account import bytes_account
from fastssl.augment.triton_launch import Launcher
from fastssl.augment.triton_numbers import Numbers
from fastssl.augment.triton_passes import Shape, passes_of
from fastssl.engine.train import train
from fastssl.errors import DataError, RecipeError
from tests.bf16_shim import rounded_bf16, to_bf16
from tests.helpers import make_dataset, metric_lines, tiny_recipe, without_times

GUARD = 4096
SENTINEL = 0xA5


def policy(spec, size=32, channels=3, **options):
    return build_policy(spec, size=size, channels=channels, mean=(0.49, 0.48, 0.45)[:channels], std=(0.24, 0.25, 0.26)[:channels], **options)


def planned(rule, pixels, extent, seed=3):
    return draw(rule, seed=seed, stream=1, view=0, draw_B=torch.arange(len(pixels), device=pixels.device), extent_B2=extent)


def guarded(like):
    """(all, middle): ``middle`` has the shape of ``like`` and lies between two margins of sentinels."""
    count = like.numel() * like.element_size()
    whole = torch.full((count + 2 * GUARD,), SENTINEL, dtype=torch.uint8, device=like.device)
    return whole, whole[GUARD : GUARD + count].view(like.dtype).view(like.shape)


def untouched(whole):
    return bool((whole[:GUARD] == SENTINEL).all() and (whole[-GUARD:] == SENTINEL).all())


def test_rounding_to_bfloat16_is_torchs():
    values = torch.cat([torch.randn(5000) * 10 ** torch.randn(5000), torch.tensor([1.00390625, 1.01171875, float("inf"), -0.0, 3.4e38])])
    assert torch.equal(torch.from_numpy(to_bf16(values.numpy()).copy()).view(torch.bfloat16), values.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["plain", "imagenet_weak", "simmatchv2_crop_96"])  # the three kernels that write views
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "rows of a larger buffer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_layouts_of_the_view(dtype, layout, name, device):
    rule = policy(name)
    pixels, extent = (t.to(device) for t in sample_canvases(2, 32, 32, 3))
    plan, expected = planned(rule, pixels, extent), torch.zeros(2, 3, 32, 32, dtype=dtype, device=device)
    reference.render(rule, plan, pixels, extent, expected, mode="dense")
    buffer = torch.full((8, 3, 32, 32), 77.0, dtype=dtype, device=device)
    if layout != "contiguous":
        buffer = buffer.to(memory_format=torch.channels_last)
    out = buffer[3:5] if layout.startswith("rows") else buffer[:2]
    with rounded_bf16():
        assert triton_renderer.render(rule, plan, pixels, extent, out) is out
    assert torch.equal(out, expected)
    rest = torch.cat([buffer[:3], buffer[5:]] if layout.startswith("rows") else [buffer[2:]])
    assert bool((rest == 77).all())


@pytest.mark.parametrize("name", ["fixmatch_strong", "torchssl_strong", "imagenet_strong", "tllib_cifar_strong", "imagenet_eval"])
def test_nothing_is_written_beyond_a_buffer_or_read_beyond_the_image(name, device):
    """Sentinels around every buffer; canvases with other padding, in other surroundings, give the same views.  Extents are odd, one impossible."""
    rule = policy(name, 31)
    pixels, extent = (t.to(device) for t in sample_canvases(3, 33, 35, 3, seed=4))
    extent[2] = torch.tensor([99, -4])
    plan = planned(rule, pixels, extent.clamp(1, 33))
    kept = triton_renderer._keep(rule, 3, 33, 35, pixels.device)
    pairs = {field.name: [guarded(t) for t in getattr(kept, field.name)] if field.name == "scratch" else guarded(getattr(kept, field.name))
             for field in dataclasses.fields(kept) if field.name != "passes"}  # fmt: skip
    margins = [whole for pair in pairs.values() for whole, _ in (pair if isinstance(pair, list) else [pair])]
    for field, pair in pairs.items():
        setattr(kept, field, [middle for _, middle in pair] if isinstance(pair, list) else pair[1])
    views = []
    for noise in (0, 255):
        whole, out = guarded(torch.empty(3, 31, 31, 3, device=device))
        margins.append(whole)
        canvas_whole, canvas = guarded(pixels)
        canvas_whole.fill_(noise)
        inside_h, inside_w = extent[:, 0].clamp(1, 33).tolist(), extent[:, 1].clamp(1, 35).tolist()
        for row, (h, w) in enumerate(zip(inside_h, inside_w, strict=True)):
            canvas[row, :h, :w] = pixels[row, :h, :w]
        triton_renderer.render(rule, plan, canvas, extent, out.permute(0, 3, 1, 2))
        views.append(out.clone())
    assert all(untouched(whole) for whole in margins)
    assert torch.equal(*views), "pixels outside the image reached the view"
    triton_renderer._KEPT.clear()


def test_a_canvas_may_be_a_part_of_a_larger_one(device):
    rule = policy("fixmatch_strong")
    pixels, extent = (t.to(device) for t in sample_canvases(2, 44, 48, 3))
    part, extent = pixels[:, :32, :40], extent.clamp_max(32)
    views = [torch.zeros(2, 3, 32, 32, device=device) for _ in range(3)]
    plan = planned(rule, part, extent)
    triton_renderer.render(rule, plan, part, extent, views[0])
    triton_renderer.render(rule, plan, part.contiguous(), extent, views[1])
    triton_renderer.render(rule, plan, part.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), extent, views[2])
    assert torch.equal(views[0], views[1]) and torch.equal(views[0], views[2])


@pytest.mark.parametrize("name", POLICIES)
def test_launches_are_prepared_without_reading_the_device(name):
    """Under fake tensors any read of a value by the host raises, as it would while a graph is recorded."""
    rule = policy(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels, extent = torch.zeros(5, 40, 36, 3, dtype=torch.uint8), torch.full((5, 2), 32, dtype=torch.int32)
        out = torch.zeros(5, 3, 32, 32)
        before = triton_renderer.kept_bytes()
        calls = triton_renderer.launches(rule, planned(rule, pixels, extent), pixels, extent, out)
        assert calls and triton_renderer.kept_bytes() == before, "scratch made under a fake mode must not be remembered"


def test_scratch_is_made_once(device):
    rule = policy("torchssl_strong")
    pixels, extent = (t.to(device) for t in sample_canvases(2, 32, 32, 3))
    out = torch.zeros(2, 3, 32, 32, device=device)
    calls = [triton_renderer.launches(rule, planned(rule, pixels, extent, seed), pixels, extent, out) for seed in (0, 1)]
    assert len(calls[0]) == 6  # a table and a pass for each of three ops; cutout, mirror and crop share the last pass
    for a, b in zip(*calls, strict=True):
        assert (a.kernel, a.programs, a.constants) == (b.kernel, b.programs, b.constants), "a launch depends on what was drawn"
        for key in ("source", "out", "table"):
            if key in a.arguments:
                assert a.arguments[key].data_ptr() == b.arguments[key].data_ptr()


def test_an_empty_batch_and_wrong_buffers(device):
    rule, extent = policy("fixmatch_weak"), torch.full((2, 2), 32, dtype=torch.int32, device=device)
    pixels, out = torch.zeros(2, 32, 32, 3, dtype=torch.uint8, device=device), torch.zeros(2, 3, 32, 32, device=device)
    plan = planned(rule, pixels, extent)
    assert triton_renderer.render(rule, plan.rows(slice(0)), pixels[:0], extent[:0], out[:0]).shape == (0, 3, 32, 32)
    with pytest.raises(DataError, match=r"uint8 \[B, H, W, 3\]"):
        triton_renderer.render(rule, plan, pixels[..., :1], extent, out)
    with pytest.raises(DataError, match="output buffer"):
        triton_renderer.render(rule, plan, pixels, extent, out[:, :, :28])


def test_what_triton_cannot_do_is_named(monkeypatch):
    assert check_backend(policy("fixmatch_strong"), "auto", "cuda") == "triton"
    assert check_backend(policy("fixmatch_strong"), "auto", "cpu") == "reference"
    assert check_backend(policy("fixmatch_strong"), "reference", "cuda") == "reference"
    composed = policy("imagenet_randaugment", geometry="composed")
    assert check_backend(composed, "auto", "cuda") == "reference"
    with pytest.raises(RecipeError, match="'triton' lacks geometry 'composed' of policy 'imagenet_randaugment'; use backend 'reference'"):
        check_backend(composed, "triton", "cuda")
    padded = policy([{"resize": {"short": 40}}, {"pad_crop": {"pad": 4}}])
    with pytest.raises(RecipeError, match="lacks law 'resize' with short that is not followed by center"):
        check_backend(padded, "triton", "cuda")
    with pytest.raises(RecipeError, match="lacks"):
        passes_of(padded, 40, 40)
    _backend.cache_clear()
    monkeypatch.setattr("fastssl.augment.triton_launch.INTERPRETED", False)
    with pytest.raises(RecipeError, match="needs a CUDA device, not 'cpu'"):
        check_backend(policy("plain"), "triton", "cpu")
    monkeypatch.setattr("fastssl.augment.triton_renderer.INTERPRETED", False)
    pixels, extent = sample_canvases(1, 32, 32, 3)
    with pytest.raises(RecipeError, match="needs a CUDA device"):
        triton_renderer.render(policy("plain"), planned(policy("plain"), pixels, extent), pixels, extent, torch.zeros(1, 3, 32, 32))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _backend.cache_clear()
    assert check_backend(policy("plain"), "auto", "cuda") == "reference"
    with pytest.raises(RecipeError, match="needs the triton package"):
        check_backend(policy("plain"), "triton", "cuda")
    _backend.cache_clear()


NATURAL = {"fixmatch_weak": (32, (32, 32)), "fixmatch_strong": (32, (32, 32)), "torchssl_strong": (32, (32, 32))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [n for n in POLICIES if n.startswith(("fixmatch", "imagenet", "eman", "moco", "simclr", "simmatchv2"))])
def test_bytes_moved_stay_below_three_times_the_floor(name, dtype):
    size, canvas = NATURAL.get(name, (int(name.rsplit("_", 1)[1]) if name.startswith("simmatchv2") else 224, (375, 500)))
    account = bytes_account(policy(name, size), 64, canvas, dtype)
    view = size * size * 3 * (2 if dtype == torch.bfloat16 else 4)
    assert account.floor == 64 * (canvas[0] * canvas[1] * 3 + view)
    assert account.worst == sum(count for _, count in account.passes)
    assert account.mean <= account.worst and account.ratio <= 3.0, account


def test_the_account_is_of_the_passes_that_run(device):
    """Every image that a kernel reads or writes is in the account: counted once more from the launches' own shapes."""
    for name in ("fixmatch_weak", "fixmatch_strong", "torchssl_strong", "tllib_cifar_eval", "imagenet_strong"):
        rule, rows = policy(name), 3
        pixels, extent = (t.to(device) for t in sample_canvases(rows, 32, 32, 3))
        out = torch.zeros(rows, 3, 32, 32, device=device)
        image, view = 32 * 32 * 3, 32 * 32 * 3 * 4
        moved = 0
        for call in triton_renderer.launches(rule, planned(rule, pixels, extent), pixels, extent, out):
            name_of = call.kernel.__name__
            if name_of == "taps_kernel":
                moved += 2 * 4 * call.constants["OUT"] * (call.constants["K"] + 1)
            else:
                moved += image + {"table_kernel": 2 * 768, "mean_kernel": 0}.get(name_of, view if call.constants.get("FINAL") else image)
        counted = bytes_account(rule, rows, (32, 32), torch.float32)
        assert counted.worst - dict(counted.passes)["numbers"] == rows * moved, name


def test_numbers_per_row_stay_within_the_account():
    for name in POLICIES:
        rule = policy(name)
        pixels, extent = sample_canvases(2, 32, 32, 3)
        calls = triton_renderer.launches(rule, planned(rule, pixels, extent), pixels, extent, torch.zeros(2, 3, 32, 32))
        arguments = next(call.arguments for call in calls if "rows" in call.arguments)
        reals = next((call.arguments["reals"] for call in calls if "reals" in call.arguments), arguments["rows"][:, :1])
        assert arguments["rows"].shape[1] + reals.shape[1] <= 48, name


def test_timing_reports_bytes(device):
    pixels, extent = (t.to(device) for t in sample_canvases(2, 32, 32, 3))
    timing = measure(policy("fixmatch_weak"), pixels, extent, repeats=1, dtype=torch.float32)
    assert timing.eager_s > 0 and timing.bytes_floor == 2 * 32 * 32 * 3 * 5
    assert (timing.graph_s is None) == (device == "cpu")


def test_launcher_names_unknown_passes():
    rule = policy("plain")
    pixels, extent = sample_canvases(1, 32, 32, 3)
    numbers = Numbers(rule, planned(rule, pixels, extent), extent, Shape(32, 32, False))
    with pytest.raises(TypeError):
        Launcher([object()], numbers, None, 3).launches()  # type: ignore[list-item,arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares two runs on the CPU, one of them under the interpreter, which a GPU machine has off")
def test_a_run_renders_by_either_backend_with_the_same_losses(tmp_path):
    """Through the recipe's key: training and evaluation see the same pixels."""
    data = make_dataset(tmp_path / "data")
    lines = []
    for backend in ("reference", "triton"):
        recipe = tiny_recipe(data, tmp_path / backend, f"augment.backend={backend}", "train.steps=3", "train.steps_per_epoch=3", "log.every=1")
        lines.append(without_times(metric_lines(train(recipe))))
    assert lines[0] == lines[1] and len(lines[0]) == 4
