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
from tests.sources.engines import ENGINES


@pytest.fixture
def dataset(tmp_path):
    return convert(photo_folders(tmp_path / "raw"), tmp_path / "data", format="ffcv")


def spoil(dataset, row, how):
    """Damage the stored JPEG of ``row``: "zeros" everywhere, "tail" only its second half, "end" its last bytes, well after its tables."""
    file = dataset / "train.beton"
    beton = open_beton(file)
    assert beton.mode_N[row] == MODE_JPG
    start, size = int(beton.ptr_N[row]), int(beton.size_N[row])
    data = bytearray(file.read_bytes())
    begin = start + {"zeros": 0, "tail": size // 2, "end": size - 40}[how]
    data[begin : start + size] = bytes(start + size - begin)
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["zeros", "tail", "end"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_corrupt_jpeg_becomes_grey_and_is_counted(dataset, how, workers, engine):
    spoil(dataset, 3, how)
    spoil(dataset, 4, how)
    source = open_source(dataset, workers=workers, engine=engine)
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


@pytest.mark.parametrize("engine", ENGINES)
def test_jpeg_of_another_size_than_recorded_is_bad(dataset, engine):
    file = dataset / "train.beton"
    beton = open_beton(file)
    same = [row for row in range(beton.num_rows) if beton.mode_N[row] == MODE_JPG]
    row, other = next((a, b) for a in same for b in same if beton.size_N[a] >= beton.size_N[b] and beton.height_N[a] != beton.height_N[b])
    data = bytearray(file.read_bytes())
    start = int(beton.ptr_N[other])
    jpeg = data[start : start + int(beton.size_N[other])]
    data[int(beton.ptr_N[row]) : int(beton.ptr_N[row]) + len(jpeg)] = jpeg
    file.write_bytes(data)
    source = open_source(dataset, engine=engine)
    out = RawBatch.allocate(1, *source.canvas)
    with pytest.warns(RuntimeWarning, match="size differs"):
        source.fill(np.asarray([row]), out)
    height, width = out.extent_B2[0].tolist()
    assert (out.pixels_BHWC[0, :height, :width] == 127).all() and (height, width) == (beton.height_N[row], beton.width_N[row])
    source.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("damage, match", [("half", "truncated"), ("header", "not a .beton file"), ("descriptors", "fields")])
def test_damaged_file_is_refused_at_the_door(dataset, engine, damage, match):
    file = dataset / "train.beton"
    data = bytearray(file.read_bytes())
    if damage == "half":
        del data[len(data) // 2 :]
    elif damage == "header":
        data[0] = 77
    else:
        data[24:1000] = b"\xff" * 976
    file.write_bytes(data)
    with pytest.raises(DataError, match=match):
        open_source(dataset, engine=engine)


def test_labels_must_agree_with_the_table(dataset):
    labels = np.load(dataset / "train.labels.npy")
    labels[[0, 4]] = labels[[4, 0]]
    np.save(dataset / "train.labels.npy", labels)
    with pytest.raises(DataError, match="other labels"):
        open_source(dataset)


@pytest.mark.parametrize("engine", ENGINES)
def test_jpeg_of_twice_the_recorded_size_is_bad_although_it_could_be_reduced_to_it(tmp_path, engine):
    raw = photo_folders(tmp_path / "raw", same_size=True)
    for name, side in (("0.jpg", 24), ("3.jpg", 48)):
        (raw / "train" / "cat" / name).write_bytes(simplejpeg.encode_jpeg(smooth(side, side, 1), 100 if side == 24 else 10, "RGB", "420"))
    dataset = convert(raw, tmp_path / "data", format="ffcv")
    file = dataset / "train.beton"
    beton = open_beton(file)
    assert beton.height_N[[0, 3]].tolist() == [24, 48] and beton.size_N[3] <= beton.size_N[0]
    data = bytearray(file.read_bytes())
    target, origin, size = int(beton.ptr_N[0]), int(beton.ptr_N[3]), int(beton.size_N[3])
    data[target : target + size] = data[origin : origin + size]
    file.write_bytes(data)
    source = open_source(dataset, engine=engine)
    out = RawBatch.allocate(1, *source.canvas)
    with pytest.warns(RuntimeWarning, match="size differs"):
        source.fill(np.asarray([0]), out)
    assert (out.pixels_BHWC[0, :24, :24] == 127).all() and source.bad_rows == 1
    source.close()


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
@pytest.mark.parametrize("mode", ["raw", "jpg", "smart", "proportion"])
def test_we_read_what_ffcv_writes(tmp_path, mode):
    pytest.importorskip("ffcv", reason="the ffcv package is not installed (make ffcv)")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    np.random.seed(0)  # "proportion" draws which image is compressed
    field = RGBImageField(write_mode=mode, jpeg_quality=95, smart_threshold=43 * 47 * 3)
    DatasetWriter(str(tmp_path / "theirs.beton"), {"image": field, "label": IntField()}, num_workers=1).from_indexed_dataset(_Pictures())
    _holds_the_pictures(tmp_path / "theirs.beton", modes={"raw": {1}, "jpg": {0}}.get(mode, {0, 1}))


def _holds_the_pictures(file, modes):
    """Both engines read the twelve pictures and labels; raw ones exactly, compressed ones equally."""
    stored = open_beton(file).mode_N
    assert set(stored.tolist()) == modes
    seen = {}
    for engine in ("native", "ffcv"):
        source = open_source(file, workers=2, engine=engine)
        assert source.labels_N.tolist() == [i % 3 for i in range(12)]
        out = RawBatch.allocate(12, *source.canvas)
        out.pixels_BHWC.zero_()
        source.fill(np.arange(11, -1, -1), out)
        for slot, row in enumerate(range(11, -1, -1)):
            truth = _Pictures()[row][0]
            height, width = out.extent_B2[slot].tolist()
            assert (height, width) == truth.shape[:2]
            difference = np.abs(out.pixels_BHWC[slot, :height, :width].numpy().astype(int) - truth)
            assert difference.max() == 0 if stored[row] != MODE_JPG else difference.mean() < 12
        assert source.bad_rows == 0
        source.close()
        seen[engine] = out.pixels_BHWC.numpy().astype(int)
    assert np.abs(seen["native"] - seen["ffcv"]).max() <= 1  # two builds of libjpeg


class _PicturesAmongOthers(_Pictures):
    def __getitem__(self, index):
        index = int(index)
        image, label = super().__getitem__(index)
        note = np.frombuffer(b"photo %d" % index, np.uint8)
        return 0.5 * index, note, 100 + index, np.arange(6, dtype=np.float32).reshape(2, 3) * index, {"n": index}, label, image


@pytest.mark.ffcv
def test_we_read_ffcv_files_with_other_fields_in_another_order(tmp_path):
    pytest.importorskip("ffcv", reason="the ffcv package is not installed (make ffcv)")
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {
        "weight": FloatField(),
        "note": BytesField(),
        "index": IntField(),
        "box": NDArrayField(np.dtype("float32"), (2, 3)),
        "facts": JSONField(),
        "label": IntField(),
        "photo": RGBImageField(write_mode="jpg", jpeg_quality=95),
    }
    DatasetWriter(str(tmp_path / "rich.beton"), fields, num_workers=1).from_indexed_dataset(_PicturesAmongOthers())
    _holds_the_pictures(tmp_path / "rich.beton", modes={0})
