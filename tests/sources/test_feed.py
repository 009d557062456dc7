"""The feed: right rows in every column, resume, bounded memory, and how it fails and stops."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
import torch

from fastssl.errors import DataError, RecipeError, TrainingError
from fastssl.sources.feed import Feed, Stream, eval_batches
from fastssl.sources.order import Order, indices, rank_slots

N = 40


class FakeSource:
    """Rows whose pixels say which row they are. ``bad_row`` raises, ``hold`` blocks until set."""

    canvas = (4, 5, 3)

    def __init__(self, num_rows: int = N, bad_row: int | None = None, error: Exception | None = None, hold: threading.Event | None = None, delay: float = 0.0):
        self.num_rows = num_rows
        self.labels_N = np.arange(num_rows, dtype=np.int64) % 10
        self.bad_row, self.error, self.hold, self.delay = bad_row, error or OSError("disk on fire"), hold, delay
        self.fills = 0

    def fill(self, rows, out):
        if self.hold is not None:
            self.hold.wait()
        time.sleep(self.delay)
        if self.bad_row is not None and self.bad_row in rows.tolist():
            raise self.error
        out.pixels_BHWC.copy_(torch.from_numpy(rows % 251).to(torch.uint8).view(-1, 1, 1, 1).expand_as(out.pixels_BHWC))
        out.extent_B2.copy_(torch.tensor([4, 5], dtype=torch.int32).expand_as(out.extent_B2))
        self.fills += 1

    def close(self):
        pass


def make_streams(source=None, batch: int = 8, unlabeled_law: str = "shuffle") -> list[Stream]:
    source = source or FakeSource()
    few, every = np.array([30, 3, 17, 8, 21]), np.arange(N)[::-1].copy()
    no_label, order = np.full(N, -1), Order(unlabeled_law, N, 1, 2 * batch, "unlabeled")
    return [
        Stream("labeled", source, few, source.labels_N[few], source.labels_N[few], np.ones(5, bool), Order("shuffle", 5, 1, batch, "labeled"), batch),
        Stream("unlabeled", source, every, no_label, source.labels_N[every], np.isin(every, few), order, 2 * batch),
    ]


def snapshot(batches):
    return {name: {k: t.cpu().clone() for k, t in batch.tensors().items()} for name, batch in batches.items()}


def assert_same(a, b):
    for name in a:
        for key in a[name]:
            assert torch.equal(a[name][key], b[name][key]), (name, key)


def test_every_column_is_right(device):
    streams = make_streams()
    with Feed(streams, start_step=3, stop_step=20, device=device) as feed:
        for step, batches in enumerate(feed, start=3):
            assert list(batches) == ["labeled", "unlabeled"]
            for stream in streams:
                got, first = snapshot(batches)[stream.name], step * stream.global_batch
                index = indices(stream.order, first, stream.global_batch)
                assert got["index_B"].tolist() == index.tolist()
                assert got["row_B"].tolist() == stream.rows_N[index].tolist()
                assert got["draw_B"].tolist() == list(range(first, first + stream.global_batch))
                assert got["label_B"].tolist() == stream.labels_N[index].tolist()
                assert got["truth_B"].tolist() == stream.truth_N[index].tolist()
                assert got["is_labeled_B"].tolist() == stream.is_labeled_N[index].tolist()
                assert (got["pixels_BHWC"] == got["row_B"].view(-1, 1, 1, 1)).all() and got["extent_B2"].tolist() == [[4, 5]] * len(index)
                assert got["row_B"].dtype == torch.int64 and got["is_labeled_B"].dtype == torch.bool
            assert batches["labeled"].row_B.device.type == device
        assert step == 19 and feed.step == 20
        with pytest.raises(TrainingError, match="last step was 19"):
            feed.next()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_end_to_end_are_the_single_process_batch(world):
    with Feed(make_streams(), stop_step=6) as one:
        whole = [snapshot(b) for b in one]
    ranks = []
    for rank in range(world):
        with Feed(make_streams(), stop_step=6, world=world, rank=rank) as feed:
            ranks.append([snapshot(b) for b in feed])
    for step in range(6):
        joined = {n: {k: torch.cat([r[step][n][k] for r in ranks]) for k in whole[step][n]} for n in whole[step]}
        assert_same(whole[step], joined)


@pytest.mark.parametrize("law", ["shuffle", "with_replacement", "restart_drop_last"])
def test_resume_at_step_k_gives_the_same_batches(law):
    with Feed(make_streams(unlabeled_law=law), stop_step=12) as feed:
        whole = [snapshot(b) for b in feed]
    with Feed(make_streams(unlabeled_law=law), start_step=7, stop_step=12, ahead=1) as feed:
        again = [snapshot(b) for b in feed]
    assert len(again) == 5
    for a, b in zip(whole[7:], again, strict=True):
        assert_same(a, b)


def test_a_batch_is_untouched_until_the_following_next():
    source = FakeSource()
    with Feed(make_streams(source), ahead=2) as feed:
        for _ in range(6):
            batches = feed.next()
            before = snapshot(batches)
            deadline = time.monotonic() + 0.05
            while time.monotonic() < deadline:  # the producer has every chance to run ahead
                time.sleep(0.005)
            assert_same(before, snapshot(batches))


def test_memory_is_bounded_and_buffers_are_reused(device):
    source = FakeSource()
    with Feed(make_streams(source), ahead=3, device=device) as feed:
        size = feed.nbytes
        addresses = {feed.next()["unlabeled"].pixels_BHWC.data_ptr() for _ in range(30)}
        assert len(addresses) == 4 and feed.nbytes == size
        time.sleep(0.1)
        made = source.fills // 2
        assert made <= 30 + 3, "no more than `ahead` steps are read ahead"
    assert (size == 4 * (8 + 16) * (60 + 8 + 8 + 5 * 8 + 1)) or device == "cuda"


def test_only_time_without_data_counts_as_waiting():
    source = FakeSource(delay=0.05)
    with Feed(make_streams(source), ahead=3) as feed:
        feed.next()
        assert feed.waited_s >= 0.09, "the first step (two streams) cannot be hidden"
        start = feed.waited_s
        for step in range(1, 4):
            deadline = time.monotonic() + 10
            while source.fills < 2 * (step + 1) + 1 and time.monotonic() < deadline:  # the feed reads ahead while the caller computes
                time.sleep(0.005)
            feed.next()
        assert feed.waited_s - start < 0.25, "three hidden steps would cost 0.3 s of waiting"


@pytest.mark.parametrize("error, kind", [(OSError("disk on fire"), TrainingError), (DataError("broken picture"), DataError)])
def test_a_raising_source_is_heard_at_once_with_its_context(error, kind):
    began = time.monotonic()
    with Feed(make_streams(FakeSource(bad_row=25, error=error), unlabeled_law="sequential"), stall_timeout_s=60) as feed:
        with pytest.raises(kind, match=r"stream 'unlabeled', step 0, rows \[39, 38.*(disk on fire|broken picture)") as caught:
            feed.next()
        assert caught.value.__cause__ is error
        with pytest.raises(kind):
            feed.next()
    assert time.monotonic() - began < 30, "not only after stall_timeout_s"


def test_steps_before_the_bad_one_are_still_delivered():
    with Feed(make_streams(FakeSource(bad_row=2), unlabeled_law="sequential"), ahead=3) as feed:
        feed.next(), feed.next()  # rows 39..8
        with pytest.raises(TrainingError, match="step 2, rows .7, 6"):
            feed.next()


def test_a_stalled_source_ends_in_an_error_within_the_timeout():
    hold = threading.Event()
    try:
        began = time.monotonic()
        with Feed(make_streams(FakeSource(hold=hold)), stall_timeout_s=0.3) as feed:
            with pytest.raises(TrainingError, match=r"no data for 0.3 s at step 0 \(the feed was reading stream 'labeled', step 0, rows"):
                feed.next()
            assert 0.25 < feed.waited_s < 30
        assert time.monotonic() - began < 60, "closing does not hang either"
    finally:
        hold.set()


def test_a_dead_thread_is_noticed(monkeypatch):
    monkeypatch.setattr(Feed, "_produce", lambda self: None)
    with Feed(make_streams(), stall_timeout_s=30) as feed:
        with pytest.raises(TrainingError, match="died before step 0"):
            feed.next()


class DyingSource(FakeSource):
    """Ends its thread, instead of raising an error, at the fill with this number."""

    def __init__(self, at: int, death: type[BaseException]):
        super().__init__()
        self.at, self.death = at, death

    def fill(self, rows, out):
        if self.fills == self.at:
            raise self.death()
        super().fill(rows, out)


@pytest.mark.parametrize("death", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_thread_that_dies_at_step_k_is_an_error_at_step_k_and_does_not_end_the_caller(death):
    began = time.monotonic()
    with Feed(make_streams(DyingSource(at=5, death=death)), ahead=3, stall_timeout_s=60) as feed:
        feed.next(), feed.next()
        for _ in range(2):
            with pytest.raises(TrainingError, match=f"ended by {death.__name__} while reading stream 'unlabeled', step 2"):
                feed.next()
        assert feed.step == 2
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("k", [0, 1, 4, 9])
def test_an_error_at_step_k_comes_at_step_k_however_far_the_feed_is_ahead(k):
    class Source(FakeSource):
        def fill(self, rows, out):
            if self.fills == 2 * k:
                raise OSError("disk on fire")
            super().fill(rows, out)

    source = Source()
    with Feed(make_streams(source), ahead=4) as feed:
        for _ in range(k):
            feed.next()
        with pytest.raises(TrainingError, match=f"step {k}, rows .*disk on fire"):
            feed.next()
    assert source.fills == 2 * k, "nothing is read after an error"


def test_closing_in_the_middle_of_a_read_waits_for_it_and_starts_no_other():
    entered, hold = threading.Event(), threading.Event()

    class Source(FakeSource):
        def fill(self, rows, out):
            entered.set()
            hold.wait(30)
            super().fill(rows, out)

    source = Source()
    feed = Feed(make_streams(source))
    assert entered.wait(30)
    threading.Timer(0.2, hold.set).start()
    feed.close()
    assert source.fills == 1 and not feed._thread.is_alive()


def test_closing_while_the_source_hangs_returns_within_seconds(monkeypatch):
    monkeypatch.setattr("fastssl.sources.feed._CLOSE_S", 0.2)
    hold = threading.Event()
    try:
        feed = Feed(make_streams(FakeSource(hold=hold)), stall_timeout_s=600)
        began = time.monotonic()
        feed.close()
        assert time.monotonic() - began < 30
        with pytest.raises(TrainingError, match="closed"):
            feed.next()
    finally:
        hold.set()


class UnevenSource(FakeSource):
    """Images of different sizes on a canvas of 8x10, of which the original was twice as large; the padding is garbage."""

    canvas = (8, 10, 3)

    def __init__(self):
        super().__init__()
        self.extents_N2 = np.stack([1 + np.arange(N) % 4, 1 + np.arange(N) % 7], axis=1).astype(np.int32)
        self.sizes_N2 = 2 * self.extents_N2

    def fill(self, rows, out):
        out.pixels_BHWC.copy_(torch.from_numpy(np.random.randint(0, 256, out.pixels_BHWC.shape, np.uint8)))
        for slot, row in zip(out.pixels_BHWC.numpy(), rows.tolist(), strict=True):
            h, w = self.extents_N2[row]
            slot[:h, :w] = row + np.arange(h * w * 3).reshape(h, w, 3)
        out.extent_B2.copy_(torch.from_numpy(self.extents_N2[rows]))
        self.fills += 1


@pytest.mark.parametrize("pack", ["off", "on", "auto"])
def test_packed_and_whole_canvases_arrive_alike(device, pack):
    source = UnevenSource()
    with Feed(make_streams(source), stop_step=9, device=device, pack=pack) as feed:
        for batches in feed:
            for batch in snapshot(batches).values():
                rows = batch["row_B"].numpy()
                assert np.array_equal(batch["extent_B2"].numpy(), source.extents_N2[rows])
                assert np.array_equal(batch["size_B2"].numpy(), source.sizes_N2[rows])
                for pixels, row, (h, w) in zip(batch["pixels_BHWC"].numpy(), rows, batch["extent_B2"].tolist(), strict=True):
                    assert np.array_equal(pixels[:h, :w], row + np.arange(h * w * 3).reshape(h, w, 3))
                    assert pack != "on" or not pixels[h:].any() and not pixels[:, w:].any()


def test_sizes_are_the_extents_where_the_source_knows_no_others():
    with Feed(make_streams(), stop_step=3) as feed:
        assert all(torch.equal(b.size_B2, b.extent_B2) for batches in feed for b in batches.values())


def test_a_packed_batch_stays_untouched_until_the_following_next():
    with Feed(make_streams(UnevenSource()), ahead=2, pack="on") as feed:
        for _ in range(5):
            batches = feed.next()
            before = snapshot(batches)
            time.sleep(0.02)
            assert_same(before, snapshot(batches))


def test_bytes_per_step_and_memory_are_reported():
    columns = 8 + 8 + 5 * 8 + 1  # extent, size, five ids, one flag
    with Feed(make_streams(), ahead=3) as feed:
        assert feed.bytes_per_step == (8 + 16) * (4 * 5 * 3 + columns)
        assert feed.nbytes == 4 * feed.bytes_per_step
        assert "labeled 8 x 4x5x3 (0 % padding, whole canvases)" in feed.describe() and "in 4 slots" in feed.describe()
    source = UnevenSource()
    few = np.array([30, 3, 17, 8, 21])
    lines = -(-source.extents_N2[:, 1] * 3 // 2) * 2 * source.extents_N2[:, 0]  # canvas lines of 30 bytes: words of 2
    with Feed(make_streams(source), ahead=3, pack="on") as feed:
        assert feed.bytes_per_step == round(8 * lines[few].mean() + 16 * lines.mean() + 24 * columns)
        most = 8 * int(lines[few].max()), 16 * int(lines.max())
        packed = sum(-(-n // 8) * 8 for n in most)
        # per slot: packed bytes, canvases, and the columns twice; for all slots together: one staging canvas and one landing place per stream
        assert feed.nbytes == 4 * (packed + 24 * 240 + 2 * 24 * columns) + 24 * 240 + packed
        assert "packed)" in feed.describe()
    with Feed(make_streams(source), pack="auto") as feed:
        share = 100 * (1 - source.extents_N2.prod(axis=1).mean() / 80)
        assert f"unlabeled 16 x 8x10x3 ({share:.0f} % padding, whole canvases)" in feed.describe(), "on the CPU nothing travels"
    with pytest.raises(DataError, match="data.pack must be one of auto, on, off, got 'yes'"):
        Feed(make_streams(), pack="yes")


def test_opening_and_closing_leaks_no_threads_or_descriptors():
    source = FakeSource()

    def cycle(k: int) -> None:
        with Feed(make_streams(source)) as feed:
            for _ in range(k % 3):
                feed.next()

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    cycle(1)
    threads, files = threading.active_count(), open_files()
    for k in range(200):
        cycle(k)
    assert threading.active_count() == threads and open_files() == files


def test_closed_feed_says_so():
    feed = Feed(make_streams())
    feed.close()
    feed.close()
    with pytest.raises(TrainingError, match="closed"):
        feed.next()


def test_bad_requests_are_refused_before_anything_starts():
    threads = threading.active_count()
    with pytest.raises(RecipeError, match="cannot be shared equally by 3 processes"):
        Feed(make_streams(), world=3)
    with pytest.raises(DataError, match="different names"):
        Feed(make_streams()[:1] * 2)
    with pytest.raises(DataError, match="ahead must be"):
        Feed(make_streams(), ahead=0)
    with pytest.raises(DataError, match="rows 0..39, but its source has rows 0..29"):
        Stream("u", FakeSource(30), np.arange(N), np.zeros(N), np.zeros(N), np.zeros(N, bool), Order("shuffle", N), 8)
    with pytest.raises(DataError, match="columns differ in length"):
        Stream("u", FakeSource(), np.arange(N), np.zeros(3), np.zeros(N), np.zeros(N, bool), Order("shuffle", N), 8)
    assert threading.active_count() == threads


@pytest.mark.parametrize("count, batch, world", [(37, 8, 1), (37, 8, 2), (37, 4, 4), (40, 8, 1), (3, 8, 4), (1, 1, 1)])
def test_evaluation_reads_each_row_exactly_once_over_all_ranks(count, batch, world):
    source, rows = FakeSource(), np.arange(N)[::-1][:count].copy()
    labels = source.labels_N[rows]
    seen, lengths = [], set()
    for rank in range(world):
        got = [snapshot({"eval": b})["eval"] for b in eval_batches(source, rows, labels, batch, world, rank)]
        lengths.add(len(got))
        for b in got:
            assert len(b["index_B"]) == batch
            real = b["index_B"] >= 0
            seen += b["row_B"][real].tolist()
            assert b["label_B"][real].tolist() == labels[b["index_B"][real].numpy()].tolist()
            assert (b["row_B"][~real] == -1).all() and (b["label_B"][~real] == -1).all() and (b["draw_B"][~real] == -1).all()
            assert (b["extent_B2"] == torch.tensor([4, 5])).all(), "padding shows a real image"
    assert sorted(seen) == sorted(rows.tolist()) and len(lengths) == 1


def test_leaving_an_evaluation_early_stops_its_thread():
    threads = threading.active_count()
    batches = eval_batches(FakeSource(), np.arange(N), np.zeros(N), 4)
    next(batches)
    batches.close()
    assert threading.active_count() == threads


def test_rank_slots_of_neighbours_touch():
    assert [rank_slots(2, 12, 3, r) for r in range(3)] == [(24, 4), (28, 4), (32, 4)]
