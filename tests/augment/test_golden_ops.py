"""Pixels of the published augmentation code, recorded with Pillow 13: every op, every recorded level, exact."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.augment import Plan, build_policy
from fastssl.augment.ops import CODE, SPACES, argument
from fastssl.augment.plan_laws import cutout_box, cutout_fraction_box
from fastssl.augment.reference import render_uint8

GOLDEN = Path(__file__).parents[1] / "golden"
SIMMATCH = np.load(GOLDEN / "shrinkmatch_augops_a.npz")
LONGTAIL = np.load(GOLDEN / "longtail_counts_aug_ops.npz")
TIMM = np.load(GOLDEN / "transforms_s1.npz")
MODES = ("grouped", "dense")


def run_ops(space, image, draws, mode, mean=(0.5, 0.5, 0.5)):
    """Render one image under several recorded draws (op, level, sign) as one batch; uint8 [B, H, W, C]."""
    policy = build_policy([{"randaugment": {"space": space, "n": 1, "p": 1.0}}], size=image.shape[0], channels=3, mean=mean, std=(1, 1, 1))
    code, level, sign = (torch.from_numpy(np.array(column)).unsqueeze(1) for column in zip(*[(CODE[op], v, s) for op, v, s in draws], strict=True))
    plan = Plan(({}, {"code": code, "level": level, "sign": sign, "applied": torch.ones_like(code, dtype=torch.bool)}))
    pixels = torch.from_numpy(image).expand(len(draws), *image.shape).contiguous()
    extent = torch.tensor(image.shape[:2]).int().expand(len(draws), 2)
    return render_uint8(policy, plan, pixels, extent, mode=mode).permute(0, 2, 3, 1).numpy()


def assert_equal_images(got, want, names):
    wrong = {name: int((g != w).sum()) for name, g, w in zip(names, got, want, strict=True) if not np.array_equal(g, w)}
    assert not wrong, f"differing values per image: {wrong}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("prefix", "space", "count"), [("fixmatch", "mc", 57), ("imagenet", "imagenet", 66)])
def test_integer_level_pools(prefix, space, count, mode):
    names = [n for n in SIMMATCH.files if n.startswith(prefix + ".")]
    assert len(names) == count
    draws = []
    for name in names:
        _, op, level, sign = name.split(".")
        draws.append((op, int(level[1:]), -1 if sign == "neg" else 1))
    assert {d[0] for d in draws} == {law.op for law in SPACES[space].laws}
    assert_equal_images(run_ops(space, SIMMATCH["image"], draws, mode), [SIMMATCH[n] for n in names], names)


@pytest.mark.parametrize("mode", MODES)
def test_continuous_pool_of_torchssl(mode):
    names = [n for n in SIMMATCH.files if n.startswith("torchssl.")]
    assert len(names) == 42
    # the recorded magnitudes are tenths, which 24-bit levels cannot hold, so the exact real level is given
    draws = [(n.split(".")[1], int(n[-1]) / 10 * (1 << 24), 1) for n in names]
    assert_equal_images(run_ops("torchssl", SIMMATCH["image"], draws, mode), [SIMMATCH[n] for n in names], names)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("law", ["cutout", "cutout_fraction"])
def test_cutouts(law, mode):
    prefix = {"cutout": "cutout16.", "cutout_fraction": "torchssl_cutout0.3."}[law]
    names = [n for n in SIMMATCH.files if n.startswith(prefix)]
    assert len(names) == 3
    policy = build_policy([law], size=32, channels=3, mean=(0.5, 0.5, 0.5), std=(1, 1, 1))
    image = torch.from_numpy(SIMMATCH["image"]).unsqueeze(0)
    extent = torch.tensor([[32, 32]])
    for name in names:
        x, y = (float(part) for part in name[len(prefix) + 1 :].split("_y"))
        word = [round(v / 32 * (1 << 32)) for v in (y, x)]
        if law == "cutout":
            drawn = cutout_box(policy.laws[1], torch.tensor([word]), extent)
        else:
            drawn = cutout_fraction_box(policy.laws[1], torch.tensor([[round(0.3 / 0.5 * (1 << 32)), *word]]), extent)
        got = render_uint8(policy, Plan(({}, drawn)), image, extent, mode=mode)[0].permute(1, 2, 0).numpy()
        assert_equal_images([got], [SIMMATCH[name]], [name])


@pytest.mark.parametrize("mode", MODES)
def test_longtail_pool_is_the_fixmatch_pool(mode):
    """The long-tailed family's pool, recorded at three levels with both signs on another image, has FixMatch's laws."""
    draws, want, names = [], [], []
    levels = [int(v) for v in LONGTAIL["levels"]]
    for op in LONGTAIL["op_names"]:
        rows = [(level, sign) for level in levels for sign in (-1, 1)]
        for row, (level, sign) in enumerate(rows):
            draws.append((str(op), level, sign))
            want.append(LONGTAIL[f"op_{op}"][row])
            names.append(f"{op} level {level} sign {sign}")
    assert len(draws) == 84
    assert_equal_images(run_ops("mc", LONGTAIL["image"], draws, mode), want, names)


@pytest.mark.parametrize("mode", MODES)
def test_timm_pool_with_bilinear_and_mean_fill(mode):
    renamed = {"TranslateXRel": "TranslateX", "TranslateYRel": "TranslateY", "SolarizeAdd": "SolarizeAddDark"}
    names = [n for n in TIMM.files if n.startswith("out_")]
    draws = []
    for name in names:
        _, op, m, sign = name.split("_")
        draws.append((renamed.get(op, op), float(m[1:]) * 65536, -1 if sign == "neg" else 1))
    mean = [v / 255 for v in np.broadcast_to(TIMM["fill"], 3)]
    assert_equal_images(run_ops("timm", TIMM["image32"], draws, mode, mean), [TIMM[n] for n in names], names)


def test_timm_arguments():
    """The recorded arguments themselves, so that a wrong law cannot hide behind saturated pixels."""
    renamed = {"TranslateXRel": "TranslateX", "TranslateYRel": "TranslateY", "SolarizeAdd": "SolarizeAddDark"}
    seen = 0
    for name in TIMM.files:
        if name.startswith("arg_") and TIMM[name].size == 1 and np.issubdtype(TIMM[name].dtype, np.number):
            _, op, m, sign = name.split("_")
            code, level = CODE[renamed.get(op, op)], round(float(m[1:]) * 65536)
            got = argument(SPACES["timm"], torch.tensor(code), torch.tensor(level), torch.tensor(-1 if sign == "neg" else 1))
            assert float(got) == pytest.approx(float(TIMM[name].item()), abs=1e-4), name
            seen += 1
    assert seen > 60
