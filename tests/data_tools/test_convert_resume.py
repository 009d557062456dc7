"""A conversion that is stopped anywhere goes on to the same bytes; any number of workers gives them too; nothing half-written is ever taken for a dataset."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

import data_tools.arrays_writer
import data_tools.assembly
import data_tools.beton_writer
import data_tools.forecast
import data_tools.journal
import data_tools.units
from data_tools.cli import main
from data_tools.collection import ArraySplit, BadImage, Collection, FileSplit, Keys, RawSplit
from data_tools.convert import convert
from data_tools.journal import Journal, partial_folder
from data_tools.readers import open_raw
from data_tools.verify import verify
from fastssl.errors import DataError
from fastssl.sources import load_manifest
from tests.data_tools.collections import idx_folder, photo_folders

FORMATS = ["arrays", "ffcv", "dali"]
ROOT = Path(__file__).parents[2]


def everything(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = photo_folders(tmp_path_factory.mktemp("resume") / "raw", per_class=6)
    (root / "train" / "cat" / "zz.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory, photos):
    root = tmp_path_factory.mktemp("whole")
    return {format: everything(convert(photos, root / format, format=format, workers=1)) for format in FORMATS}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("settings", [{"workers": 3, "unit_rows": 2}, {"workers": 2, "unit_rows": 7, "pool": "processes"}, {"workers": 1, "unit_rows": 1}])
def test_workers_and_units_do_not_show(tmp_path, photos, whole, format, settings):
    assert everything(convert(photos, tmp_path / "data", format=format, **settings)) == whole[format]


class Stop(Exception):
    """Stands for a power cut: nobody catches it."""


def stop_after(monkeypatch, module, name, calls):
    """Let ``module.name`` work ``calls`` times and then stop everything."""
    real, left = getattr(module, name), [calls]

    def limited(*args, **kwargs):
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, limited)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("calls", [1, 4, 9, 15])
def test_stopped_between_files_and_continued(tmp_path, monkeypatch, photos, whole, format, calls):
    monkeypatch.setattr(data_tools.assembly, "_SAVE_BYTES", 1)  # note the place after every unit
    for module in (data_tools.units, data_tools.arrays_writer, data_tools.beton_writer):
        stop_after(monkeypatch, module, "open_output" if module is data_tools.units else "copy_range", calls)
    again = {"source": photos, "dest": tmp_path / "data", "format": format, "workers": 1, "unit_rows": 3}
    stopped = 0
    for _ in range(40):
        try:
            convert(**again)
            break
        except Stop:
            stopped += 1
            assert not (tmp_path / "data").exists()
            monkeypatch.undo()
            monkeypatch.setattr(data_tools.assembly, "_SAVE_BYTES", 1)
            for module in (data_tools.units, data_tools.arrays_writer, data_tools.beton_writer):
                stop_after(monkeypatch, module, "open_output" if module is data_tools.units else "copy_range", calls + stopped)
    assert stopped and everything(tmp_path / "data") == whole[format]
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("marks", [0, 1, 2, 5, 9])
def test_stopped_while_the_files_are_put_together(tmp_path, monkeypatch, photos, whole, format, marks):
    monkeypatch.setattr(data_tools.assembly, "_SAVE_BYTES", 1)
    again = {"source": photos, "dest": tmp_path / "data", "format": format, "workers": 1, "unit_rows": 3}
    with monkeypatch.context() as patch:
        stop_after(patch, data_tools.journal.Journal, "mark", min(marks, 1) if format == "dali" else marks)  # shards have no marks in between
        with pytest.raises(Stop):
            convert(**again)
    left = len(list(partial_folder(tmp_path / "data").glob("parts/*.data")))
    if format != "dali" and marks < 7:
        assert left == 9 - marks  # what stands in the files already is no longer kept beside them
    assert everything(convert(**again)) == whole[format]


KILLED = """
import sys, data_tools.units, data_tools.convert
real = data_tools.units.prepare
def slow(raw, rules):
    import time
    time.sleep(0.02)
    return real(raw, rules)
