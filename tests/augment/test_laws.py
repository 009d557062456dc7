"""The laws of every named policy as distributions, and the resized crop's beside torchvision's own sampling."""

import itertools
import math

import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from fastssl.augment import ABOUT, POLICIES, build_policy, draw
from fastssl.augment.ops import NORMAL_TABLE, OPS, SPACES, tables
from fastssl.augment.philox import words
from fastssl.augment.plan_laws import ORDERS, crop_box, on_canvas, words_needed
from fastssl.augment.policies import table

N, HEIGHT, WIDTH = 6000, 301, 402
KS_CRITICAL = 2.23  # of sqrt(n) D at 1e-4


def policy(spec, size=96):
    return build_policy(spec, size=size, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)


def plan_of(rule, draws=range(N), *, seed=11, stream=1, view=0, height=HEIGHT, width=WIDTH):
    draws = torch.as_tensor(draws, dtype=torch.int64)
    return draw(rule, seed=seed, stream=stream, view=view, draw_B=draws, extent_B2=torch.tensor([height, width]).expand(len(draws), 2))


def chi_square_is_small(values, cells):
    """Chi-square of int64 ``values`` in 0..cells-1 against equal chances, at 1e-4 (Wilson and Hilferty)."""
    expected, k = values.numel() / cells, cells - 1
    found = float(((torch.bincount(values.flatten(), minlength=cells).double() - expected) ** 2 / expected).sum())
    assert found < k * (1 - 2 / (9 * k) + 3.72 * math.sqrt(2 / (9 * k))) ** 3, (found, cells)


def is_uniform(values, low, high):
    """Kolmogorov-Smirnov of continuous values."""
    values = ((values.double().flatten() - low) / (high - low)).sort().values
    n = len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((steps[1:] - values).max()), float((values - steps[:-1]).max()))
    assert values[0] >= 0 and values[-1] <= 1 and distance * math.sqrt(n) < KS_CRITICAL, distance


def happens(chosen, p):
    n = chosen.numel()
    assert abs(float(chosen.double().sum()) - n * p) <= 4.1 * math.sqrt(n * p * (1 - p)), (p, float(chosen.double().mean()))


def check_randaugment(law, drawn):
    space, pool = SPACES[law["space"]], sorted(SPACES[law["space"]].pool)
    place = torch.full((len(OPS),), -1)
    place[torch.tensor(pool)] = torch.arange(len(pool))
    for k in range(law["n"]):
        chi_square_is_small(place[drawn["code"][:, k]], len(pool))
        happens(drawn["applied"][:, k], law["p"])
        happens(drawn["sign"][:, k] > 0, 0.5)
        level = drawn["level"][:, k]
        if space.level == "integer":
            chi_square_is_small(level - space.low, space.high - space.low + 1)
        elif space.level == "uniform":
            is_uniform(level, 0, 1 << 24)
        else:  # every entry of the table of quantiles is equally likely; equal entries (the clipped end) count together
            entries, chances = torch.unique(tables(space, level.device)["normal"], return_counts=True)
            happens(level == entries[-1], float(chances[-1]) / NORMAL_TABLE)
            free = level[level < entries[-1]].double() / 65536
            cdf = torch.special.ndtr((free - space.mean) / space.std) / 0.5
            is_uniform(cdf, 0, 1)
    for a, b in itertools.combinations(range(law["n"]), 2):
        chi_square_is_small(place[drawn["code"][:, a]] * len(pool) + place[drawn["code"][:, b]], len(pool) ** 2)


def check_jitter(law, drawn):
    happens(drawn["applied"], law["p"])
    codes = {order: i for i, order in enumerate(ORDERS)}
    assert len(codes) == 24
    chi_square_is_small(torch.tensor([codes[tuple(row)] for row in drawn["order"].tolist()]), 24)
    for k, part in enumerate(("brightness", "contrast", "saturation")):
        is_uniform(drawn["factor"][:, k], max(0, 1 - law[part]), 1 + law[part])
    is_uniform(drawn["factor"][:, 3], -law["hue"], law["hue"])


def check_cutout(law, drawn, extent):
    y0, x0, y1, x1 = drawn["box"].unbind(1)
    for first, last, side in ((y0, y1, extent[0]), (x0, x1, extent[1])):
        half = law["side"] // 2
        assert torch.equal(last, (first + law["side"]).clamp_max(side)) and int(first.min()) == 0
        happens(first == 0, (half + 1) / side)
        chi_square_is_small(first[first > 0] - 1, side - half - 1)


def check_cutout_fraction(law, drawn, extent):
    y0, x0, y1, x1 = drawn["box"].unbind(1)
    free = (x0 > 0) & (x1 < extent[1]) & (y0 > 0) & (y1 < extent[0])
    width, height = (x1 - x0)[free], (y1 - y0)[free]
    assert int((width - height).abs().max()) <= 1 and int(width.max()) <= law["most"] * extent[1]
    assert abs(float((x0 == 0).double().mean()) - law["most"] / 4) < 0.02, "half of a mean side of most / 2 of the width"


