"""Downloading against a server on this machine: resuming, checksums, broken and silent servers, a full disk."""

import errno
import hashlib

import numpy as np
import pytest

import data_tools.download
from data_tools.download import NotAvailable, download
from fastssl.errors import DataError
from tests.data_tools.web import serve

DATA = np.random.RandomState(0).bytes(1_000_000)
MD5 = hashlib.md5(DATA).hexdigest()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    with serve({"a.bin": DATA, "empty": b""}) as server:
        yield server


def test_a_file_arrives_and_is_not_fetched_twice(server, tmp_path):
    assert download([server.url("a.bin")], tmp_path / "a.bin", md5=MD5) == server.url("a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert download([server.url("a.bin")], tmp_path / "a.bin", md5=MD5) == "already there"
    assert server.asked == [("a.bin", "")] and [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_a_broken_connection_is_continued(server, tmp_path, capfd):
    server.cut = {0: 300_000, 1: 200_000}
    download([server.url("a.bin")], tmp_path / "a.bin", md5=MD5)
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert [asked[1] for asked in server.asked] == ["", "bytes=300000-", "bytes=500000-"]
    assert "going on from 0.3 MB" in capfd.readouterr().err


def test_a_later_run_goes_on_where_an_earlier_one_stopped(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(DATA[:700_000])
    download([server.url("a.bin")], tmp_path / "a.bin", md5=MD5)
    assert server.asked == [("a.bin", "bytes=700000-")] and (tmp_path / "a.bin").read_bytes() == DATA


def test_a_part_that_was_complete_needs_no_more_bytes(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(DATA)
    download([server.url("a.bin")], tmp_path / "a.bin", md5=MD5)
    assert (tmp_path / "a.bin").read_bytes() == DATA and len(server.asked) == 1


@pytest.mark.parametrize("part", [b"x" * 500_000, b"x" * 2_000_000], ids=["other bytes", "too long"])
def test_a_part_of_another_file_is_thrown_away(server, tmp_path, part):
    (tmp_path / "a.bin.part").write_bytes(part)
    download([server.url("a.bin")], tmp_path / "a.bin", md5=MD5)
    assert (tmp_path / "a.bin").read_bytes() == DATA and server.asked[-1] == ("a.bin", "")


def test_a_server_without_ranges_sends_everything_again(server, tmp_path):
    server.ranges, server.cut = False, {0: 300_000}
    download([server.url("a.bin")], tmp_path / "a.bin", md5=MD5)
    assert (tmp_path / "a.bin").read_bytes() == DATA and len(server.asked) == 2


def test_without_a_checksum_nothing_is_pieced_together(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"x" * 500)
    server.cut = {0: 300_000}
    with pytest.raises(NotAvailable, match="300000 of 1000000 bytes"):
        download([server.url("a.bin")], tmp_path / "a.bin")
    download([server.url("a.bin")], tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA and [asked[1] for asked in server.asked] == ["", ""]


def test_wrong_content_is_never_kept(server, tmp_path):
    server.files["a.bin"] = b"y" + DATA[1:]
    with pytest.raises(NotAvailable, match="checksum is not the published one"):
        download([server.url("a.bin")], tmp_path / "a.bin", md5=MD5)
    assert not list(tmp_path.iterdir()) and len(server.asked) == 1


def test_the_next_address_is_asked(server, tmp_path):
    with serve({"a.bin": DATA}) as mirror:
        used = download([server.url("none"), "http://127.0.0.1:9/a.bin", "ftp://x/a.bin", mirror.url("a.bin")], tmp_path / "a.bin", md5=MD5)
    assert used == mirror.url("a.bin") and (tmp_path / "a.bin").read_bytes() == DATA


def test_every_reason_is_told(server, tmp_path):
    with pytest.raises(NotAvailable) as caught:
        download([server.url("none"), "http://127.0.0.1:9/a.bin"], tmp_path / "a.bin", md5=MD5)
    assert "the server says 404" in str(caught.value) and "refused" in str(caught.value)


def test_a_silent_server_costs_one_attempt(server, tmp_path):
    server.cut, server.stall = {0: 0}, 1.0
    with pytest.raises(NotAvailable, match="no answer within 0 s"):
        download([server.url("a.bin")], tmp_path / "a.bin", md5=MD5, attempt_s=0.2)
    assert len(server.asked) == 1


def test_a_server_that_falls_silent_midway_is_asked_again(server, tmp_path):
    server.cut, server.stall = {0: 400_000}, 0.5
    download([server.url("a.bin")], tmp_path / "a.bin", md5=MD5, attempt_s=0.2)
    assert (tmp_path / "a.bin").read_bytes() == DATA and server.asked[1][1] == "bytes=400000-"


def test_an_empty_file_is_a_file(server, tmp_path):
    download([server.url("empty")], tmp_path / "empty", md5=hashlib.md5(b"").hexdigest())
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_full_disk_is_said_and_what_came_is_kept(server, tmp_path, monkeypatch):
    real = data_tools.download._copy

    def full(answer, out, part, start, total):
        out.write(answer.read(1000))
        with data_tools.download.told(part):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data_tools.download, "_copy", full)
    with pytest.raises(DataError, match="disk is full"):
        download([server.url("a.bin")], tmp_path / "a.bin", md5=MD5)
    monkeypatch.setattr(data_tools.download, "_copy", real)
    download([server.url("a.bin")], tmp_path / "a.bin", md5=MD5)
    assert server.asked[1][1] == "bytes=1000-" and (tmp_path / "a.bin").read_bytes() == DATA
