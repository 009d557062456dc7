"""Top-K: the bounded table and the histogram path equal brute force bit for bit, and merging is a semilattice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.errors import DataError
from fastssl.selftrain import topk as topk_module
from fastssl.selftrain.histogram import BINS, Histogram, bin_of
from fastssl.selftrain.ranking import bits_score, decode, encode, hash64, score_bits, unhash64
from fastssl.selftrain.topk import TopK


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Buffers and pieces so small that tables are cut and refilled many times."""
    monkeypatch.setattr(topk_module, "_LEAST", 7)
    monkeypatch.setattr(topk_module, "_PIECE", 13)


def brute_force(cls, score, ids, classes, k_C, seed):
    """The definition: per class the best score of each image, sorted by (score descending, hash ascending), cut to k."""
    out = []
    for c in range(classes):
        best: dict[int, float] = {}
        for cc, s, i in zip(cls.tolist(), score.tolist(), ids.tolist(), strict=True):
            if cc == c:
                best[i] = max(s, best.get(i, -np.inf))
        hashes = dict(zip(best, hash64(np.array(list(best), np.uint64), seed).tolist(), strict=True))
        order = sorted(best, key=lambda i: (-best[i], hashes[i]))[: k_C[c]]  # noqa: B023
        out += [(c, rank, np.float32(best[i]), i) for rank, i in enumerate(order)]
    return out


def listed(ranked):
    return list(zip(ranked.cls_N.tolist(), ranked.rank_N.tolist(), ranked.score_N, ranked.id_N.tolist(), strict=True))