def check_crop(law, drawn, extent):
    top, left, height, width = drawn["box"].unbind(1)
    assert int(top.min()) >= 0 and int((top + height).max()) <= extent[0] and int((left + width).max()) <= extent[1]
    low, high = law["scale"]
    share, ratio = height * width / (extent[0] * extent[1]), width / height
    assert low * 0.99 < float(share.min()) < low * 1.1 and high - 0.1 < float(share.max()) <= high * 1.01
    # up to half of this image every try fits, so that none is turned down for its shape; a pixel's rounding stays inside the margins
    small = (share > low * 1.02) & (share < min(high, 0.5) * 0.98)
    is_uniform(share[small], low * 1.02, min(high, 0.5) * 0.98)
    usual = small & (ratio > law["ratio"][0] * 1.01) & (ratio < law["ratio"][1] / 1.01)
    for bound, found in zip(law["ratio"], (ratio[small].min(), ratio[small].max()), strict=True):
        assert abs(float(found) / bound - 1) < 0.006
    is_uniform(ratio[usual].log(), math.log(law["ratio"][0] * 1.01), math.log(law["ratio"][1] / 1.01))
    within = torch.rand(2, N, generator=torch.Generator().manual_seed(0))
    is_uniform(((top + within[0]) / (extent[0] - height + 1))[small], 0, 1)
    is_uniform(((left + within[1]) / (extent[1] - width + 1))[small], 0, 1)


@pytest.mark.parametrize("name", POLICIES)
def test_every_named_policy_draws_its_law(name):
    rule = policy(name, 32 if "stl" in name and "longtail" in name else 96)
    # whole pixels blur the law of boxes, less so on large images
    extent = [3010, 4020] if "resized_crop" in str(rule.laws) else [HEIGHT, WIDTH]
    for law, drawn in zip(rule.laws, plan_of(rule, height=extent[0], width=extent[1]).laws, strict=True):
        if law.name == "randaugment":
            check_randaugment(law, drawn)
        elif law.name == "color_jitter":
            check_jitter(law, drawn)
        elif law.name == "resized_crop":
            check_crop(law, drawn, extent)
        elif law.name == "cutout":
            check_cutout(law, drawn, extent)
        elif law.name == "cutout_fraction":
            check_cutout_fraction(law, drawn, extent)
        elif law.name == "pad_crop":
            for axis, side in zip("yx", extent, strict=True):
                chi_square_is_small(drawn[axis], side + 2 * law["pad"] - (law["size"] or rule.size) + 1)
        elif law.name == "blur":
            happens(drawn["applied"], law["p"])
            is_uniform(drawn["sigma"], law["sigma_low"], law["sigma_high"])
        elif law.name in ("flip", "grayscale", "solarize"):
            happens(drawn["flip" if law.name == "flip" else "applied"], law["p"])
        else:
            assert law.name in ("center", "resize") and words_needed(law) == 0
        if law.name == "resize":
            extent = [int(drawn["height"][0]), int(drawn["width"][0])] if law["short"] else [law["height"] or law["size"] or rule.size] * 2
        elif law.name in ("center", "pad_crop", "resized_crop"):
            extent = [law["size"] or rule.size] * 2 if law.name == "pad_crop" else [rule.size] * 2


@pytest.mark.parametrize("name", [name for name in POLICIES if sum(map(words_needed, policy(name).laws)) > 4])
def test_a_row_drawn_a_thousand_times_and_in_both_streams(name):
    """Plans of strong views do not repeat: 1000 uses of one row in an epoch, in two streams, as two views."""
    rule, uses = policy(name), range(0, 50_000_000, 50_000)
    plans = [plan_of(rule, uses, stream=s, view=v) for s in (0, 1) for v in (0, 1)]
    flat = torch.cat([torch.cat([t.reshape(len(t), -1).double() for _, t in p.tensors()], 1) for p in plans])
    drawn_words = sum(words_needed(law) for law in rule.laws)
    distinct = len(torch.unique(flat, dim=0))
    # few small numbers (a mirror, a window, two ops that may not act) repeat by chance; shared words would leave 1000 or 2000
    assert distinct == 4000 if "resized_crop" in str(rule.laws) or drawn_words > 16 else distinct > 3900


def two_sample(a, b):
    """sqrt(n m / (n + m)) times the largest distance of the two empirical distributions."""
    a, b = a.double().sort().values, b.double().sort().values
    at = torch.cat([a, b]).unique()
    distance = (torch.searchsorted(a, at, right=True) / len(a) - torch.searchsorted(b, at, right=True) / len(b)).abs().max()
    return float(distance) * math.sqrt(len(a) * len(b) / (len(a) + len(b)))


