"""What every source promises, held against every way in which the same pictures can be stored and read.

``test_contract_streams.py`` holds what a feed makes of them.
"""

import os
import threading

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastssl.errors import DataError
from fastssl.sources import Source, open_source
from fastssl.types import RawBatch
from tests.sources.worlds import KINDS, TOLERANCE, opened


@pytest.fixture(params=KINDS)
def source_and_truth(request, world, readers):
    return readers(request.param), world[1]["grey" if request.param.startswith("grey") else "photo"], TOLERANCE.get(request.param, 0)


def check(source, truth, tolerance, rows, out):
    source.fill(np.asarray(rows, np.int64), out)
    for slot, row in enumerate(rows):
        height, width = out.extent_B2[slot].tolist()
        assert (height, width) == truth[row].shape[:2] == tuple(source.extents_N2[row])
        assert np.abs(out.pixels_BHWC[slot, :height, :width].numpy().astype(int) - truth[row]).max() <= tolerance


def test_is_a_source_with_matching_facts(source_and_truth):
    source, truth, _ = source_and_truth
    assert isinstance(source, Source)
    assert source.num_rows == len(truth) == len(source.labels_N) == len(source.extents_N2)
    assert source.labels_N.dtype == np.int64 and source.sizes_N2 is None
    assert source.canvas == (max(t.shape[0] for t in truth), max(t.shape[1] for t in truth), truth[0].shape[2])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_in_any_order_with_repeats(source_and_truth, data):
    source, truth, tolerance = source_and_truth
    rows = data.draw(st.lists(st.integers(0, len(truth) - 1), max_size=12))
    check(source, truth, tolerance, rows, RawBatch.allocate(12, *source.canvas))


def test_writes_pixels_and_extents_only(source_and_truth):
    source, _, _ = source_and_truth
    out = RawBatch.allocate(4, *source.canvas)
    out.pixels_BHWC.fill_(9)
    before = {name: tensor.clone() for name, tensor in out.tensors().items()}
    source.fill(np.asarray([1, 0]), out)
    for name, tensor in out.tensors().items():
        if name not in ("pixels_BHWC", "extent_B2"):
            assert torch.equal(tensor, before[name])
    assert (out.pixels_BHWC[2:] == 9).all() and (out.extent_B2[2:] == 0).all()


def test_larger_canvas_takes_the_image_top_left(source_and_truth):
    source, truth, tolerance = source_and_truth
    height, width, channels = source.canvas
    check(source, truth, tolerance, [2, 0, 2], RawBatch.allocate(3, height + 3, width + 5, channels))


def test_two_threads_fill_different_batches(source_and_truth):
    source, truth, tolerance = source_and_truth
    errors = []

    def work(seed):
        random, out = np.random.RandomState(seed), RawBatch.allocate(8, *source.canvas)
        try:
            for _ in range(40):
                check(source, truth, tolerance, random.randint(0, len(truth), 8).tolist(), out)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("rows", [[-1], [0, 10**6]])
def test_unknown_rows_are_refused(source_and_truth, rows):
    source, _, _ = source_and_truth
    with pytest.raises(DataError, match="does not exist"):
        source.fill(np.asarray(rows), RawBatch.allocate(2, *source.canvas))


def test_unfit_buffers_are_refused(source_and_truth):
    source, _, _ = source_and_truth
    height, width, channels = source.canvas
    with pytest.raises(DataError, match="do not fit"):
        source.fill(np.arange(3), RawBatch.allocate(2, height, width, channels))
    with pytest.raises(DataError, match="too small"):
        source.fill(np.arange(1), RawBatch.allocate(2, height - 1, width, channels))
    with pytest.raises(DataError, match="memory"):
        source.fill(np.arange(1), RawBatch.allocate(2, height, width, channels, device="meta"))


@pytest.mark.parametrize("kind", KINDS)
def test_closed_source_says_so(world, kind):
    source = opened(world[0], kind)
    source.close()
    source.close()
    with pytest.raises(DataError, match="closed"):
        source.fill(np.arange(1), RawBatch.allocate(1, *source.canvas))


def test_the_split_is_honoured(world):
    root, _ = world
    for name in ("photo-arrays", "photo-auto", "photo-shards"):
        source = open_source(root / name, "test")
        assert source.labels_N.tolist() == [0, 0, 1, 1, 2, 2]
        source.close()


@pytest.mark.parametrize("name", ["grey-arrays", "grey-raw", "photo-auto", "photo-auto/train.beton", "photo-shards"])
def test_open_and_close_leak_no_file_and_no_thread(world, name):
    root, _ = world
    process = psutil.Process(os.getpid())

    def count():
        maps = sum(str(root) in region.path for region in process.memory_maps(grouped=False))
        return process.num_fds(), threading.active_count(), maps

    before = count()
    for _ in range(200):
        source = open_source(root / name, workers=2 if "photo" in name else 1)
        source.fill(np.arange(2), RawBatch.allocate(2, *source.canvas))
        source.close()
    del source
    assert count() == before


def test_bad_requests_name_the_valid_ones(world):
    root, _ = world
    for arguments, match in (
        ({"path": root / "grey-arrays", "split": "tset"}, "did you mean 'test'"),
        ({"path": root / "grey-arrays", "kind": "array"}, "did you mean 'arrays'"),
        ({"path": root / "grey-arrays", "kind": "ffcv"}, "--format ffcv"),
        ({"path": root / "grey-arrays", "kind": "shards"}, "--format dali"),
        ({"path": root / "grey-raw", "kind": "dali"}, "--format dali"),
        ({"path": root / "grey-raw", "device": "cpu"}, "arrays format"),
        ({"path": root / "photo-shards", "device": "cpu"}, "arrays format"),
        ({"path": root / "grey-raw", "workers": 0}, "at least 1 worker"),
        ({"path": root / "photo-auto" / "train.beton", "kind": "arrays"}, "beton"),
        ({"path": root / "nothing here"}, "does not exist"),
        ({"path": root / "grey"}, "not a converted dataset"),
    ):
        with pytest.raises(DataError, match=match):
            open_source(**arguments)
