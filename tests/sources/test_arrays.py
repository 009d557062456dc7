"""What only the arrays source does: maps, resident copies, extents."""

import numpy as np
import pytest
import torch

from data_tools.convert import convert
from fastssl.errors import DataError
from fastssl.sources import load_manifest, open_source
from fastssl.sources.arrays import ArraysSource
from fastssl.types import RawBatch
from tests.data_tools.collections import idx_folder, photo_folders


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("arrays")
    convert(idx_folder(root / "raw"), root / "grey")
    convert(photo_folders(root / "photos"), root / "photo")
    return root


def test_fill_gathers_straight_into_the_batch(root):
    source = open_source(root / "grey")
    out = RawBatch.allocate(3, *source.canvas)
    address = out.pixels_BHWC.data_ptr()
    source.fill(np.asarray([5, 5, 0]), out)
    assert out.pixels_BHWC.data_ptr() == address
    pixels = np.load(root / "grey" / "train.pixels.npy")
    assert np.array_equal(out.pixels_BHWC.numpy(), pixels[[5, 5, 0]])


def test_resident_fill_takes_row_tensors(root, device):
    source = ArraysSource(load_manifest(root / "photo"), device=device)
    host = open_source(root / "photo")
    assert source.nbytes == np.load(root / "photo" / "train.pixels.npy").nbytes
    ours, theirs = RawBatch.allocate(4, *source.canvas, device=device), RawBatch.allocate(4, *host.canvas)
    rows = [3, 0, 7, 3]
    source.fill(torch.tensor(rows, device=device), ours)
    host.fill(np.asarray(rows), theirs)
    assert torch.equal(ours.pixels_BHWC.cpu(), theirs.pixels_BHWC) and torch.equal(ours.extent_B2.cpu(), theirs.extent_B2)


def test_padding_of_smaller_images_is_zero(root):
    source = open_source(root / "photo")
    out = RawBatch.allocate(source.num_rows, *source.canvas)
    source.fill(np.arange(source.num_rows), out)
    assert len(np.unique(out.extent_B2.numpy(), axis=0)) > 1
    for pixels, (height, width) in zip(out.pixels_BHWC, out.extent_B2.tolist(), strict=True):
        assert pixels[height:].sum() == 0 and pixels[:, width:].sum() == 0


def test_extents_outside_the_canvas_are_refused(root, tmp_path):
    import shutil

    shutil.copytree(root / "photo", tmp_path / "photo")
    extents = np.load(tmp_path / "photo" / "train.extents.npy")
    extents[2, 1] = 99
    np.save(tmp_path / "photo" / "train.extents.npy", extents)
    with pytest.raises(DataError, match="extents outside"):
        open_source(tmp_path / "photo")


def test_a_file_cut_short_while_in_use_is_an_error_and_does_not_kill_the_process(root, tmp_path):
    """Reading a map beyond the end of its file is a bus error, which no handler turns into a message."""
    for name, file in (("arrays", "train.pixels.npy"), ("beton", "train.beton")):
        dataset = convert(root / "photos", tmp_path / name, format="arrays" if name == "arrays" else "ffcv")
        source = open_source(dataset)
        out = RawBatch.allocate(source.num_rows, *source.canvas)
        source.fill(np.arange(source.num_rows), out)
        with open(dataset / file, "r+b") as handle:
            handle.truncate(4096)
        with pytest.raises(DataError, match=f"{file}.*cut short while in use: 4096 bytes are left of"):
            source.fill(np.arange(source.num_rows), out)
        source.close()


def test_a_resident_copy_is_made_in_pieces(root, monkeypatch):
    whole = open_source(root / "photo", device="cpu")._resident[0]
    monkeypatch.setattr("fastssl.sources.arrays._SLAB", 1)
    assert torch.equal(open_source(root / "photo", device="cpu")._resident[0], whole)
    assert np.array_equal(whole.numpy(), np.load(root / "photo" / "train.pixels.npy"))
