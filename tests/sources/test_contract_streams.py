"""What a feed makes of every kind of source: the rows, orders, resume points and pictures do not depend on who reads them, and nothing is left behind."""

import gc
import os
import threading

import numpy as np
import psutil
import pytest
import torch

from fastssl.sources.feed import Feed, Stream, eval_batches
from fastssl.sources.order import indices, parse_order
from tests.sources.worlds import KINDS, TOLERANCE

STREAM_KINDS = [kind for kind in ("photo arrays", "photo jpeg beton", "photo ffcv engine", "photo shards", "photo dali") if kind in KINDS]
LAWS = [
    "shuffle",
    "restart_drop_last",
    "with_replacement",
    "fixed_permutation",
    "distributed(replicas=2, drop_last=False)",
    "mc_cifar(replicas=2, epoch_length={epoch})",
]
N = 12  # training photographs


@pytest.fixture(params=STREAM_KINDS)
def kind(request):
    return request.param


@pytest.fixture
def source(readers, kind):
    return readers(kind)


def streams_of(source, batch, law="shuffle"):
    """A labelled stream over 5 rows and an unlabelled one over all 12, in reverse: neither length is a multiple of a batch."""
    few, every, unknown = np.array([7, 2, 10, 0, 5]), np.arange(N)[::-1].copy(), np.full(N, -1)
    labels = source.labels_N
    first = parse_order("shuffle", length=5, seed=3, batch=batch, stream="labeled")
    second = parse_order(law.format(epoch=10 * batch), length=N, seed=3, batch=2 * batch, stream="unlabeled")
    return [
        Stream("labeled", source, few, labels[few], labels[few], np.ones(5, bool), first, batch),
        Stream("unlabeled", source, every, unknown, labels[every], np.isin(every, few), second, 2 * batch),
    ]


def images(batch):
    """The pictures of a batch without their padding."""
    return [pixels[:h, :w].numpy().copy() for pixels, (h, w) in zip(batch.pixels_BHWC, batch.extent_B2.tolist(), strict=True)]


def copied(batches):
    return {n: ({k: t.clone() for k, t in b.tensors().items() if k != "pixels_BHWC"}, images(b)) for n, b in batches.items()}


def steps_of(streams, start, stop, **options):
    with Feed(streams, start_step=start, stop_step=stop, **options) as feed:
        return [copied(batches) for batches in feed]


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        for name in a:
            for key, tensor in a[name][0].items():
                assert torch.equal(tensor, b[name][0][key]), (name, key)
            assert all(np.array_equal(x, y) for x, y in zip(a[name][1], b[name][1], strict=True))


def assert_shows(pictures, rows, truth, tolerance):
    for picture, row in zip(pictures, rows, strict=True):
        assert picture.shape == truth[row].shape
        assert np.abs(picture.astype(int) - truth[row]).max() <= tolerance