data_tools.units.prepare = slow
data_tools.convert.convert(sys.argv[1], sys.argv[2], format="ffcv", workers=2, unit_rows=2, pool="threads")
"""


def test_killed_for_real_and_continued_from_the_command_line(tmp_path, photos, whole, capsys):
    dest = tmp_path / "data"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(photos), str(dest)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not len(list(partial_folder(dest).glob("parts/*.meta"))) >= 2:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not dest.exists() and partial_folder(dest).exists()
    assert main(["list", str(tmp_path)]) == 0 and "none; make one" in capsys.readouterr().out
    assert main(["convert", str(photos), str(dest), "--format", "ffcv", "--unit-rows", "2"]) == 0
    assert "continuing: " in capsys.readouterr().err
    assert everything(dest) == whole["ffcv"] and not partial_folder(dest).exists()


def begun(photos, dest, monkeypatch, **settings):
    """An unfinished conversion of some units."""
    with monkeypatch.context() as patch:
        stop_after(patch, data_tools.units, "open_output", 6)
        with pytest.raises(Stop):
            convert(photos, dest, format="ffcv", workers=1, unit_rows=3, **settings)
    assert list(partial_folder(dest).glob("parts/*.meta"))


def test_another_source_or_other_options_are_one_error_and_restart_throws_away(tmp_path, monkeypatch, photos, capsys):
    dest = tmp_path / "data"
    begun(photos, dest, monkeypatch)
    before = everything(partial_folder(dest))
    for arguments, match in (({"quality": 50}, "jpeg_quality 95, now 50"), ({"source": photo_folders(tmp_path / "other")}, "source has changed")):
        with pytest.raises(DataError, match=f"unfinished conversion.*{match}.*--restart"):
            convert(**{"source": photos, "dest": dest, "format": "ffcv", "unit_rows": 3, **arguments})
    assert everything(partial_folder(dest)) == before and "what is done is kept" in capsys.readouterr().err
    again = convert(photos, dest, format="ffcv", quality=50, restart=True)
    assert load_manifest(again).options["jpeg_quality"] == 50


@pytest.mark.parametrize("harm", ["data cut", "data changed", "meta changed", "data gone"])
def test_a_damaged_unit_is_done_again(tmp_path, monkeypatch, photos, whole, harm):
    dest = tmp_path / "data"
    begun(photos, dest, monkeypatch)
    file = sorted(partial_folder(dest).glob("parts/*.meta" if harm == "meta changed" else "parts/*.data"))[0]
    data = bytearray(file.read_bytes())
    if harm == "data gone":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data[:-5] if harm == "data cut" else data)
    assert everything(convert(photos, dest, format="ffcv", unit_rows=3)) == whole["ffcv"]


def test_two_conversions_at_once_to_one_place(tmp_path, photos):
    with Journal(tmp_path / "data", {}).opened(), pytest.raises(DataError, match="another process"):
        convert(photos, tmp_path / "data")


class FullDisk:
    """Files on a disk with room for ``room`` bytes in all."""

    room = 0

    def __init__(self, path, *, resume=False):
        self._handle = open(path, "r+b" if resume else "wb")

    def write(self, data):
        FullDisk.room -= memoryview(data).nbytes
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._handle.write(data)

    def __getattr__(self, name):
        return getattr(self._handle, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.close()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("room", [100, 20_000, 60_000])
def test_full_disk_is_one_clear_error_and_nothing_is_lost(tmp_path, monkeypatch, photos, whole, format, room):
    old = convert(idx_folder(tmp_path / "old-raw"), tmp_path / "data")
    before = everything(old)
    with monkeypatch.context() as patch:
        FullDisk.room = room
        for module in ("units", "arrays_writer", "beton_writer", "shards_writer", "rows"):
            patch.setattr(f"data_tools.{module}.open_output", FullDisk)
        with pytest.raises(DataError, match="disk is full.*free some space"):
            convert(photos, tmp_path / "data", format=format, force=True, workers=1, unit_rows=4)
    assert everything(tmp_path / "data") == before
    assert everything(convert(photos, tmp_path / "data", format=format, force=True, unit_rows=4)) == whole[format]


def test_too_small_a_disk_is_noticed_before_writing(tmp_path, monkeypatch, photos):
    monkeypatch.setattr(data_tools.forecast.shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(10, 9, 1))
    with pytest.raises(DataError, match="too small.*needs about"):
        convert(photos, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_no_permission_is_one_clear_error(tmp_path, monkeypatch, photos):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(data_tools.units, "open_output", refuse)
    with pytest.raises(DataError, match="no permission"):
        convert(photos, tmp_path / "data", workers=1)
    assert not (tmp_path / "data").exists()


def test_a_source_that_vanishes_midway_is_one_error_and_can_come_back(tmp_path, monkeypatch, whole):
    raw = photo_folders(tmp_path / "raw", per_class=6)
    (raw / "train" / "cat" / "zz.jpg").write_bytes(b"no image")
    victim = raw / "train" / "emu" / "3.jpg"
    real = FileSplit.read

    def read(self, row):
        if self.key(row).endswith("emu/3.jpg") and victim.exists() and not monkeyed:
            victim.rename(tmp_path / "away.jpg")
            monkeyed.append(1)
        return real(self, row)

    monkeyed: list[int] = [1]  # not during the forecast
    monkeypatch.setattr(FileSplit, "read", read)
    monkeypatch.setattr("data_tools.convert.forecast", lambda *a, **k: (monkeyed.clear(), data_tools.forecast.Forecast(1, 1, 1, 1))[1])
    with pytest.raises(DataError, match="emu/3.jpg.*cannot be read any more"):
        convert(raw, tmp_path / "data", format="ffcv", workers=1, unit_rows=4)
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    (tmp_path / "away.jpg").rename(victim)
    assert everything(convert(raw, tmp_path / "data", format="ffcv", unit_rows=4)) == whole["ffcv"]


class Tiny:
    """A collection without end: every row a grey 2x2 image, made when it is asked for; nothing is kept."""

    def __init__(self, first, count):
        self.first, self.count = first, count
        self.labels = np.broadcast_to(np.int64(1), count)

    def key(self, row):
        return f"tiny/{self.first + row}"

    def read(self, row):
        number = self.first + row
        if number == 70_001:
            raise BadImage("made bad")
        return np.frombuffer(number.to_bytes(4, "big"), np.uint8).reshape(2, 2, 1)

    def part(self, start, stop):
        return Tiny(self.first + start, stop - start)

    def stamp(self):
        return str(self.count)


LARGE = """
import resource, sys
import numpy as np
import data_tools.convert
from data_tools.collection import Collection
from tests.data_tools.test_convert_resume import Tiny
count = int(sys.argv[1])
raw = Collection("made", "tiny", ("a", "b"), 1, {"train": Tiny(0, count)})
data_tools.convert.open_raw = lambda source, **_: raw
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data_tools.convert.convert("none", sys.argv[2], format=sys.argv[3], mode="raw", workers=1, unit_rows=4096)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["arrays", "ffcv"])
def test_a_million_rows_in_bounded_memory(tmp_path, format):
    grown = {}
    for count in (100_000, 1_000_000):
        out = tmp_path / str(count)
        done = subprocess.run([sys.executable, "-c", LARGE, str(count), str(out), format], cwd=ROOT, capture_output=True, text=True, check=True)
        grown[count] = int(done.stdout) / 1024
        info = json.loads((out / "dataset.json").read_text())["splits"]["train"]
        assert info["count"] == count - 1 and info["bad"] == 1
    # Ten times the rows must not take ten times the memory: 100 bytes per row are allowed, a Python object per row takes several times that.
    assert grown[1_000_000] - grown[100_000] < 100
    pixels = np.load(tmp_path / "1000000" / "train.pixels.npy", mmap_mode="r") if format == "arrays" else None
    assert pixels is None or pixels[-1].reshape(-1).tolist() == list((999_999).to_bytes(4, "big"))


