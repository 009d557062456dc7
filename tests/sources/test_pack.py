"""Packing: what arrives is what was sent, whatever the sizes; how many bytes that takes; when it is used."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastssl.sources import pack as packing
from fastssl.sources.pack import pack, packed_bytes, padding_share, unpack, word_bytes
from fastssl.sources.slots import is_packed


def sent(pixels, extents, out):
    """pack, a copy of the used bytes alone into a landing place full of garbage, unpack."""
    total = int(packed_bytes(extents, pixels.shape[1:]).sum())
    flat = np.full(-(-total // 8) * 8, 200, np.uint8)
    used = pack(pixels, extents, flat)
    assert used == total
    landing = torch.full((len(flat) + 16,), 77, dtype=torch.uint8)
    landing[:used] = torch.from_numpy(flat[:used])
    return unpack(landing, torch.from_numpy(extents), out)


@given(data=st.data())
def test_what_is_packed_is_what_arrives(data):
    batch, height, width = (data.draw(st.integers(1, n)) for n in (5, 9, 17))
    channels = data.draw(st.sampled_from([1, 3]))
    extents = np.asarray(data.draw(st.lists(st.tuples(st.integers(1, height), st.integers(1, width)), min_size=batch, max_size=batch)), np.int32)
    pixels = np.random.RandomState(data.draw(st.integers(0, 99))).randint(1, 256, (batch, height, width, channels)).astype(np.uint8)
    out = sent(pixels, extents, torch.full(pixels.shape, 9, dtype=torch.uint8)).numpy()
    for got, true, (h, w) in zip(out, pixels, extents.tolist(), strict=True):
        assert np.array_equal(got[:h, :w], true[:h, :w])
        assert not got[h:].any() and not got[:, w:].any()


def test_many_rounds_give_what_one_gives(monkeypatch):
    random = np.random.RandomState(0)
    pixels = random.randint(0, 256, (7, 6, 8, 3)).astype(np.uint8)
    extents = np.stack([random.randint(1, 7, 7), random.randint(1, 9, 7)], axis=1).astype(np.int32)
    whole = sent(pixels, extents, torch.empty(pixels.shape, dtype=torch.uint8))
    monkeypatch.setattr(packing, "_WORDS_AT_ONCE", 1)
    assert torch.equal(sent(pixels, extents, torch.empty(pixels.shape, dtype=torch.uint8)), whole)


@pytest.mark.parametrize("width, channels, word", [(512, 3, 8), (500, 3, 4), (30, 3, 2), (31, 3, 1), (28, 1, 4), (32, 1, 8)])
def test_words_divide_lines(width, channels, word):
    assert word_bytes(width, channels) == word


def test_packed_sizes_and_padding():
    extents = np.asarray([[375, 500], [500, 375], [500, 500]], np.int32)
    assert packed_bytes(extents, (500, 500, 3)).tolist() == [375 * 1500, 500 * 1128, 500 * 1500]  # 1125 bytes a line, rounded up to words of 4
    assert padding_share(extents, (500, 500, 3)) == pytest.approx(1 - (0.75 + 0.75 + 1) / 3)
    assert packed_bytes(np.asarray([[40_000, 60_000]], np.int32), (60_000, 60_000, 3)).tolist() == [40_000 * 180_000], "no 32-bit overflow"


def test_automatic_packing_wants_a_gpu_and_more_than_30_percent_padding():
    for padding, on_cuda, packed in ((0.31, True, True), (0.30, True, False), (0.9, False, False)):
        assert is_packed("auto", padding, on_cuda=on_cuda) is packed
        assert is_packed("on", padding, on_cuda=on_cuda) and not is_packed("off", padding, on_cuda=on_cuda)


def test_unpacking_reads_nothing_back(device):
    """Shapes depend on the canvases alone: under FakeTensorMode a data-dependent read raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out = unpack(torch.empty(4096, dtype=torch.uint8), torch.ones(4, 2, dtype=torch.int32), torch.empty(4, 8, 8, 3, dtype=torch.uint8))
    assert out.shape == (4, 8, 8, 3)
