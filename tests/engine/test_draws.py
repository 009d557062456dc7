"""Numbers that methods ask for: their laws, and that nothing but (seed, step or draw position, name) decides them."""

import numpy as np
import pytest
import torch

from fastssl.engine.draws import MethodDraws, beta_quantiles
from fastssl.errors import RecipeError
from fastssl.types import Draw, RawBatch, View, Views

VIEWS = {"x": View("labeled", "weak"), "u_w": View("unlabeled", "weak")}
WISHES = {"perm": Draw("permutation", 64), "share": Draw("uniform", 2000), "mix": Draw("beta", 4000, alpha=0.75), "noise": Draw("normal", like="u_w")}


def make(step: int, positions=range(6), seed: int = 3) -> dict[str, torch.Tensor]:
    raw = RawBatch.allocate(len(positions), 8, 8)
    raw.draw_B.copy_(torch.tensor(list(positions)))
    views = Views({"x": torch.zeros(2, 3, 8, 8), "u_w": torch.zeros(len(positions), 3, 8, 8)})
    return MethodDraws(WISHES, VIEWS, seed=seed, device=torch.device("cpu"))({"unlabeled": raw}, views, torch.tensor(step))


def test_laws():
    draws = make(5)
    assert draws["perm"].sort().values.tolist() == list(range(64))
    assert 0 <= draws["share"].min() and draws["share"].max() < 1 and abs(draws["share"].mean() - 0.5) < 0.03
    assert abs(draws["mix"].mean() - 0.5) < 0.03 and abs(draws["mix"].var() - 1 / (4 * (2 * 0.75 + 1))) < 0.01
    many = make(0, range(200))["noise"]
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02 and abs((many**4).mean() - 3) < 0.15


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.75, 1.0, 4.0])
def test_beta_quantiles_against_samples(alpha):
    quantiles, n = torch.tensor(beta_quantiles(alpha)), 400_000
    assert (quantiles.diff() >= 0).all() and torch.allclose(quantiles, 1 - quantiles.flip(0), atol=1e-12)
    sampled = torch.tensor(np.random.default_rng(0).beta(alpha, alpha, n))
    for x in torch.linspace(0.02, 0.98, 25):
        assert abs((quantiles < x).double().mean() - (sampled < x).double().mean()) < 4 * 0.5 / n**0.5 + 1 / len(quantiles)


def test_numbers_depend_on_seed_step_and_position_only():
    first, again, other_step, other_seed = make(5), make(5), make(6), make(5, seed=4)
    for name in WISHES:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other_seed[name])
        assert torch.equal(first[name], other_step[name]) == (name == "noise")  # rows are keyed by their draw position instead
    assert torch.equal(make(9, range(3, 6))["noise"], first["noise"][3:]), "a rank's rows are those of the whole batch"


def test_a_draw_like_no_view_is_refused():
    with pytest.raises(RecipeError, match="u_s"):
        MethodDraws({"noise": Draw("normal", like="u_s")}, VIEWS, seed=0, device=torch.device("cpu"))
    with pytest.raises(RecipeError, match="greater than 0"):
        MethodDraws({"mix": Draw("beta", 4, alpha=0.0)}, VIEWS, seed=0, device=torch.device("cpu"))
