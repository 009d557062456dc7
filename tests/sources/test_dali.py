"""What only the DALI source does: the package itself, its pipeline's failures, other people's pipelines on our shards."""

import shutil
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from data_tools.convert import convert
from fastssl.errors import DataError
from fastssl.sources import dali as dali_module
from fastssl.sources import open_source
from fastssl.types import RawBatch
from tests.data_tools.collections import photo_folders, smooth
from tests.sources.test_shards import forget_checksums, name_files, overwrite, read
from tests.sources.worlds import HAS_DALI, photo, photo_keys, photos

needs_dali = pytest.mark.skipif(not HAS_DALI, reason="needs the nvidia-dali package; `make dali` installs it")


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    root = tmp_path_factory.mktemp("dali")
    raw = photo_folders(root / "raw")
    return raw, convert(raw, root / "data", format="dali")


@pytest.fixture
def data(master, tmp_path):
    return shutil.copytree(master[1], tmp_path / "data")


def test_a_missing_package_is_one_error_that_says_what_to_do(master, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match="make dali.*data.source=shards"):
        open_source(master[1], kind="dali")
    open_source(master[1]).close()


@needs_dali
def test_orientation_tags_are_ignored_as_everywhere_else(master, data, tmp_path):
    """The recorded size is that of the stored pixels; turning is the business of conversion."""
    raw, truth = master[0], photos(master[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # "turned by 90 degrees", as cameras write it; a square picture turned is still of the recorded size
    Image.fromarray(smooth(24, 24, 77)).save(tmp_path / "turned.jpg", quality=92, exif=exif)
    name_files(data, [tmp_path / "turned.jpg", *(raw / key for key in photo_keys(raw)[1:])], [(24, 24), *(image.shape[:2] for image in truth[1:])])
    for kind in ("dali", "shards"):
        source = open_source(data, kind=kind)
        assert np.abs(read(source, [0])[0].astype(int) - photo(tmp_path / "turned.jpg")).max() <= 2
        source.close()


@needs_dali
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_do_not_show(master, monkeypatch, chunk):
    truth = photos(master[0])
    monkeypatch.setattr(dali_module, "_MAX_CHUNK", chunk)
    source = open_source(master[1], kind="dali", workers=2)
    rows = [5, 0, 11, 5, 3, 3, 8]
    for got, row in zip(read(source, rows), rows, strict=True):
        assert np.abs(got.astype(int) - truth[row]).max() <= 2
    assert not source.not_for_dali
    source.close()


@needs_dali
def test_a_failing_pipeline_is_replaced_and_its_sound_rows_go_on_with_dali(master, data):
    """Without checksums damage reaches DALI, whose pipeline then fails as a whole."""
    overwrite(data, 0, 0, b"\xff\xd8 no image any more")
    forget_checksums(data)
    truth = photos(master[0])
    source = open_source(data, kind="dali")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            got = read(source, [4, 0, 5])
            assert (got[1] == 127).all()
            assert all(np.abs(got[i].astype(int) - truth[row]).max() <= 2 for i, row in ((0, 4), (2, 5)))
    assert source.bad_row_ids == source.not_for_dali == {0}
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    source.close()


@needs_dali
def test_rows_that_only_dali_cannot_decode_are_decoded_without_it(master, monkeypatch):
    truth = photos(master[0])
    source = open_source(master[1], kind="dali")
    real = source._run
    calls = []

    def fails(encoded):
        calls.append(len(encoded))
        return None if len(calls) == 1 else real(encoded)

    monkeypatch.setattr(source, "_run", fails)
    for _ in range(2):
        assert all(np.array_equal(got, truth[row]) for got, row in zip(read(source, [2, 3]), [2, 3], strict=True))
    assert source.not_for_dali == {2, 3} and not source.bad_rows and calls == [2, 0]
    source.close()


@needs_dali
def test_decoding_on_a_gpu_that_is_not_there_is_refused(master):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DataError, match="no CUDA device"):
        open_source(master[1], kind="dali", device="cuda")


@needs_dali
@pytest.mark.gpu
def test_a_gpu_gives_what_the_host_gives(master):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    host, device = open_source(master[1], kind="dali"), open_source(master[1], kind="dali", device="cuda")
    rows = np.asarray([3, 0, 11, 3, 1])
    ours, theirs = RawBatch.allocate(5, *host.canvas), RawBatch.allocate(5, *host.canvas, device="cuda")
    host.fill(rows, ours)
    device.fill(rows, theirs)
    assert torch.equal(ours.extent_B2, theirs.extent_B2.cpu())
    for a, b, (h, w) in zip(ours.pixels_BHWC, theirs.pixels_BHWC.cpu(), ours.extent_B2.tolist(), strict=True):
        assert (a[:h, :w].int() - b[:h, :w].int()).abs().max() <= 4
    host.close(), device.close()


@needs_dali
def test_open_and_close_leak_no_thread_no_file_no_memory(master):
    import gc

    import psutil

    process = psutil.Process()

    closed = []

    def once():
        source = open_source(master[1], kind="dali", workers=2)
        read(source, [0, 1, 2])
        source.close()
        closed.append(source)  # closing lets go, not forgetting

    def counts():
        gc.collect()
        return process.num_threads(), process.num_fds()

    for _ in range(5):
        once()
    before, memory = counts(), process.memory_info().rss
    for _ in range(20):
        once()
    assert counts() == before and process.memory_info().rss - memory < 16 << 20


@needs_dali
def test_dalis_own_reader_reads_our_shards(master):
    """Other people's pipelines: DALI's WebDataset reader with the index files that we write."""
    from nvidia.dali import Pipeline, fn

    raw, data = master
    keys = photo_keys(raw)
    shards = sorted(map(str, data.glob("train-*.tar")))
    pipeline = Pipeline(batch_size=len(keys), num_threads=1, device_id=None)
    with pipeline:
        image, label = fn.readers.webdataset(paths=shards, index_paths=[s.replace(".tar", ".idx") for s in shards], ext=["jpg;png", "cls"])
        pipeline.set_outputs(image, label)
    pipeline.build()
    images, labels = pipeline.run()
    stored = [np.asarray(images.at(i)).tobytes() for i in range(len(keys))]
    assert [int(bytes(np.asarray(labels.at(i)))) for i in range(len(keys))] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(got == (raw / key).read_bytes() for got, key in zip(stored, keys, strict=True) if key.endswith(".jpg"))
