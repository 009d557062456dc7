"""Where a dataset of plain arrays lives: on the device if it is small, else it streams from its memory map. The device is a made-up one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastssl.engine import assemble
from fastssl.engine.assemble import RESIDENT_SHARE, open_rows
from fastssl.errors import DataError
from fastssl.sources import load_manifest
from tests.helpers import tiny_recipe


@pytest.fixture
def opened_on(monkeypatch, tiny_data, tmp_path):
    """open_rows on a GPU with so many bytes of memory; returns the device that the source was asked to stay on."""

    def run(memory, *overrides):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
        asked = {}
        monkeypatch.setattr(assemble, "open_source", lambda *args, **options: asked.update(options))
        open_rows(tiny_recipe(tiny_data, tmp_path, *overrides), load_manifest(tiny_data), "train", torch.device("cuda"))
        return asked["device"]

    return run


@pytest.fixture
def size(tiny_data):
    return np.load(tiny_data / "train.pixels.npy").nbytes


def test_a_small_dataset_stays_on_the_device_and_a_large_one_streams(opened_on, size):
    share = int(size / RESIDENT_SHARE)
    assert opened_on(share + 8) == torch.device("cuda")
    assert opened_on(share - 8) is None
    assert opened_on(share + 8, "data.device_resident=no") is None
    assert opened_on(share - 8, "data.device_resident=yes") == torch.device("cuda")


def test_what_cannot_fit_is_refused_with_the_numbers(opened_on, size):
    with pytest.raises(DataError, match="takes .* GB, the device has .*data.device_resident=auto"):
        opened_on(size, "data.device_resident=yes")


def test_dali_decodes_on_the_device(opened_on):
    assert opened_on(1, "data.source=dali") == torch.device("cuda")


def test_on_the_cpu_everything_streams_from_the_map(tiny_data, tmp_path, size):
    source = open_rows(tiny_recipe(tiny_data, tmp_path), load_manifest(tiny_data), "train", torch.device("cpu"))
    assert isinstance(source._pixels, np.memmap) and source.nbytes == size
    source.close()
