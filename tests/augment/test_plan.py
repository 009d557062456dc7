"""Random numbers: published generator vectors, independence from batching, and the laws' distributions."""

import math

import pytest
import torch

from fastssl.augment import build_policy, draw
from fastssl.augment.ops import OPS, SPACES
from fastssl.augment.philox import below, philox4x32, words

KNOWN = [  # (counter, key, output) of the generator's authors' test file
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def policy(spec="fixmatch_strong", size=32, channels=3):
    return build_policy(spec, size=size, channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels)


def plan_of(draws, spec="fixmatch_strong", *, seed=3, stream=1, view=0, height=32, width=32):
    draws = torch.as_tensor(draws, dtype=torch.int64)
    extent = torch.tensor([height, width], dtype=torch.int32).expand(len(draws), 2)
    return draw(policy(spec), seed=seed, stream=stream, view=view, draw_B=draws, extent_B2=extent)


def flat(plan):
    """[B, everything drawn] int64."""
    return torch.cat([t.reshape(t.shape[0], -1).long() for _, t in plan.tensors()], dim=1)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected, device):
    blocks = tuple(torch.tensor([c], device=device) for c in counter)
    assert tuple(int(w) for w in philox4x32(blocks, key)) == expected


def test_words_use_every_key():
    base = words(7, 1, 2, torch.arange(5), 6)
    assert base.shape == (5, 6) and int(base.min()) >= 0 and int(base.max()) < 1 << 32
    high = 1 << 40
    others = [words(8, 1, 2, torch.arange(5), 6), words(7 + (1 << 32), 1, 2, torch.arange(5), 6), words(7, 0, 2, torch.arange(5), 6)]
    others += [words(7, 1, 3, torch.arange(5), 6), words(7, 1, 2, torch.arange(5) + high, 6), words(-7, 1, 2, torch.arange(5), 6)]
    for other in others:
        assert not (other == base).any()
    assert torch.equal(words(7, 1, 2, torch.arange(5), 3), base[:, :3])
    with pytest.raises(ValueError, match="stream"):
        words(0, 70000, 0, torch.arange(2), 1)


@pytest.mark.parametrize("spec", ["fixmatch_weak", "fixmatch_strong", "torchssl_strong"])
def test_a_row_does_not_depend_on_its_batch(spec):
    whole = flat(plan_of(range(100, 164), spec))
    split = torch.cat([flat(plan_of(range(a, a + 16), spec)) for a in range(100, 164, 16)])
    assert torch.equal(whole, split)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flat(plan_of(order + 100, spec)), whole[order])


def test_the_size_of_a_view_moves_its_own_crop_only():
    """Each law takes a fixed run of a row's words: neither another law's bound nor another view's size can shift them."""
    extent, position = torch.full((500, 2), 40), torch.arange(500)
    small, large = (draw(policy(size=size), seed=3, stream=1, view=0, draw_B=position, extent_B2=extent) for size in (32, 40))
    for law, (a, b) in enumerate(zip(small.laws, large.laws, strict=True)):
        for key in a:
            assert law in (1, 3) or torch.equal(a[key], b[key]), key  # offsets and boxes scale with the view
    assert int(small.laws[1]["y"].max()) == 16 and int(large.laws[1]["y"].max()) == 8
    resized = draw(policy([{"resize": {"size": 256}}, "flip", "pad_crop"]), seed=3, stream=1, view=0, draw_B=position, extent_B2=extent)
    assert torch.equal(resized.laws[1]["flip"], small.laws[0]["flip"]), "resize takes no random number"
    assert int(resized.laws[2]["y"].max()) > 200, "offsets follow the resized image"


def test_every_use_of_a_row_and_every_view_and_stream_differs():
    """Five whole-number words and eight more per row: 1000 uses, two streams and two views must not share a plan."""
    plans = torch.cat([flat(plan_of(range(0, 50000, 50), stream=s, view=v)) for s in (0, 1) for v in (0, 1)])
    # flip x 81 crops x ops x cutout: chance repeats among 4000 are possible but rare; identical streams would give 1000
    assert len(torch.unique(plans, dim=0)) > 3990
    keyed = torch.cat([words(3, s, v, torch.arange(0, 50000, 50), 13) for s in (0, 1) for v in (0, 1)])
    assert len(torch.unique(keyed, dim=0)) == 4000


def test_recorded_plan_stays_the_same():
    """Guards resumed and repeated runs: these integers must never change."""
    plan = plan_of([0, 1, 2, 1 << 33], seed=2024)
    assert torch.equal(flat(plan), RECORDED)


def chi_square(values, cells):
    expected = len(values) / cells
    return float(((torch.bincount(values, minlength=cells).double() - expected) ** 2 / expected).sum())


