"""Order laws: purity, exact coverage, independence of world size, and equality with recorded published samplers."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.errors import RecipeError
from fastssl.sources.order import _LAWS, Order, indices, parse_order, rank_slots

GOLDEN = Path(__file__).parents[1] / "golden"


def example_order(law: str, length: int = 37, seed: int = 3, batch: int = 8) -> Order:
    """Any law at a size that suits it."""
    extra = {"distributed": {"replicas": 2}, "mc_cifar": {"replicas": 2, "epoch_length": 96}, "v2_labelled": {"replicas": 2, "epoch_length": 96}}
    return Order(law, length, seed, batch, "labeled", **extra.get(law, {}))


@given(length=st.integers(1, 70), seed=st.integers(0, 2**40), world=st.integers(1, 8), share=st.integers(1, 5), passes=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_shuffle_visits_each_index_once_per_n_draws_at_any_world(length, seed, world, share, passes):
    order = Order("shuffle", length, seed, batch=world * share)
    steps = -(-length * passes // (world * share))
    drawn = np.concatenate([indices(order, *rank_slots(t, world * share, world, r)) for t in range(steps) for r in range(world)])[: length * passes]
    for p in range(passes):
        assert sorted(drawn[p * length : (p + 1) * length]) == list(range(length))


@pytest.mark.parametrize("law", _LAWS)
@given(start=st.integers(0, 500), count=st.integers(0, 200), cut=st.integers(0, 200))
@settings(max_examples=25, deadline=None)
def test_any_split_of_a_range_gives_the_same_sequence(law, start, count, cut):
    order, cut = example_order(law), min(cut, count)
    whole = indices(order, start, count)
    assert whole.dtype == np.int64 and whole.shape == (count,)
    np.testing.assert_array_equal(whole, np.concatenate([indices(order, start, cut), indices(order, start + cut, count - cut)]))
    assert ((whole >= 0) & (whole < order.length)).all()


@pytest.mark.parametrize("law", _LAWS)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_rank_slices_end_to_end_are_the_global_sequence(law, world):
    order = example_order(law)
    pieces = [indices(order, *rank_slots(t, 8, world, r)) for t in range(15) for r in range(world)]
    np.testing.assert_array_equal(np.concatenate(pieces), indices(order, 0, 15 * 8))


def test_forty_labels_with_a_batch_of_64_span_passes():
    drawn = indices(Order("shuffle", 40, 0, 64), 0, 64 * 5)
    assert np.bincount(drawn[:64], minlength=40).min() >= 1
    assert (np.bincount(drawn, minlength=40) == 8).all()


def test_restart_drop_last_drops_the_tail_of_every_pass():
    order = Order("restart_drop_last", 37, 1, batch=8)
    drawn = indices(order, 0, 32 * 20).reshape(20, 32)
    assert all(len(set(p)) == 32 for p in drawn), "no index twice in a pass"
    assert len({tuple(p) for p in drawn}) == 20, "every pass is fresh"
    assert set(drawn.ravel()) == set(range(37)), "the dropped rows change from pass to pass"
    with pytest.raises(RecipeError, match="never fill a batch of 64"):
        Order("restart_drop_last", 40, 1, batch=64)


def test_with_replacement_is_uniform_and_repeats():
    n = 10
    drawn = indices(Order("with_replacement", n, 0), 0, 50_000)
    counts = np.bincount(drawn, minlength=n)
    chi2 = ((counts - 5000) ** 2 / 5000).sum()
    assert chi2 < 27.9, "9 degrees of freedom, p = 0.001"  # deterministic: the seed is fixed
    assert len(set(drawn[:n])) < n or len(set(drawn[n : 2 * n])) < n


def test_fixed_and_sequential():
    fixed = indices(Order("fixed_permutation", 9, 5), 0, 27).reshape(3, 9)
    assert (fixed == fixed[0]).all() and sorted(fixed[0]) == list(range(9)) and list(fixed[0]) != list(range(9))
    assert indices(Order("sequential", 4, 5), 2, 6).tolist() == [2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("law", ["shuffle", "with_replacement", "fixed_permutation", "restart_drop_last"])
def test_seed_and_stream_change_the_order(law):
    base = indices(Order(law, 100, 1, stream="labeled"), 0, 100)
    assert (base == indices(Order(law, 100, 1, stream="labeled"), 0, 100)).all()
    assert (base != indices(Order(law, 100, 2, stream="labeled"), 0, 100)).any()
    assert (base != indices(Order(law, 100, 1, stream="unlabeled"), 0, 100)).any()


def test_our_orders_never_change_between_versions():
    """Written down once: a checkpoint must resume into the same data with another NumPy."""
    assert indices(Order("shuffle", 10, 7, stream="labeled"), 5, 12).tolist() == SHUFFLE_10_SEED_7
    assert indices(Order("with_replacement", 10, 7, stream="labeled"), 4090, 12).tolist() == REPLACEMENT_10_SEED_7


SHUFFLE_10_SEED_7 = [9, 4, 3, 5, 1, 8, 7, 4, 6, 9, 3, 1]
REPLACEMENT_10_SEED_7 = [9, 0, 1, 7, 2, 3, 6, 3, 2, 2, 9, 2]


# --- recorded sequences of the published samplers ---------------------------------------------------------------------------------


def per_rank(order: Order, rank: int, first: int, count: int) -> np.ndarray:
    """Entries [first, first + count) of what ``rank`` of ``order.replicas`` reads."""
    share = order.batch // order.replicas
    steps = range(first // share, -(-(first + count) // share))
    read = np.concatenate([indices(order, *rank_slots(t, order.batch, order.replicas, rank)) for t in steps])
    return read[first - steps[0] * share :][:count]


@pytest.mark.parametrize("law, recorded", [("distributed", "distributed"), ("mc_cifar", "cifar_replacement"), ("v2_labelled", "v2_labelled")])
@pytest.mark.parametrize("share", [1, 4, 24])
def test_recorded_simmatch_family_samplers(law, recorded, share):
    gold = np.load(GOLDEN / "simmatchv2_samplers_a.npz")
    n, world, draws = int(gold["hp.dataset_len"]), int(gold["hp.world"]), int(gold["hp.samples_per_rank"])
    options = {"drop_last": False} if law == "distributed" else {"epoch_length": world * draws}
    order = Order(law, n, 0, batch=share * world, replicas=world, stream="ignored", **options)
    for epoch in gold["hp.epochs"].tolist():
        for rank in range(world):
            want = gold[f"{recorded}.r{rank}.e{epoch}"]
            np.testing.assert_array_equal(per_rank(order, rank, epoch * len(want), len(want)), want, err_msg=f"rank {rank} epoch {epoch}")


def test_recorded_long_tail_sampler_with_drop_last():
    gold = np.load(GOLDEN / "longtail_counts_sampler.npz")
    order = Order("distributed", 23, 0, batch=5)  # one process: 4 batches of 5 per pass, 3 rows dropped
    frozen = Order("distributed", 23, 0, batch=5, fixed_epoch=True)
    for epoch in range(4):
        np.testing.assert_array_equal(indices(order, epoch * 20, 20), gold[f"order_epoch{epoch}"][:20])
        np.testing.assert_array_equal(indices(frozen, epoch * 20, 20), gold["order_epoch0"][:20])


def test_distributed_batches_are_those_of_torch_with_drop_last():
    from torch.utils.data import BatchSampler, DistributedSampler

    order = Order("distributed", 50, 11, batch=12, replicas=4)
    for rank in range(4):
        want = []
        sampler = DistributedSampler(range(50), num_replicas=4, rank=rank, seed=11)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            want += list(BatchSampler(sampler, 3, drop_last=True))
        got = [indices(order, *rank_slots(t, 12, 4, rank)).tolist() for t in range(len(want))]
        assert got == want
    one_process = indices(order, 0, 12)
    assert one_process.tolist() == sum((indices(order, *rank_slots(0, 12, 4, r)).tolist() for r in range(4)), [])


def test_epoch_steps_remakes_the_loader_at_each_training_epoch():
    """SimMatch's labelled loader: 7 updates per epoch, 3 batches per pass -> epoch E starts at generator epoch 3 E."""
    plain, era = Order("distributed", 24, 0, batch=8), Order("distributed", 24, 0, batch=8, epoch_steps=7)
    for step in range(21):
        epoch, within = divmod(step, 7)
        np.testing.assert_array_equal(indices(era, step * 8, 8), indices(plain, ((3 * epoch + within // 3) * 3 + within % 3) * 8, 8))


# --- errors and cost ----------------------------------------------------------------------------------------------------------------


def test_unknown_law_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'shuffle'"):
        Order("shufle", 10)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Order("shuffle", 0), "empty list"),
        (lambda: Order("shuffle", 5, -1), "seed must be >= 0"),
        (lambda: Order("mc_cifar", 5, 0, 8), "needs epoch_length"),
        (lambda: Order("mc_cifar", 5, 0, 8, epoch_length=12), "multiple of the global batch 8"),
        (lambda: Order("distributed", 40, 0, 64), "never fill a batch"),
        (lambda: Order("distributed", 40, 0, 9, replicas=2), "not a multiple of replicas=2"),
        (lambda: Order("distributed", 40, 0, 8, drop_last=False, epoch_steps=3), "epoch_steps needs drop_last"),
        (lambda: parse_order("distributed(replica=8)", length=5), "did you mean 'replicas'"),
        (lambda: parse_order("distributed(replicas='a')", length=5), "wants int"),
        (lambda: parse_order("distributed(8)", length=5), "cannot be read"),
        (lambda: parse_order("distributed(replicas=", length=5), "cannot be read"),
        (lambda: rank_slots(0, 12, 5, 0), "1, 2, 3, 4, 6, 12"),
        (lambda: rank_slots(0, 0, 1, 0), "makes no sense"),
    ],
)
def test_impossible_orders_say_why(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_parse_order_reads_names_and_options():
    assert parse_order(" shuffle ", length=5, seed=2, stream="u") == Order("shuffle", 5, 2, stream="u")
    parsed = parse_order("mc_cifar(replicas=8, epoch_length=64)", length=5, seed=0, batch=16, epoch_length=16)
    assert parsed == Order("mc_cifar", 5, 0, 16, replicas=8, epoch_length=64)


def test_million_rows_are_cheap_after_the_first_touch_of_a_pass():
    order = Order("shuffle", 1_300_000, 0, 448, "unlabeled")
    small = Order("shuffle", 5, 0, 64, "labeled")
    indices(order, 0, 448)
    began = time.perf_counter()
    for step in range(200):
        indices(order, step * 448, 448)
        indices(small, step * 64, 64)  # many short passes must not push the long one out of the cache
    assert time.perf_counter() - began < 1.0
