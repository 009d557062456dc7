"""What only the beton source does: damaged images, agreement of labels, and agreement with the ffcv package itself."""

import warnings

import numpy as np
import pytest
import simplejpeg

from data_tools.convert import convert
from fastssl.errors import DataError
from fastssl.sources import open_source
from fastssl.sources.beton import MODE_JPG, open_beton
from fastssl.types import RawBatch
from tests.data_tools.collections import idx_folder, photo_folders, smooth


@pytest.fixture
def dataset(tmp_path):
    return convert(photo_folders(tmp_path / "raw"), tmp_path / "data", format="ffcv")


def spoil(dataset, row, how):
    """Damage the stored JPEG of ``row``: "zeros" everywhere, or "tail" only its second half."""
    file = dataset / "train.beton"
    beton = open_beton(file)
    assert beton.mode_N[row] == MODE_JPG
    start, size = int(beton.ptr_N[row]), int(beton.size_N[row])
    data = bytearray(file.read_bytes())
    begin = start if how == "zeros" else start + size // 2
    data[begin : start + size] = bytes(start + size - begin)
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["zeros", "tail"])
@pytest.mark.parametrize("workers", [1, 2])
def test_corrupt_jpeg_becomes_grey_and_is_counted(dataset, how, workers):
    spoil(dataset, 3, how)
    spoil(dataset, 4, how)
    source = open_source(dataset, workers=workers)
    out = RawBatch.allocate(6, *source.canvas)
    with pytest.warns(RuntimeWarning, match="cannot be decoded") as caught:
        source.fill(np.asarray([0, 3, 5, 3, 4, 6]), out)  # earlier pixels of other rows must not shine through
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    for slot in (1, 3, 4):
        height, width = out.extent_B2[slot].tolist()
        assert (out.pixels_BHWC[slot, :height, :width] == 127).all()
    for slot in (0, 2, 5):
        height, width = out.extent_B2[slot].tolist()
        assert out.pixels_BHWC[slot, :height, :width].float().std() > 1
    assert source.bad_rows == 2 and source.bad_row_ids == {3, 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.fill(np.asarray([3]), out)
    assert source.bad_rows == 2
    source.close()


def test_jpeg_of_another_size_than_recorded_is_bad(dataset):
    file = dataset / "train.beton"
    beton = open_beton(file)
    same = [row for row in range(beton.num_rows) if beton.mode_N[row] == MODE_JPG]
    row, other = next((a, b) for a in same for b in same if beton.size_N[a] >= beton.size_N[b] and beton.height_N[a] != beton.height_N[b])
    data = bytearray(file.read_bytes())
    start = int(beton.ptr_N[other])
    jpeg = data[start : start + int(beton.size_N[other])]
    data[int(beton.ptr_N[row]) : int(beton.ptr_N[row]) + len(jpeg)] = jpeg
    file.write_bytes(data)
    source = open_source(dataset)
    out = RawBatch.allocate(1, *source.canvas)
    with pytest.warns(RuntimeWarning, match="size differs"):
        source.fill(np.asarray([row]), out)
    height, width = out.extent_B2[0].tolist()
    assert (out.pixels_BHWC[0, :height, :width] == 127).all() and (height, width) == (beton.height_N[row], beton.width_N[row])
    source.close()


def test_truncated_file_is_refused_at_the_door(dataset):
    data = (dataset / "train.beton").read_bytes()
    (dataset / "train.beton").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="truncated"):
        open_source(dataset)


def test_labels_must_agree_with_the_table(dataset):
    labels = np.load(dataset / "train.labels.npy")
    labels[[0, 4]] = labels[[4, 0]]
    np.save(dataset / "train.labels.npy", labels)
    with pytest.raises(DataError, match="other labels"):
        open_source(dataset)


@pytest.mark.ffcv
def test_ffcv_reads_what_we_write(tmp_path):
    pytest.importorskip("ffcv", reason="the ffcv package is not installed (make ffcv)")
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    grey = convert(idx_folder(tmp_path / "grey-raw"), tmp_path / "grey", format="ffcv")
    photo = convert(photo_folders(tmp_path / "photo-raw", same_size=True), tmp_path / "photo", format="ffcv")
    for dataset in (grey, photo):
        source = open_source(dataset)
        ours = RawBatch.allocate(source.num_rows, *source.canvas)
        source.fill(np.arange(source.num_rows), ours)
        loader = Loader(
            str(dataset / "train.beton"),
            batch_size=source.num_rows,
            num_workers=1,
            order=OrderOption.SEQUENTIAL,
            os_cache=True,
            pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
        )
        (pixels, labels), *rest = list(loader)
        assert not rest and labels[:, 0].tolist() == source.labels_N.tolist()
        beton = open_beton(dataset / "train.beton")
        assert (beton.mode_N != MODE_JPG).any()
        for row, theirs in enumerate(pixels):
            expected = ours.pixels_BHWC[row].numpy()
            if beton.mode_N[row] == MODE_JPG:  # FFCV always decodes with the fast, less exact cosine transform
                stored = beton.data[beton.ptr_N[row] : beton.ptr_N[row] + beton.size_N[row]]
                assert np.abs(theirs.astype(int) - expected).max() <= 8
                expected = simplejpeg.decode_jpeg(stored, "RGB", fastdct=True)
            # Two libjpeg builds may round a colour by one; raw pixels must be equal.
            assert np.abs(theirs.astype(int) - expected).max() <= (1 if beton.mode_N[row] == MODE_JPG else 0)
        source.close()


class _Pictures:
    """An indexable dataset as FFCV's writer wants it."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        index = int(index)
        return smooth(40 + index, 50 - index, index), index % 3


@pytest.mark.ffcv
@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_we_read_what_ffcv_writes(tmp_path, mode):
    pytest.importorskip("ffcv", reason="the ffcv package is not installed (make ffcv)")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    file = tmp_path / "theirs.beton"
    DatasetWriter(str(file), {"image": RGBImageField(write_mode=mode, jpeg_quality=95), "label": IntField()}, num_workers=1).from_indexed_dataset(_Pictures())
    source = open_source(file, workers=2)
    assert source.labels_N.tolist() == [i % 3 for i in range(12)]
    out = RawBatch.allocate(12, *source.canvas)
    source.fill(np.arange(11, -1, -1), out)
    for slot, row in enumerate(range(11, -1, -1)):
        truth = _Pictures()[row][0]
        height, width = out.extent_B2[slot].tolist()
        assert (height, width) == truth.shape[:2]
        difference = np.abs(out.pixels_BHWC[slot, :height, :width].numpy().astype(int) - truth)
        assert difference.max() == 0 if mode == "raw" else difference.mean() < 12
    assert source.bad_rows == 0
    source.close()