@st.composite
def logs(draw, duplicates=True):
    """Rows [N] of a few classes with heavy ties, and k per class above and below the classes' sizes."""
    classes = draw(st.integers(1, 4))
    n = draw(st.integers(0, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    cls = rng.integers(0, classes, n)
    ids = rng.integers(0, 40, n).astype(np.uint64) if duplicates else rng.permutation(1000)[:n].astype(np.uint64)
    score = (rng.integers(-levels, levels + 1, n) / levels * 6).astype(np.float32)
    k_C = np.array(draw(st.lists(st.integers(0, 12), min_size=classes, max_size=classes)))
    return cls, score, ids, classes, k_C, draw(st.integers(0, 3))


def table(log, rows=slice(None)):
    cls, score, ids, classes, k_C, seed = log
    made = TopK(classes, k_C, seed=seed, slack=0.1)
    made.add(cls[rows], score[rows], ids[rows])
    return made


@settings(max_examples=150, deadline=None)
@given(logs(), st.randoms(use_true_random=False))
def test_the_table_is_brute_force_in_any_order(log, random):
    cls, score, ids, classes, k_C, seed = log
    wanted = brute_force(cls, score, ids, classes, k_C, seed)
    assert listed(table(log).ranked()) == wanted
    order = list(range(len(cls)))
    random.shuffle(order)
    made = table(log, np.array(order, int))
    assert listed(made.ranked()) == wanted
    assert listed(made.ranked()) == wanted, "reading changes nothing"


@settings(max_examples=100, deadline=None)
@given(logs(), st.integers(0, 60), st.integers(0, 60))
def test_merge_is_associative_commutative_and_idempotent(log, one, two):
    a, b = sorted((one, two))
    parts = [slice(0, a), slice(a, b), slice(b, None)]
    digest = table(log).ranked().digest()
    x, y, z = (table(log, part) for part in parts)
    assert x.merge(y).merge(z).ranked().digest() == digest
    x, y, z = (table(log, part) for part in parts)
    assert z.merge(y.merge(x)).ranked().digest() == digest
    assert z.merge(y).ranked().digest() == digest, "what is merged already changes nothing"
    assert z.merge(table(log)).ranked().digest() == digest
    z.add(*(column[parts[1]] for column in log[:3]))
    assert z.ranked().digest() == digest, "adding rows again changes nothing"


@settings(max_examples=100, deadline=None)
@given(logs(duplicates=False), st.booleans())
def test_histogram_then_filter_is_brute_force(log, in_two_parts):
    cls, score, ids, classes, k_C, seed = log
    counted, half = Histogram(classes), len(cls) // 2 if in_two_parts else 0
    other = Histogram(classes)
    other.add(cls[:half], score[:half])
    counted.add(cls[half:], score[half:])
    counted.merge(other)
    passed = bin_of(score) >= counted.cut(k_C)[cls]
    assert (passed == (score >= counted.bar(k_C)[cls])).all()
    assert listed(table(log, passed).ranked()) == brute_force(cls, score, ids, classes, k_C, seed)
    for c, k in enumerate(k_C):  # no bin lower than needed: without the lowest kept bin a full class would be short
        mine = bin_of(score[cls == c])
        if 0 < k <= len(mine):
            assert (mine > counted.cut(k_C)[c]).sum() < k <= (mine >= counted.cut(k_C)[c]).sum()


@pytest.mark.parametrize("p", [1, 3, 5])
@pytest.mark.parametrize("k", [2, 30])
def test_rows_of_p_classes_per_image(p, k):
    rng = np.random.default_rng(p)
    n, classes = 40, 5
    cls = np.stack([rng.permutation(classes)[:p] for _ in range(n)])
    score = rng.integers(0, 4, (n, p)).astype(np.float32)
    ids = rng.permutation(10_000)[:n].astype(np.uint64)
    made = TopK(classes, k, seed=1)
    made.add(cls, score, ids)
    wanted = brute_force(cls.ravel(), score.ravel(), np.repeat(ids, p), classes, [k] * classes, 1)
    assert listed(made.ranked()) == wanted
    if p == classes and k >= n:
        assert (np.bincount(made.ranked().cls_N) == n).all(), "an image eligible for several classes has a row in each"


def test_heavy_ties_do_not_depend_on_the_order():
    n = 500
    ids, cls = np.arange(n, dtype=np.uint64), np.zeros(n, int)
    score = np.ones(n, np.float32)
    digests, made = set(), None
    for order in (slice(None), slice(None, None, -1), np.random.default_rng(0).permutation(n)):
        made = TopK(1, 10, seed=3)
        made.add(cls[order], score[order], ids[order])
        digests.add(made.ranked().digest())
    assert len(digests) == 1
    other = TopK(1, 10, seed=4)
    other.add(cls, score, ids)
    assert other.ranked().digest() not in digests, "the seed decides among equals"


def test_images_whose_hashes_begin_alike_are_still_in_one_order():
    """Equal scores and equal first halves of the hash: the second half decides, before and after a cut."""
    hashes = (np.uint64(7) << np.uint64(32)) | np.arange(90, dtype=np.uint64)
    ids = unhash64(hashes, 5)[np.random.default_rng(0).permutation(90)]
    made = TopK(1, 10, seed=5, slack=0.1)
    made.add(np.zeros(90, int), np.ones(90, np.float32), ids)
    assert listed(made.ranked()) == brute_force(np.zeros(90, int), np.ones(90), ids, 1, [10], 5)
    assert (hash64(made.ranked().id_N, 5) == hashes[:10]).all()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=30),
    st.lists(st.integers(0, 2**64 - 1), min_size=30, max_size=30),
    st.integers(0, 9),
)
def test_codes_keep_order_and_come_back(scores, ids, seed):
    s, i = np.array(scores, np.float32), np.array(ids[: len(scores)], np.uint64)
    bits = score_bits(s)
    assert (np.diff(bits[np.argsort(s, kind="stable")].astype(np.int64)) >= 0).all()
    assert ((bits[:, None] == bits[None]) == (s[:, None] == s[None])).all()
    assert (bits_score(bits) == s).all()
    score, back = decode(*encode(bits, i, seed), seed)
    assert (score == s).all() and (back == i).all() and (unhash64(hash64(i, seed), seed) == i).all()
    assert (np.diff(bin_of(np.sort(s))) >= 0).all() and bin_of(s).min() >= 0 and bin_of(s).max() < BINS


def test_what_is_refused():
    made = TopK(3, 2)
    with pytest.raises(DataError, match="1 of 2 scores are NaN"):
        made.add(np.array([0, 1]), np.array([0.5, np.nan], np.float32), np.array([1, 2], np.uint64))
    with pytest.raises(DataError, match="class 3"):
        made.add(np.array([3]), np.array([0.5], np.float32), np.array([1], np.uint64))
    with pytest.raises(DataError, match="cannot be merged"):
        made.merge(TopK(3, 3))
    with pytest.raises(DataError, match="NaN"):
        Histogram(1).add(np.array([0]), np.array([np.nan], np.float32))
    assert len(made.ranked()) == 0, "no class has rows: empty lists, no error"


def test_memory_is_what_the_formula_says(monkeypatch):
    monkeypatch.setattr(topk_module, "_LEAST", 1)
    made = TopK(100, 1000, slack=1.0)
    assert made.nbytes == 100 * 1000 * 2 * topk_module.ROW_BYTES + 100 * 12
