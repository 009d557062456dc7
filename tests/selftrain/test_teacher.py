"""The teacher's scores: log-odds that do not saturate, and the same pixels as in evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastssl.engine.evaluate import evaluate_run
from fastssl.engine.train import train
from fastssl.errors import FastSSLError
from fastssl.selftrain.score import Pool, open_log, work
from fastssl.selftrain.teacher import load_scorer, log_odds
from fastssl.sources.base import open_source
from tests.helpers import make_dataset, tiny_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    data = make_dataset(folder / "data", train=96, test=60)
    return data, train(tiny_recipe(data, folder / "runs", "optim.lr=0.05", "checkpoint.keep=9", method="erm"), run_dir=folder / "run")


@pytest.mark.parametrize("p", [1, 3, 7])
def test_log_odds_equal_the_formula(p):
    torch.manual_seed(0)
    logits = torch.randn(50, 7) * torch.tensor([0.1, 1.0, 10.0, 60.0, 300.0]).repeat(10)[:, None]
    cls, score = log_odds(logits, p)
    z = logits.double()
    others = torch.stack([torch.cat([z[:, :c], z[:, c + 1 :]], 1).logsumexp(1) for c in range(7)], 1)
    exact, order = (z - others).topk(p, dim=1)
    assert (order == cls).all() and torch.allclose(score.double(), exact, rtol=2e-6, atol=2e-5)
    assert (score[:, 1:] <= score[:, :-1] + 1e-5).all()


def test_scores_of_confident_images_differ():
    """In bfloat16 or float32 these probabilities are all 1."""
    logits = torch.zeros(5, 10)
    logits[:, 4] = torch.tensor([20.0, 25.0, 30.0, 60.0, 90.0])
    cls, score = log_odds(logits, 2)
    assert (logits.softmax(1)[1:, 4] == 1).all() and (cls[:, 0] == 4).all()
    assert (score[:, 0].diff() > 4).all() and torch.isfinite(score).all()


def test_log_odds_grow_with_the_probability_but_logits_do_not_across_images():
    logits = torch.tensor([[5.0, 4.9, 0.0], [3.0, 0.0, 0.0]])
    _, score = log_odds(logits, 1)
    assert logits[0, 0] > logits[1, 0] and score[0, 0] < score[1, 0] and logits.softmax(1)[0, 0] < logits.softmax(1)[1, 0]


@pytest.mark.parametrize("batch", [7, 256])
def test_accuracy_through_scoring_is_the_evaluations(trained, batch):
    _, run = trained
    scorer = load_scorer(run, device=CPU, batch=batch)
    assert scorer.accuracy() == pytest.approx(evaluate_run(run, "last")["eval/top1"], abs=1e-9)
    assert scorer.identity["teacher"]["weights"] == "teacher" and scorer.precision == "no"


def test_another_channel_order_would_be_noticed(trained):
    """The guard can fail: with the channels reversed the accuracy is another one."""
    _, run = trained
    scorer = load_scorer(run, device=CPU)
    right = scorer.accuracy()
    logits = scorer.logits
    scorer.logits = lambda x: logits(x.flip(1))
    assert abs(scorer.accuracy() - right) > 5


def test_rows_are_scored_in_order_whatever_the_batch(trained):
    data, run = trained
    source = open_source(data, "train")
    rows = np.array([5, 90, 3, 3, 41, 60, 7, 8, 9])
    found = [load_scorer(run, device=CPU, batch=batch).score(source, rows, 4) for batch in (4, 9, 64)]
    for cls, score in found[1:]:
        assert (cls == found[0][0]).all() and np.allclose(score, found[0][1], atol=1e-4)
    assert (found[0][1][2] == found[0][1][3]).all() and (np.sort(found[0][0], axis=1) == np.arange(4)).all()


def test_bfloat16_backbone_keeps_a_float32_head(trained):
    _, run = trained
    exact, half = load_scorer(run, device=CPU), load_scorer(run, device=CPU, precision="bf16")
    x = torch.randn(16, 3, 8, 8)
    seen = []
    half.network.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert half.logits(x).dtype == torch.float32 and seen == [torch.float32]
    assert (half.logits(x) - exact.logits(x)).abs().max() < 0.2 and not torch.equal(half.logits(x), exact.logits(x))
    assert exact.identity != half.identity


def test_the_pool_is_the_unlabeled_rows_of_the_teachers_split(trained, tmp_path):
    data, run = trained
    scorer = load_scorer(run, device=CPU, batch=16)
    log = open_log(tmp_path / "log", scorer, Pool(), p=10, unit_rows=20)
    assert log.num_rows == 96 - 8 - 12 and log.p == 4 and log.rows(log.units[0]).tolist() == list(range(8, 28))
    work(log, scorer, say=lambda text: None)
    assert open_log(tmp_path / "log", load_scorer(run, device=CPU, batch=16), Pool(), p=10, unit_rows=20).missing() == []
    ids = np.concatenate([part.id_N for part in log.parts()])
    assert ids.tolist() == list(range(8, 84)), "labelled and held-out rows are never scored"
    everything = open_log(tmp_path / "all", scorer, Pool(rows="all", split="test"), unit_rows=20)
    assert everything.num_rows == 60


def test_what_is_refused(trained, tmp_path):
    data, run = trained
    scorer = load_scorer(run, device=CPU)
    other = make_dataset(tmp_path / "other")
    with pytest.raises(FastSSLError, match="needs a label split"):
        open_log(tmp_path / "log", scorer, Pool(path=str(other)))
    with pytest.raises(FastSSLError, match="must be one of unlabeled, all"):
        Pool(rows="unlabelled")
    with pytest.raises(FastSSLError, match="no run folder"):
        load_scorer(tmp_path, device=CPU)
    open_log(tmp_path / "log", scorer, Pool())
    with pytest.raises(FastSSLError, match="teacher differs"):
        open_log(tmp_path / "log", load_scorer(run, "step-00000008", device=CPU), Pool())
    with pytest.raises(FastSSLError, match="batch differs"):
        open_log(tmp_path / "log", load_scorer(run, device=CPU, batch=5), Pool())
