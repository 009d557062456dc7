"""The PIL pipelines that the benchmark measures run the same laws as ours, so its ratio compares equal work."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.peers import POOL, pipelines
from fastssl.augment import Plan, build_policy, render
from fastssl.augment.ops import CODE, SPACES
from fastssl.augment.reference import render_uint8

RULE = build_policy([{"randaugment": {"space": "mc", "n": 1, "p": 1.0}}], size=32, channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
IMAGE = np.random.default_rng(0).integers(20, 220, (32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("place", range(14))
def test_every_op_of_the_peers_pool(place, sign, monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.25 if sign < 0 else 0.75)
    code = torch.full((9, 1), CODE[SPACES["mc"].laws[place].op])
    drawn = {"code": code, "level": torch.arange(1, 10).unsqueeze(1), "sign": torch.full_like(code, sign), "applied": torch.ones_like(code, dtype=torch.bool)}
    pixels = torch.from_numpy(IMAGE).expand(9, 32, 32, 3).contiguous()
    got = render_uint8(RULE, Plan(({}, drawn)), pixels, torch.full((9, 2), 32)).permute(0, 2, 3, 1).numpy()
    for level in range(1, 10):
        assert np.array_equal(got[level - 1], np.asarray(POOL[place](Image.fromarray(IMAGE), level))), level


def test_the_peers_last_steps_normalise_as_ours_do():
    peer = pipelines(32, RULE.mean, RULE.std)["fixmatch_weak"]
    plain = build_policy("plain", size=32, channels=3, mean=RULE.mean, std=RULE.std)
    out = torch.empty(1, 3, 32, 32)
    render(plain, Plan(({},)), torch.from_numpy(IMAGE).unsqueeze(0), torch.full((1, 2), 32), out)
    end = peer.transforms[-1](peer.transforms[-2](Image.fromarray(IMAGE)))
    assert torch.allclose(out[0], end, atol=1e-6)