def critical(cells):
    """Chi-square quantile at 1 - 1e-4 (Wilson and Hilferty)."""
    k = cells - 1
    return k * (1 - 2 / (9 * k) + 3.72 * math.sqrt(2 / (9 * k))) ** 3


def test_distributions_of_the_fixmatch_policy():
    n = 40000
    flip, crop, ops, cut = plan_of(range(n)).laws
    assert abs(float(flip["flip"].double().mean()) - 0.5) < 0.01
    pool = sorted(SPACES["mc"].pool)
    assert len(pool) == 14
    position = torch.zeros(len(OPS), dtype=torch.int64)
    position[torch.tensor(pool)] = torch.arange(14)
    assert set(torch.unique(ops["code"]).tolist()) == set(pool)
    for k in range(2):
        assert chi_square(position[ops["code"][:, k]], 14) < critical(14)
        assert chi_square(ops["level"][:, k] - 1, 9) < critical(9)
        assert abs(float(ops["applied"][:, k].double().mean()) - 0.5) < 0.01
        assert abs(float(ops["sign"][:, k].double().mean())) < 0.02
    pair = position[ops["code"][:, 0]] * 14 + position[ops["code"][:, 1]]
    assert chi_square(pair, 196) < critical(196), "the two ops must be drawn independently, with replacement"
    assert int(ops["level"].min()) == 1 and int(ops["level"].max()) == 9
    for axis in "yx":
        assert int(crop[axis].min()) == 0 and int(crop[axis].max()) == 8
        assert chi_square(crop[axis], 9) < critical(9)
    assert chi_square(crop["y"] * 9 + crop["x"], 81) < critical(81)
    y0, x0, y1, x1 = cut["box"].unbind(1)
    # the centre is uniform on 0..32, so the first 9 of 32 cells all give a box at 0
    assert abs(float((x0 == 0).double().mean()) - 9 / 32) < 0.01
    assert chi_square(x0[x0 > 0] - 1, 23) < critical(23)
    assert torch.equal(x1, (x0 + 16).clamp_max(32)) and torch.equal(y1, (y0 + 16).clamp_max(32))


def kolmogorov_smirnov(values, cdf):
    values = values.double().sort().values
    steps = torch.arange(1, len(values) + 1) / len(values)
    return float((steps - cdf(values)).abs().max()) * math.sqrt(len(values))


def test_continuous_magnitudes():
    ops = plan_of(range(20000), "torchssl_strong").laws[0]
    for k in range(3):
        assert kolmogorov_smirnov(ops["level"][:, k] / (1 << 24), lambda v: v) < 1.95  # 0.1 % critical value
    assert bool(ops["applied"].all())
    box = plan_of(range(20000), "torchssl_strong").laws[1]["box"]
    width = (box[:, 3] - box[:, 1] + 1)[(box[:, 1] > 0) & (box[:, 3] < 31)]
    assert int(width.min()) >= 1 and int(width.max()) <= 17


def test_normal_magnitudes_are_clipped_at_both_ends():
    ops = plan_of(range(20000), [{"randaugment": {"space": "timm"}}]).laws[1]
    m = ops["level"].flatten() / 65536
    assert abs(float((m == 10).double().mean()) - 0.5) < 0.01
    below_ten = m[m < 10]
    assert kolmogorov_smirnov(below_ten, lambda v: 2 * 0.5 * (1 + torch.erf((v - 10) / 2 / math.sqrt(2)))) < 1.95


def test_below_is_uniform_at_its_ends():
    word = torch.tensor([0, (1 << 32) - 1, 1 << 31])
    assert below(word, 9).tolist() == [0, 8, 4]


def test_offsets_follow_each_rows_extent():
    extent = torch.tensor([[32, 32], [40, 64], [8, 8]]).repeat(500, 1)
    plan = draw(policy("fixmatch_weak"), seed=0, stream=0, view=0, draw_B=torch.arange(1500), extent_B2=extent)
    y, x = plan.laws[1]["y"], plan.laws[1]["x"]
    assert int(y[0::3].max()) == 8 and int(x[1::3].max()) == 40 and int(y[1::3].max()) == 16
    assert set(y[2::3].tolist()) == {-8}, "8 + 2 * 4 padded pixels in a view of 32: one position, the middle"


RECORDED = torch.tensor(
    [
        [1, 4, 5, 3, 2, 0, 1, 2, 3, -1, 1, 0, 0, 16, 16],
        [1, 2, 0, 3, 14, 1, 1, 1, 9, 1, -1, 0, 0, 16, 16],
        [0, 6, 8, 13, 12, 1, 0, 7, 2, 1, 1, 7, 5, 23, 21],
        [0, 5, 3, 8, 8, 1, 1, 7, 2, -1, 1, 5, 15, 21, 31],
    ]
)