def shares(source, ranks):
    """Streams of every law whose batch of 2, 6 and more rows a rank can be drawn from 12 rows."""
    for law in LAWS:
        if law != "restart_drop_last":
            yield streams_of(source, 3 * ranks, law)
        elif ranks <= 6:
            yield streams_of(source, ranks, law)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_ranks_read_their_share_of_the_law_and_see_the_right_pictures(world, source, kind, ranks):
    for streams in shares(source, ranks):
        for rank in {0, ranks // 2, ranks - 1}:
            for step, batches in enumerate(steps_of(streams, 4, 6, world=ranks, rank=rank), start=4):
                for stream in streams:
                    columns, pictures = batches[stream.name]
                    share = stream.global_batch // ranks
                    start = step * stream.global_batch + rank * share
                    index = indices(stream.order, start, share)
                    assert columns["index_B"].tolist() == index.tolist() and columns["draw_B"].tolist() == list(range(start, start + share))
                    assert columns["row_B"].tolist() == stream.rows_N[index].tolist()
                    assert columns["label_B"].tolist() == stream.labels_N[index].tolist()
                    assert torch.equal(columns["size_B2"], columns["extent_B2"])
                    assert_shows(pictures, columns["row_B"].tolist(), world[1]["photo"], TOLERANCE.get(kind, 0))


@pytest.mark.parametrize("law", LAWS)
def test_the_number_of_ranks_changes_nothing(source, law):
    batch = 24 if law != "restart_drop_last" else 6
    whole = steps_of(streams_of(source, batch, law), 1, 3)
    for ranks in (2, 3, 6):
        parts = [steps_of(streams_of(source, batch, law), 1, 3, world=ranks, rank=rank) for rank in range(ranks)]
        for step, expected in enumerate(whole):
            for name, (columns, pictures) in expected.items():
                for key in columns:
                    assert torch.equal(torch.cat([part[step][name][0][key] for part in parts]), columns[key])
                joined = [picture for part in parts for picture in part[step][name][1]]
                assert all(np.array_equal(x, y) for x, y in zip(joined, pictures, strict=True))


@pytest.mark.parametrize("ranks, batch", [(1, 5), (2, 5), (3, 2), (5, 1), (8, 4)])
def test_evaluation_counts_each_image_once(world, source, kind, ranks, batch):
    seen = []
    for rank in range(ranks):
        for raw in eval_batches(source, np.arange(N), source.labels_N, batch, ranks, rank):
            real = raw.index_B >= 0
            rows = raw.row_B[real].tolist()
            assert_shows([p for p, r in zip(images(raw), real.tolist(), strict=True) if r], rows, world[1]["photo"], TOLERANCE.get(kind, 0))
            seen += rows
    assert sorted(seen) == list(range(N))


def test_resume_at_any_step_gives_the_same_stream(source):
    whole = steps_of(streams_of(source, 4), 0, 6)
    for start in (1, 4, 5):
        assert_same(whole[start:], steps_of(streams_of(source, 4), start, 6, ahead=1))


def test_two_feeds_of_one_source_at_once(source):
    expected = [steps_of(streams_of(source, 4), start, start + 4) for start in (0, 9)]
    with Feed(streams_of(source, 4), start_step=0) as one, Feed(streams_of(source, 4), start_step=9) as two:
        got = [(copied(one.next()), copied(two.next())) for _ in range(4)]
    assert_same(expected[0], [a for a, _ in got])
    assert_same(expected[1], [b for _, b in got])


def test_packed_transfer_delivers_the_same(source):
    assert_same(steps_of(streams_of(source, 4), 0, 4, pack="off"), steps_of(streams_of(source, 4), 0, 4, pack="on"))


def test_early_breaks_and_returns_leave_nothing_behind(source):
    process = psutil.Process(os.getpid())

    def leave_early(k):
        for batches in (feed := Feed(streams_of(source, 4), start_step=k, pack="on" if k % 2 else "off")):
            if batches["labeled"].draw_B[0] >= 4 * (k + k % 3):
                break
        feed.close()
        with pytest.raises(StopIteration):
            evaluation = eval_batches(source, np.arange(N), source.labels_N, 5)
            next(evaluation)
            evaluation.close()
            next(evaluation)

    def counts():
        gc.collect()
        return threading.active_count(), process.num_threads(), process.num_fds()

    for k in range(10):
        leave_early(k)
    before, memory = counts(), process.memory_info().rss
    for k in range(200):
        leave_early(k)
    assert counts() == before
    assert process.memory_info().rss - memory < 8 << 20


def test_all_kinds_deliver_the_same_pictures(readers):
    """Equal rows in equal order; equal pixels where no second JPEG decoder is involved, else within its tolerance."""
    reference = steps_of(streams_of(readers("photo arrays"), 6), 2, 5)
    for kind in STREAM_KINDS[1:]:
        for expected, got in zip(reference, steps_of(streams_of(readers(kind), 6), 2, 5), strict=True):
            for name, (columns, pictures) in expected.items():
                for key, tensor in columns.items():
                    assert torch.equal(tensor, got[name][0][key]), (kind, key)
                assert_shows(got[name][1], range(len(pictures)), pictures, TOLERANCE.get(kind, 0))
    grey = [kind for kind in KINDS if kind.startswith("grey")]
    exact = [steps_of(streams_of(readers(kind), 6), 0, 2) for kind in grey]
    for other in exact[1:]:
        assert_same(exact[0], other)
