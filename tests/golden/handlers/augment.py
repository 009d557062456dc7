"""Published augmentation ops, exact to the bit: single ops at recorded levels, cutouts, and whole RandAugments under recorded seeds.

Where a file records only the seeds of the original's generators, its documented sequence of draws is repeated here; fastssl gets the drawn numbers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.augment import Plan, build_policy, render
from fastssl.augment import plan as plans
from fastssl.augment.ops import CODE, SPACES, OpLaw, argument
from fastssl.augment.plan_laws import cutout_box, cutout_fraction_box
from fastssl.augment.policy import Policy
from fastssl.augment.reference import render_uint8
from tests.golden.recorder import Recorder

RENAMED = {"TranslateXRel": "TranslateX", "TranslateYRel": "TranslateY", "SolarizeAdd": "SolarizeAddDark"}  # timm's names -> ours
UNIT = {"mc": 1.0, "imagenet": 1.0, "torchssl": float(1 << 24), "timm": 65536.0}  # level units per recorded level
WORD = 1 << 32
EXACT = "grouped"  # the reference without the CPU's own resize kernel, which may be a level off
CUTOUT_SIDE = 16
NORMALISED = 1e-6  # of the largest value: two float32 divisions in the original, one multiplication and one addition here

Draw = tuple[str, float, int, bool]  # op, level in the recording's units, sign, applied


def _policy(laws: list[Any], image: np.ndarray, mean: Sequence[float] = (0.5, 0.5, 0.5)) -> Policy:
    return build_policy(laws, size=image.shape[0], channels=3, mean=mean, std=(1.0, 1.0, 1.0))


def _render(policy: Policy, drawn: Sequence[dict[str, Tensor]], image: np.ndarray) -> np.ndarray:
    """One image under a batch of draws (one mapping per law after the built-in crop), uint8 [B, H, W, C]."""
    rows = len(next(iter(drawn[0].values())))
    pixels = torch.from_numpy(image).expand(rows, *image.shape).contiguous()
    extent = torch.tensor(image.shape[:2]).int().expand(rows, 2)
    return render_uint8(policy, Plan(({}, *drawn)), pixels, extent, mode=EXACT).permute(0, 2, 3, 1).numpy()


def _ops(space: str, draws: Sequence[Sequence[Draw]]) -> dict[str, Tensor]:
    """Draws [B][n] as the plan of a ``randaugment`` law. Levels stay real numbers: recorded ones need not lie on our grid of draws."""
    code, level, sign, applied = _columns(draws)
    return {"code": code, "level": level * UNIT[space], "sign": sign, "applied": applied}


def _columns(draws: Sequence[Sequence[Draw]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    code = torch.tensor([[CODE[op] for op, *_ in row] for row in draws])
    level = torch.tensor([[level for _, level, *_ in row] for row in draws], dtype=torch.float64)
    sign = torch.tensor([[sign for *_, sign, _ in row] for row in draws])
    applied = torch.tensor([[applied for *_, applied in row] for row in draws])
    return code, level, sign, applied


def _single_ops(rec: Recorder, space: str, image: np.ndarray, named: dict[str, Draw], mean: Sequence[float] = (0.5, 0.5, 0.5)) -> None:
    """Check each array of ``named`` as the image under that one op."""
    policy = _policy([{"randaugment": {"space": space, "n": 1, "p": 1.0}}], image, mean)
    for name, got in zip(named, _render(policy, [_ops(space, [[draw] for draw in named.values()])], image), strict=True):
        rec.check(name, got)


def _cutout_boxes(policy: Policy, law: int, centres: Sequence[tuple[float, float]], image: np.ndarray) -> dict[str, Tensor]:
    """Boxes of ``cutout`` around recorded centres (x, y) in pixels."""
    height, width = image.shape[:2]
    words = torch.tensor([[int(y / height * WORD), int(x / width * WORD)] for x, y in centres])
    return cutout_box(policy.laws[law], words, torch.tensor([[height, width]]).expand(len(centres), 2))


def shrinkmatch(rec: Recorder) -> None:
    image = rec.raw("image")
    for prefix, space in (("fixmatch", "mc"), ("imagenet", "imagenet")):
        found = {name: name.split(".") for name in rec.names(f"{prefix}.")}
        _single_ops(rec, space, image, {name: (p[1], float(p[2][1:]), -1 if p[3] == "neg" else 1, True) for name, p in found.items()})
    found = {name: name.split(".") for name in rec.names("torchssl.")}
    _single_ops(rec, "torchssl", image, {name: (p[1], int(p[2][1:]) / 10, 1, True) for name, p in found.items()})
    for name in rec.names():
        cut = re.fullmatch(r"(cutout|torchssl_cutout)([\d.]+)\.x([\d.]+)_y([\d.]+)", name)
        if cut is None:
            continue
        size, x, y = (float(part) for part in cut.groups()[1:])
        if cut[1] == "cutout":
            policy = _policy([{"cutout": {"side": int(size)}}], image)
            box = _cutout_boxes(policy, 1, [(x, y)], image)
        else:
            policy = _policy(["cutout_fraction"], image)
            words = [round(size / policy.laws[1]["most"] * WORD), int(y / image.shape[0] * WORD), int(x / image.shape[1] * WORD)]
            box = cutout_fraction_box(policy.laws[1], torch.tensor([words]), torch.tensor([image.shape[:2]]))
        rec.check(name, _render(policy, [box], image)[0])


def longtail(rec: Recorder) -> None:
    image, pool, levels = rec.raw("image"), rec.raw("op_names").tolist(), rec.raw("levels").tolist()
    laws = {law.op: law for law in SPACES["mc"].laws}
    rec.check("op_max", np.array([laws[op].scale or np.nan for op in pool]))
    # The published table has no bias for ops that subtract from 256 themselves.
    rec.check("op_bias", np.array([np.nan if not laws[op].scale else 0.0 if laws[op].direction < 0 else laws[op].bias for op in pool]))
    single = _policy([{"randaugment": {"space": "mc", "n": 1, "p": 1.0}}], image)
    for op in pool:
        rows = [[(op, float(level), sign, True)] for level in levels for sign in (-1, 1)]
        rec.check(f"op_{op}", _render(single, [_ops("mc", rows)], image))

    height, width = image.shape[:2]
    cut = _policy([{"cutout": {"side": CUTOUT_SIDE}}], image)
    seeds = range(len(rec.arrays["cutout_np_seed_0_5"]))
    centres = [(g.uniform(0, width), g.uniform(0, height)) for g in map(np.random.RandomState, seeds)]
    rec.check("cutout_np_seed_0_5", _render(cut, [_cutout_boxes(cut, 1, centres, image)], image))

    whole = _policy([{"randaugment": {"space": "mc", "n": 2, "p": 0.5}}, {"cutout": {"side": CUTOUT_SIDE}}], image)
    first, draws, centres = rec.hp("randaug_first_seed"), [], []
    for seed in range(first, first + len(rec.arrays["randaug_full"])):
        python, numpy = random.Random(seed), np.random.RandomState(seed)
        row = []
        for op in python.choices(pool, k=2):
            level, applied = float(numpy.randint(1, 10)), python.random() < 0.5
            sign = -1 if applied and laws[op].signed and python.random() < 0.5 else 1
            row.append((op, level, sign, applied))
        draws.append(row)
        centres.append((numpy.uniform(0, width), numpy.uniform(0, height)))
    rec.check("randaug_full", _render(whole, [_ops("mc", draws), _cutout_boxes(whole, 2, centres, image)], image))


def _validation(rec: Recorder) -> None:
    """The library's two evaluation transforms as our policies; every 4th pixel of the view is recorded, every 8th of the normalised one."""
    size, cifar10 = 224, {"mean": (0.4912, 0.4824, 0.4467), "std": (0.2471, 0.2435, 0.2616)}  # sic: its CIFAR10 means have two digits swapped
    for policy_name, image_name, name in (("tllib_eval", "image50x75", "val_default_uint8"), ("tllib_cifar_eval", "image32", "val_cifar_uint8")):
        policy, pixels = build_policy(policy_name, size=size, channels=3, **cifar10), torch.from_numpy(rec.raw(image_name)).unsqueeze(0)
        extent = torch.tensor(pixels.shape[1:3]).int().unsqueeze(0)
        plan = plans.draw(policy, seed=0, stream=2, view=0, draw_B=torch.zeros(1, dtype=torch.int64), extent_B2=extent)
        rec.check(name, render_uint8(policy, plan, pixels, extent, mode=EXACT)[0, :, ::4, ::4].permute(1, 2, 0))
    normalised = render(policy, plan, pixels, extent, torch.empty(1, 3, size, size), backend="reference")
    rec.check("val_cifar_normalized", normalised[0, :, ::8, ::8], NORMALISED, floor=1.0)


