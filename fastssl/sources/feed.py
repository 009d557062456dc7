"""Data ahead of the trainer: one thread fills a ring of fixed buffers with the streams' next steps.

The thread asks :mod:`fastssl.sources.order` which rows come, writes every column of the :class:`RawBatch` but the pixels, and lets the
stream's source write the pixels.  Memory is bounded: ``ahead + 1`` sets of buffers (:mod:`fastssl.sources.slots`) are made at the start
and reused for the whole run.  On CUDA each set is a pinned host copy and a device copy, joined by an asynchronous copy on a side stream;
on the CPU the trainer reads the ring's buffers directly.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastssl.errors import DataError, FastSSLError, TrainingError
from fastssl.sources.order import Order, indices, rank_slots
from fastssl.sources.slots import Ring, Slot
from fastssl.types import RawBatch

_POLL_S = 0.1  # how often a waiting side looks whether the other one is still alive
_CLOSE_S = 5.0  # longest time that close() waits for a source in the middle of a read


@dataclass(frozen=True)
class Stream:
    """A named list of rows of one source, visited in one order.

    All arrays have one entry per position of the list, [N]: ``rows_N`` int64 dataset rows, ``labels_N`` int64 label that a method may
    read (-1 = none), ``truth_N`` int64 hidden label for meters (-1 = unknown), ``is_labeled_N`` bool (the row is also in the labelled
    split).  ``global_batch`` is rows per step over all ranks.  With ``once`` the list is read once: positions behind its end are padding
    (``index_B`` = -1) instead of a new pass.
    """

    name: str
    source: Any  # fastssl.sources.base.Source
    rows_N: np.ndarray
    labels_N: np.ndarray
    truth_N: np.ndarray
    is_labeled_N: np.ndarray
    order: Order
    global_batch: int
    once: bool = False

    def __post_init__(self) -> None:
        lengths = {n: len(getattr(self, n)) for n in ("rows_N", "labels_N", "truth_N", "is_labeled_N")} | {"order.length": self.order.length}
        if len(set(lengths.values())) != 1:
            raise DataError(f"stream {self.name!r}: columns differ in length: {lengths}")
        low, high = int(np.min(self.rows_N)), int(np.max(self.rows_N))
        if low < 0 or high >= self.source.num_rows:
            raise DataError(
                f"stream {self.name!r} asks for rows {low}..{high}, but its source has rows 0..{self.source.num_rows - 1}; is the split from another dataset?"
            )

    def pick(self, start: int, count: int) -> np.ndarray:
        """List indices at global positions [start, start + count), int64; -1 behind the end of a stream that is read once."""
        if not self.once:
            return indices(self.order, start, count)
        positions = np.arange(start, start + count, dtype=np.int64)
        return np.where(positions < self.order.length, positions, -1)


@dataclass
class _Progress:
    """Shared by the two threads, guarded by ``Feed._changed``."""

    made: int  # the next step that the producer will make
    taken: int  # the next step that the caller will get
    free_until: int  # the producer may make steps below this one
    closed: bool = False
    error: BaseException | None = None
    doing: str = field(default="starting")


class Feed:
    """Steps ``start_step``, ``start_step + 1``, ... of several streams, read ``ahead`` steps ahead of the caller. A context manager.

    ``stop_step``: first step that is not delivered, None = endless.  ``device``: where the delivered batches live.
    ``stall_timeout_s``: longest time that :meth:`next` waits for data.  ``pack``: auto, on or off, see :class:`fastssl.sources.slots.Ring`.

    What is delivered depends only on the streams, the step and (world, rank): starting at step k gives what an earlier feed gave at k.

    Raises :class:`RecipeError` here if ``world`` does not divide a global batch, :class:`DataError` for unusable streams.
    """

    def __init__(
        self,
        streams: list[Stream],
        *,
        start_step: int = 0,
        stop_step: int | None = None,
        world: int = 1,
        rank: int = 0,
        ahead: int = 3,
        device: str | torch.device = "cpu",
        stall_timeout_s: float = 120.0,
        pack: str = "auto",
    ):
        names = [s.name for s in streams]
        if not streams or len(set(names)) != len(names):
            raise DataError(f"a feed needs streams with different names, got {names}")
        if ahead < 1:
            raise DataError(f"data.ahead must be >= 1, got {ahead}")
        self.streams = list(streams)
        self.device = torch.device(device)
        self.world, self.rank, self.ahead, self.stop_step, self.stall_timeout_s = world, rank, ahead, stop_step, stall_timeout_s
        self.waited_s = 0.0
        """Seconds the caller has spent waiting inside :meth:`next`, cumulative."""
        shares = {s.name: rank_slots(0, s.global_batch, world, rank)[1] for s in streams}
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        slots = ahead + 1 if stop_step is None else min(ahead + 1, max(1, stop_step - start_step))
        self._memory = Ring(self.streams, shares, slots, self.device, self._side, pack)
        self._ring = self._memory.slots
        self._start = start_step
        self._progress = _Progress(made=start_step, taken=start_step, free_until=start_step + slots)
        self._changed = threading.Condition()
        self._stalled = False
        self._thread = threading.Thread(target=self._produce, name="fastssl-feed", daemon=True)
        self._thread.start()

    # --- the caller's side ------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The step that the following :meth:`next` delivers."""
        return self._progress.taken

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers of the ring, host and device together."""
        return self._memory.nbytes

    @property
    def bytes_per_step(self) -> int:
        """Bytes that a step of this rank brings to the device (see :attr:`fastssl.sources.slots.Ring.bytes_per_step`)."""
        return self._memory.bytes_per_step

    def describe(self) -> str:
        """One line for a log: bytes per step, memory of the slots, and how each stream travels."""
        return self._memory.describe()

    def next(self) -> dict[str, RawBatch]:
        """The next step's batch of every stream, by stream name, on ``device``.

        The buffers belong to the caller until the following call of :meth:`next` (or :meth:`close`), which hands them back to be
        overwritten; copy what must live longer.  On CUDA the handing back is ordered behind the work that the caller has queued on its
        current stream by then, so that no synchronisation is needed.

        An error of a source is raised here, with stream, step and rows in its message, as soon as the steps made before it are consumed.
        Raises :class:`TrainingError` if nothing arrives for ``stall_timeout_s``, after the last step, and on a closed feed.
        """
        began = time.perf_counter()
        with self._changed:
            p = self._progress
            if not p.closed and (self.stop_step is None or p.taken < self.stop_step):
                self._release_previous()
                try:
                    self._wait_for_data(began + self.stall_timeout_s)
                finally:
                    self.waited_s += time.perf_counter() - began
            elif p.closed:
                raise TrainingError("the data feed is closed")
            else:
                raise TrainingError(f"the data feed ended: its last step was {self.stop_step - 1 if self.stop_step else 0}")
            slot = self._ring[(p.taken - self._start) % len(self._ring)]
            p.taken += 1
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
        return slot.device

    def __iter__(self) -> Iterator[dict[str, RawBatch]]:
        while self.stop_step is None or self._progress.taken < self.stop_step:
            yield self.next()

    def close(self) -> None:
        """Stop reading and join the thread. Idempotent.

        Returns at once if the source was found hanging, after a few seconds if it turns out to hang now; its thread dies with the process.
        """
        with self._changed:
            self._progress.closed = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=_POLL_S if self._stalled else min(_CLOSE_S, max(1.0, self.stall_timeout_s)))
        if self._side is not None and not self._thread.is_alive():
            self._side.synchronize()  # pinned memory must not go while a copy reads it

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _release_previous(self) -> None:
        p = self._progress
        previous = p.taken - 1
        if previous >= self._start and p.free_until == previous + len(self._ring):
            slot = self._ring[(previous - self._start) % len(self._ring)]
            if self._side is not None:
                slot.free.record(torch.cuda.current_stream(self.device))
            p.free_until += 1
            self._changed.notify_all()

    def _wait_for_data(self, deadline: float) -> None:
        p = self._progress
        while p.made <= p.taken:
            if p.error is not None:
                raise p.error
            if not self._thread.is_alive():
                raise TrainingError(f"the data feed's thread died before step {p.taken} without an error message")
            left = deadline - time.perf_counter()
            if left <= 0:
                self._stalled = True
                raise TrainingError(
                    f"no data for {self.stall_timeout_s:g} s at step {p.taken} (the feed was {p.doing}); "
                    "check the storage, or raise data.stall_timeout_s if it is just slow"
                )
            self._changed.wait(min(left, _POLL_S))

    # --- the producer's side ----------------------------------------------------------------------------------------------------

    def _produce(self) -> None:
        p = self._progress
        try:
            while True:
                with self._changed:
                    while not p.closed and (p.made >= p.free_until) and (self.stop_step is None or p.made < self.stop_step):
                        self._changed.wait()
                    if p.closed or (self.stop_step is not None and p.made >= self.stop_step):
                        return
                self._fill(p.made, self._ring[(p.made - self._start) % len(self._ring)])
                with self._changed:
                    p.made += 1
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is must reach the caller: a silent thread is a hang
            if not isinstance(error, Exception):  # SystemExit and the like end a thread, and must not end the caller's in its place
                error = TrainingError(f"the data feed's thread was ended by {type(error).__name__} while {p.doing}")
            with self._changed:
                p.error = error
                self._changed.notify_all()

    def _fill(self, step: int, slot: Slot) -> None:
        side = torch.cuda.stream(self._side) if self._side is not None else contextlib.nullcontext()
        with side:
            if self._side is not None and slot.used:
                slot.copied.synchronize()  # the host buffers are read by the previous copy until then
                self._side.wait_event(slot.free)
            for stream in self.streams:
                if self._progress.closed:
                    return
                self._fill_stream(step, stream, slot)
            if self._side is not None:
                slot.copied.record(self._side)
        slot.used = True

    def _fill_stream(self, step: int, stream: Stream, slot: Slot) -> None:
        host, columns = slot.host[stream.name], slot.columns[stream.name]
        start, count = rank_slots(step, stream.global_batch, self.world, self.rank)
        index = stream.pick(start, count)
        padding = index < 0
        rows = stream.rows_N[index].astype(np.int64, copy=False)  # index -1 reads the last row: padding shows a real image
        columns["row_B"][:] = np.where(padding, -1, rows)
        columns["index_B"][:] = index
        columns["draw_B"][:] = np.where(padding, -1, np.arange(start, start + count))
        columns["label_B"][:] = np.where(padding, -1, stream.labels_N[index])
        columns["truth_B"][:] = np.where(padding, -1, stream.truth_N[index])
        columns["is_labeled_B"][:] = np.where(padding, False, stream.is_labeled_N[index])
        shown = f"{rows[:8].tolist()}{' ...' if len(rows) > 8 else ''}"
        self._progress.doing = f"reading stream {stream.name!r}, step {step}, rows {shown}"
        sizes_N2, resident = getattr(stream.source, "sizes_N2", None), self._memory.resident[stream.name]
        out = slot.device[stream.name] if resident else host
        try:
            stream.source.fill(rows, out)
        except Exception as error:
            kind = type(error) if isinstance(error, FastSSLError) else TrainingError
            what = str(error) if isinstance(error, FastSSLError) else f"{type(error).__name__}: {error}"
            raise kind(f"stream {stream.name!r}, step {step}, rows {shown}: {what}") from error
        columns["size_B2"][:] = columns["extent_B2"] if sizes_N2 is None else sizes_N2[rows]
        self._memory.deliver(stream.name, slot)
        if resident and sizes_N2 is None:
            out.size_B2.copy_(out.extent_B2)  # the host never sees the extents of such a source


def eval_batches(
    source: Any,
    rows_N: np.ndarray,
    labels_N: np.ndarray,
    batch: int,
    world: int = 1,
    rank: int = 0,
    *,
    device: str | torch.device = "cpu",
    ahead: int = 2,
    stall_timeout_s: float = 120.0,
    pack: str = "auto",
) -> Iterator[RawBatch]:
    """All of ``rows_N`` in order, each exactly once over all ranks, in batches of ``batch`` rows per rank.

    Every rank yields the same number of batches, ceil(N / (batch * world)), of one shape, so that ranks may meet in collectives after
    each.  Slots behind the end of the list are padding: they hold a real image, ``index_B`` = ``row_B`` = ``draw_B`` = ``label_B`` = -1;
    count only rows where ``index_B >= 0``.  A batch is valid until the next one is asked for.
    """
    if batch < 1:
        raise DataError(f"an evaluation batch needs at least one row, got {batch}")
    n = len(rows_N)
    labels_N = np.asarray(labels_N)
    stream = Stream("eval", source, np.asarray(rows_N), labels_N, labels_N, labels_N >= 0, Order("sequential", n), batch * world, once=True)
    steps = -(-n // (batch * world))
    with Feed([stream], stop_step=steps, world=world, rank=rank, ahead=ahead, device=device, stall_timeout_s=stall_timeout_s, pack=pack) as feed:
        for batches in feed:
            yield batches["eval"]
