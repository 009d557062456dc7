"""Archives of any shape, and memory that does not grow with the number of images beyond their names and numbers."""

import io
import tarfile
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.collection import ArraySplit
from data_tools.readers import open_raw
from data_tools.readers.joined import Joined, Picked, Relabelled
from data_tools.readers.listed import listed_split
from data_tools.readers.split_names import split_of
from data_tools.readers.tar_index import members, read_at
from fastssl.errors import DataError

NAME = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/\\"), min_size=1, max_size=90).filter(lambda text: text.strip(". "))


@settings(max_examples=60, deadline=None)
@given(
    entries=st.dictionaries(st.lists(NAME, min_size=1, max_size=4).map("/".join), st.binary(max_size=1100), min_size=1, max_size=6),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    keep=st.floats(0, 1),
)
def test_members_are_those_of_tarfile_and_every_cut_is_seen(tmp_path_factory, entries, form, keep):
    file = tmp_path_factory.mktemp("tar") / "a.tar"
    written = {}
    with tarfile.open(file, "w", format=form) as archive:
        for name, data in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            try:
                archive.addfile(entry, io.BytesIO(data))
            except ValueError:  # ustar cannot hold every long name
                continue
            written[name] = data
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    found = list(members(file))
    assert {member.name: read_at(file, member.offset, member.size) for member in found} == written
    whole = file.read_bytes()
    end = len(whole.rstrip(b"\0"))
    file.write_bytes(whole[: int(keep * min(end, len(whole) - 1024))])
    with pytest.raises(DataError, match="truncated"):
        list(members(file))


def test_damage_in_the_middle_is_no_end(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(3):
            entry = tarfile.TarInfo(f"{i}.jpg")
            entry.size = 600
            archive.addfile(entry, io.BytesIO(b"x" * 600))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1536:1540] = b"\xff\xff\xff\xff"  # the second header
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        list(members(tmp_path / "a.tar"))


def test_a_long_archive_costs_names_and_numbers_only(tmp_path):
    """6000 members: the index may take about 150 bytes for each, half of what one Python object with a name and a place takes."""
    count, header = 6_000, tarfile.TarInfo("x")
    with open(tmp_path / "train.tar", "wb") as out:
        for i in range(count // 2):
            for ending, data in (("jpg", b"\xff\xd8"), ("cls", b"1")):
                header.name, header.size = f"{i:09d}.{ending}", len(data)
                out.write(header.tobuf(tarfile.USTAR_FORMAT) + data.ljust(512, b"\0"))
        out.write(bytes(1024))
    tracemalloc.start()
    try:
        raw = open_raw(tmp_path / "train.tar", options={"label": "cls"})
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    split = raw.splits["train"]
    assert split.count == count // 2 and split.key(2321) == "train.tar/000002321.jpg" and split.labels[9] == 1
    assert kept < 150 * count / 2 + 300_000 and peak < 400 * count / 2 + 1_000_000


def test_a_long_list_costs_names_and_numbers_only(tmp_path):
    (tmp_path / "one.jpg").write_bytes(b"x")
    count = 8_000
    tracemalloc.start()
    try:
        split = listed_split(tmp_path, (("one.jpg", i % 7) for i in range(count)), "list")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert split.count == count and peak < 60 * count + 200_000


def pixels(count, first=0):
    return (np.arange(first, first + count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_joined_and_picked_splits_are_rows_of_their_bases(data):
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    firsts = np.cumsum([0, *counts[:-1]]).tolist()
    joined = Joined(tuple(ArraySplit(pixels(n, first), np.arange(first, first + n), f"p{i}") for i, (n, first) in enumerate(zip(counts, firsts, strict=True))))
    total = sum(counts)
    assert joined.count == total and joined.labels.tolist() == list(range(total))
    rows = np.array(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=8)))
    split = data.draw(st.sampled_from([joined, Picked(joined, rows), Relabelled(joined, np.arange(total))]))
    truth = rows if isinstance(split, Picked) else np.arange(total)
    start = data.draw(st.integers(0, split.count - 1))
    stop = data.draw(st.integers(start + 1, split.count))
    part = split.part(start, stop)
    assert part.count == stop - start and np.asarray(part.labels).tolist() == truth[start:stop].tolist()
    for i in range(part.count):
        assert part.read(i)[0, 0, 0] == truth[start + i] == split.read(start + i)[0, 0, 0]
        assert part.key(i) == split.key(start + i) == joined.key(int(truth[start + i]))
    for row in (-1, total):
        with pytest.raises(IndexError):
            joined.read(row)


@pytest.mark.parametrize(
    "path, split",
    [
        ("data/train-00000-of-00005.parquet", "train"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("default/validation/0000.parquet", "validation"),
        ("imagenet-train-{000}.tar", "train"),
        ("train/val-0.tar", "val"),
        ("value/0.tar", "train"),
        ("latest/trains.tar", "train"),
        ("unlabeled-0.tar", "unlabeled"),
        ("Val/0.TAR", "val"),
    ],
)
def test_names_of_parts(path, split):
    assert split_of(path) == split


def test_odd_headers(tmp_path):
    """Sizes in base 256, checksums of signed bytes, sparse files."""
    plain = tarfile.TarInfo("é.jpg")
    plain.size = 3
    block = bytearray(plain.tobuf(tarfile.GNU_FORMAT))

    def with_checksum(header, signed=False):
        header[148:156] = b" " * 8
        total = sum(header) - (256 * sum(byte > 127 for byte in header) if signed else 0)
        header[148:156] = b"%06o\0 " % total
        return bytes(header)

    file = tmp_path / "a.tar"
    file.write_bytes(with_checksum(block, signed=True) + b"abc".ljust(512, b"\0") + bytes(1024))
    assert list(members(file)) == [("é.jpg", 512, 3)]
    block[124:136] = b"\x80" + (3).to_bytes(11, "big")
    file.write_bytes(with_checksum(block) + b"abc".ljust(512, b"\0") + bytes(1024))
    assert list(members(file)) == [("é.jpg", 512, 3)]
    block[156:157] = b"S"
    file.write_bytes(with_checksum(block) + bytes(1536))
    with pytest.raises(DataError, match="sparse"):
        list(members(file))