def timm(rec: Recorder) -> None:
    image, pool = rec.raw("image32"), [RENAMED.get(op, op) for op in rec.raw("op_names").tolist()]
    mean = [value / 255 for value in rec.raw("fill").tolist()]
    laws: dict[str, OpLaw] = {law.op: law for law in SPACES["timm"].laws}
    named: dict[str, Draw] = {}
    for name in rec.names("out_") + rec.names("arg_"):
        kind, op, level, sign = name.split("_")
        draw = (RENAMED.get(op, op), float(level[1:]), -1 if sign == "neg" else 1, True)
        if kind == "out":
            named[name] = draw
        else:
            code, value, signs, _ = (column[0, 0] for column in _columns([[draw]]))
            bare = laws[draw[0]].scale == 0  # ops without an argument
            rec.check(name, np.array([] if bare else [argument(SPACES["timm"], code, value * UNIT["timm"], signs).item()]), 1e-12)
    _single_ops(rec, "timm", image, named, mean)

    magnitude, deviation, probability, layers = (rec.hp(name) for name in ("magnitude", "magnitude_std", "op_prob", "num_layers"))
    draws = []
    for seed in rec.raw("seeded_seed").tolist():
        python, numpy = random.Random(seed), np.random.RandomState(seed)
        row = []
        for op in numpy.choice(pool, layers).tolist():
            applied = python.random() <= probability
            level = min(10.0, max(0.0, python.gauss(magnitude, deviation))) if applied else 0.0
            sign = -1 if applied and laws[op].signed and python.random() > 0.5 else 1
            row.append((op, level, sign, applied))
        draws.append(row)
    policy = _policy([{"randaugment": {"space": "timm", "n": layers, "p": probability}}], image, mean)
    rec.check("seeded_out", _render(policy, [_ops("timm", draws)], image))
    _validation(rec)
    rec.hp("pillow_version")  # says which Pillow drew the images; nothing depends on it


HANDLERS = {"shrinkmatch_augops_": shrinkmatch, "longtail_counts_aug_ops": longtail, "transforms_": timm}
