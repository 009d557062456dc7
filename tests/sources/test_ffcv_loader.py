"""Both engines for .beton files: equal pixels, and none of FFCV's own surprises."""

import gc
import os
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from data_tools.beton_writer import BetonWriter
from data_tools.convert import convert
from fastssl.errors import DataError, FastSSLError
from fastssl.sources import open_source
from fastssl.sources.feed import Feed, Stream
from fastssl.sources.order import Order
from fastssl.types import RawBatch
from tests.data_tools.collections import idx_folder, photo_folders
from tests.sources.engines import ENGINES, NEEDS_FFCV


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    photo, grey = photo_folders(root / "photo-raw"), idx_folder(root / "grey-raw")
    return {
        "photo": convert(photo, root / "photo", format="ffcv"),  # JPEG and raw rows of different sizes
        "photo raw": convert(photo, root / "photo-raw-mode", format="ffcv", mode="raw"),
        "grey": convert(grey, root / "grey", format="ffcv"),
        "grey jpg": convert(grey, root / "grey-jpg", format="ffcv", mode="jpg"),
    }


def stream_of(source, batch, law="shuffle"):
    rows = np.arange(source.num_rows)
    labels = source.labels_N
    return Stream("train", source, rows, labels, labels, labels >= 0, Order(law, len(rows), seed=3, batch=batch), batch)