@pytest.mark.parametrize(("height", "width"), [(375, 500), (600, 300), (9, 7)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.05, 0.429)])
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    count = 3000
    torch.manual_seed(0)
    image = Image.new("L", (width, height))
    theirs = torch.tensor([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)])
    ours = plan_of(policy([{"resized_crop": {"scale": list(scale)}}]), range(4 * count), height=height, width=width).laws[0]["box"]
    columns = {"top": 0, "left": 1, "height": 2, "width": 3}
    for name, k in columns.items():
        assert two_sample(ours[:, k], theirs[:, k]) < KS_CRITICAL, name

    # joint: which quarter of the range of each side, and where the middle lies
    def cells(box):
        top, left, h, w = box.unbind(1)
        quarter_h, quarter_w = ((4 * side - 1).div(whole, rounding_mode="floor") for side, whole in ((h, height), (w, width)))
        return quarter_h * 16 + quarter_w * 4 + (2 * top + h > height) * 2 + (2 * left + w > width)

    a, b = (torch.bincount(cells(box), minlength=64).double() for box in (ours, theirs))
    both = a + b
    seen = both >= 20
    ratio = math.sqrt(len(theirs) / len(ours))
    found = float(((a * ratio - b / ratio)[seen] ** 2 / both[seen]).sum())
    k = int(seen.sum()) - 1
    assert found < k * (1 - 2 / (9 * k) + 3.72 * math.sqrt(2 / (9 * k))) ** 3


@pytest.mark.parametrize(("height", "width"), [(40, 1000), (1000, 40), (1, 1), (1, 7), (2, 3)])
def test_extreme_shapes_fall_back_as_torchvisions_do(height, width):
    image = Image.new("L", (width, height))
    law = policy([{"resized_crop": {"scale": [0.9, 1.0]}}]).laws[0]
    ours = {tuple(row) for row in plan_of(policy([{"resized_crop": {"scale": [0.9, 1.0]}}]), range(500), height=height, width=width).laws[0]["box"].tolist()}
    torch.manual_seed(0)
    theirs = {RandomResizedCrop.get_params(image, list(law["scale"]), list(law["ratio"])) for _ in range(500)}
    assert ours == theirs


def test_boxes_are_drawn_on_the_original_and_mapped_to_its_canvas():
    rule, position = policy("imagenet_weak"), torch.arange(400)
    size = torch.tensor([[1500, 2000]]).expand(400, 2)
    whole = draw(rule, seed=3, stream=0, view=0, draw_B=position, extent_B2=size).laws[0]["box"]
    reduced = torch.tensor([[384, 512]]).expand(400, 2)
    mapped = draw(rule, seed=3, stream=0, view=0, draw_B=position, extent_B2=reduced, size_B2=size).laws[0]["box"]
    scale = 512 / 2000
    edges = torch.cat([whole[:, :2], whole[:, :2] + whole[:, 2:]], 1) * scale
    found = torch.cat([mapped[:, :2], mapped[:, :2] + mapped[:, 2:]], 1)
    assert float((found - edges).abs().max()) <= 0.5
    assert torch.equal(found, torch.floor(edges.double() + 0.5).long())
    # no size known (rows of padding, or sources that keep it): the extent is the image
    unknown = draw(rule, seed=3, stream=0, view=0, draw_B=position, extent_B2=size, size_B2=torch.zeros_like(size)).laws[0]["box"]
    assert torch.equal(unknown, whole)
    tiny = on_canvas(torch.tensor([[1999, 0, 1, 1], [0, 0, 2000, 1]]), torch.tensor([[2000, 2000]] * 2), torch.tensor([[10, 10]] * 2))
    assert tiny.tolist() == [[9, 0, 1, 1], [0, 0, 10, 1]], "at least one pixel, inside the canvas"


def test_the_box_of_given_words():
    """A try by hand: share 1/2 of 100 x 200 at ratio sqrt(3/4 * 4/3) = 1 is 100 x 100; a first try that does not fit is passed over."""
    law = policy([{"resized_crop": {"scale": [0.0001, 1.0], "ratio": [0.75, 4 / 3]}}]).laws[0]
    half, full = 1 << 31, (1 << 32) - 1
    word = torch.full((3, 22), half)
    word[1, 0] = full  # the whole area at ratio 1 is 141 x 141: higher than the image
    word[2, 0:20:2] = full
    word[:, 20], word[:, 21] = 0, full
    assert crop_box(law, word, torch.tensor([[100, 200]] * 3)).tolist() == [[0, 100, 100, 100], [0, 100, 100, 100], [0, 33, 100, 133]]
    assert words(0, 0, 0, torch.arange(2), words_needed(law)).shape == (2, 22)


def test_short_side_follows_the_original():
    rule = policy("imagenet_eval", 224)
    size, extent = torch.tensor([[375, 500], [500, 333], [256, 256], [100, 1000]]), torch.tensor([[300, 400], [512, 341], [256, 256], [51, 512]])
    drawn = draw(rule, seed=0, stream=2, view=0, draw_B=torch.arange(4), extent_B2=extent, size_B2=size).laws[0]
    assert drawn["height"].tolist() == [256, 384, 256, 256] and drawn["width"].tolist() == [341, 256, 256, 2560]


def test_the_table_of_policies_names_them_all():
    lines = table().splitlines()
    assert [line.split()[0] for line in lines] == list(POLICIES) == list(ABOUT) and max(map(len, lines)) < 160