def test_keys_hold_any_names_compactly():
    names = ["a.jpg", "", "größe/ö.png", os.fsdecode(b"odd\xff.jpg"), "x" * 300]
    keys = Keys.of(iter(names))
    assert [keys[i] for i in range(5)] == names and [keys.part(1, 4)[i] for i in range(3)] == names[1:4]
    assert keys.digest() != Keys.of(["a.jpg", "größe/ö.png"]).digest() and len(Keys.of([])) == 0
    with pytest.raises(IndexError):
        keys[5]


def test_readers_keep_the_contract_of_a_split(tmp_path):
    import pickle

    for raw in (open_raw(photo_folders(tmp_path / "a")), open_raw(idx_folder(tmp_path / "b"))):
        assert isinstance(raw, Collection) and raw.stamp() == raw.stamp()
        for split in raw.splits.values():
            part = pickle.loads(pickle.dumps(split.part(2, 5)))
            assert isinstance(split, RawSplit) and isinstance(part, RawSplit) and part.count == 3 and len(pickle.dumps(part)) < 5000
            for i in range(3):
                assert part.key(i) == split.key(i + 2) and part.labels[i] == split.labels[i + 2]
                assert np.array_equal(np.asarray(part.read(i)), np.asarray(split.read(i + 2)))


def test_a_touched_file_changes_the_stamp(tmp_path):
    raw = photo_folders(tmp_path / "raw")
    before = open_raw(raw).stamp()
    os.utime(raw / "train" / "cat" / "0.jpg", ns=(1, 1))
    assert open_raw(raw).stamp() != before
    one, two = (ArraySplit(np.full((3, 2, 2, 1), level, np.uint8), np.zeros(3, np.int64), "train") for level in (1, 2))
    assert one.stamp() != two.stamp()


def test_the_manifest_says_nothing_of_time_or_place(tmp_path, photos):
    text = (convert(photos, tmp_path / "data", format="ffcv") / "dataset.json").read_text()
    assert str(tmp_path) not in text and verify(tmp_path / "data").problems == []