@pytest.mark.parametrize("extra", [(0, 0), (3, 5)])
@pytest.mark.parametrize("name", ["photo", "photo raw", "grey", "grey jpg"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.ffcv
@NEEDS_FFCV[1]
def test_engines_agree(datasets, name, extra, workers):
    sources = [open_source(datasets[name], engine=engine, workers=workers) for engine in ("native", "ffcv")]
    height, width, channels = sources[0].canvas
    rows = np.random.RandomState(0).randint(0, sources[0].num_rows, 17)
    outs = [RawBatch.allocate(20, height + extra[0], width + extra[1], channels) for _ in sources]
    for source, out in zip(sources, outs, strict=True):
        out.pixels_BHWC.fill_(9)
        source.fill(rows, out)
        assert np.array_equal(source.labels_N, sources[0].labels_N) and source.canvas == sources[0].canvas and source.bad_rows == 0
        source.close()
    assert torch.equal(outs[0].extent_B2, outs[1].extent_B2)
    apart = (outs[0].pixels_BHWC.int() - outs[1].pixels_BHWC.int()).abs()
    assert apart.max() <= (0 if name in ("photo raw", "grey") else 1)  # two builds of libjpeg may round differently
    assert (outs[1].pixels_BHWC[17:] == 9).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_stays_as_it_was_filled(datasets, engine):
    """FFCV hands out views of a few slots that it overwrites; here the memory is the caller's."""
    source = open_source(datasets["photo"], engine=engine, workers=2)
    outs = [RawBatch.allocate(4, *source.canvas) for _ in range(8)]
    copies = []
    for i, out in enumerate(outs):
        out.pixels_BHWC.zero_()
        source.fill((np.arange(4) + i) % source.num_rows, out)
        copies.append(out.pixels_BHWC.clone())
    assert all(torch.equal(out.pixels_BHWC, copy) for out, copy in zip(outs, copies, strict=True))
    source.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_pixels_do_not_depend_on_any_generator(datasets, engine):
    """FFCV's seed covers the order but not the crops; here nothing is drawn at all."""
    source = open_source(datasets["photo"], engine=engine)
    seen = []
    for seed in (1, 2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        out = RawBatch.allocate(6, *source.canvas)
        out.pixels_BHWC.zero_()
        source.fill(np.arange(6), out)
        seen.append(out.pixels_BHWC)
    assert torch.equal(*seen)
    source.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("law", ["shuffle", "with_replacement", "sequential"])
def test_every_order_works_on_several_ranks(datasets, engine, law):
    """FFCV has no quasi-random order on several processes; here orders are pure functions and any law works with any world size."""
    source = open_source(datasets["photo"], engine=engine)
    with Feed([stream_of(source, 6, law)], stop_step=5) as feed:
        alone = [(b["train"].row_B.clone(), b["train"].pixels_BHWC.clone(), b["train"].extent_B2.clone()) for b in feed]
    for world in (2, 3):
        for rank in range(world):
            with Feed([stream_of(source, 6, law)], stop_step=5, world=world, rank=rank) as feed:
                for step, batch in enumerate(feed):
                    mine = slice(rank * 6 // world, (rank + 1) * 6 // world)
                    assert torch.equal(batch["train"].row_B, alone[step][0][mine])
                    for slot, (height, width) in enumerate(batch["train"].extent_B2.tolist()):
                        assert torch.equal(batch["train"].pixels_BHWC[slot, :height, :width], alone[step][1][mine][slot, :height, :width])
    source.close()


def footprint():
    gc.collect()  # what other tests left behind
    process = psutil.Process(os.getpid())
    return process.num_fds(), threading.active_count(), process.num_threads()


@pytest.mark.parametrize("engine", ENGINES)
def test_early_breaks_leave_nothing_behind(datasets, engine):
    """FFCV leaves a thread for each epoch that is broken off."""
    source = open_source(datasets["photo"], engine=engine, workers=2)
    source.fill(np.arange(4), RawBatch.allocate(4, *source.canvas))
    before = footprint()
    for _ in range(20):
        with Feed([stream_of(source, 4)]) as feed:
            for _ in feed:
                break
    assert footprint() == before
    source.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["photo", "grey"])
def test_200_openings_and_fills_leave_threads_files_and_memory_flat(datasets, engine, name):
    def once():
        source = open_source(datasets[name], engine=engine, workers=2)
        for _ in range(2):
            source.fill(np.arange(6), RawBatch.allocate(6, *source.canvas))
        source.close()

    for _ in range(20):  # libraries, thread-local memory and the allocator settle
        once()
    before, memory = footprint(), psutil.Process().memory_info().rss
    for _ in range(200):
        once()
    assert footprint() == before
    assert psutil.Process().memory_info().rss - memory < 8 << 20


@pytest.mark.parametrize("engine", ENGINES)
def test_two_threads_may_fill_at_once(datasets, engine):
    """One of numba's threading layers ends the whole process when two threads meet in it."""
    source = open_source(datasets["photo"], engine=engine, workers=2)
    truth = RawBatch.allocate(source.num_rows, *source.canvas)
    truth.pixels_BHWC.zero_()
    source.fill(np.arange(source.num_rows), truth)
    wrong = []

    def work(seed):
        random, out = np.random.RandomState(seed), RawBatch.allocate(8, *source.canvas)
        for _ in range(50):
            rows = random.randint(0, source.num_rows, 8)
            out.pixels_BHWC.zero_()
            source.fill(rows, out)
            if not torch.equal(out.pixels_BHWC, truth.pixels_BHWC[rows]):
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    source.close()


def test_an_error_while_writing_surfaces_and_leaves_no_dataset(tmp_path, monkeypatch):
    """FFCV's writer waits for ever when something fails while it writes; ours raises, and nothing can be taken for a whole file."""

    def fail(*_):
        raise DataError("row 3 cannot be written")

    monkeypatch.setattr(BetonWriter, "append", fail)
    with pytest.raises(FastSSLError, match="row 3 cannot be written"):
        convert(photo_folders(tmp_path / "raw"), tmp_path / "data", format="ffcv")
    with pytest.raises(DataError):
        open_source(tmp_path / "data")


def test_a_broken_picture_does_not_hang_the_conversion(tmp_path):
    raw = photo_folders(tmp_path / "raw")
    next((raw / "train" / "dog").glob("*.jpg")).write_bytes(b"\xff\xd8\xffnot a picture")
    source = open_source(convert(raw, tmp_path / "data", format="ffcv"))
    source.fill(np.arange(source.num_rows), RawBatch.allocate(source.num_rows, *source.canvas))
    assert source.num_rows == 11 and source.bad_rows == 0
    source.close()


@pytest.mark.ffcv
@NEEDS_FFCV[1]
def test_opening_leaves_the_number_of_threads_alone(datasets):
    """FFCV's Loader sets torch's threads for the whole process to its own."""
    code = (
        "import sys, torch, numpy as np; torch.set_num_threads(2)\n"
        "from fastssl.sources import open_source; from fastssl.types import RawBatch\n"
        "source = open_source(sys.argv[1], engine='ffcv', workers=3)\n"
        "source.fill(np.arange(4), RawBatch.allocate(4, *source.canvas)); source.close()\n"
        "print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(datasets["photo"])], capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["2"], done.stderr
    assert done.stderr == ""  # no noise at the end of the process either


def test_missing_package_is_one_clear_error(datasets, monkeypatch):
    from fastssl.sources import ffcv_loader

    monkeypatch.setitem(sys.modules, "ffcv.loader", None)  # what an absent package looks like to an import
    monkeypatch.setattr(ffcv_loader, "_compile", ffcv_loader._compile.__wrapped__)  # without what this process has compiled already
    with pytest.raises(DataError, match="make ffcv"):
        open_source(datasets["photo"], engine="ffcv")
    open_source(datasets["photo"]).close()


def test_unknown_engine_names_the_known_ones(datasets):
    with pytest.raises(DataError, match="did you mean 'native'"):
        open_source(datasets["photo"], engine="natve")


def test_a_slow_image_does_not_keep_the_other_threads_idle(datasets):
    source = open_source(datasets["photo"], workers=2)
    rest_done, done = threading.Event(), []

    def work(item):
        if item == 0:
            assert rest_done.wait(30)  # the first image takes until all others are finished
        done.append(item)
        if len(done) == 9:
            rest_done.set()

    source._share(work, list(range(10)))
    assert sorted(done) == list(range(10)) and done[-1] == 0
    source.close()


def test_an_error_in_a_thread_is_raised_when_all_have_let_go(datasets):
    source = open_source(datasets["photo"], workers=3)
    running = []

    def work(item):
        running.append(item)
        time.sleep(0.01)
        running.remove(item)
        if item in (1, 2):
            raise MemoryError(f"item {item}")

    with pytest.raises(MemoryError, match="item"):
        source._share(work, list(range(6)))
    assert not running
    source.close()
