"""Writing one split as WebDataset tar shards, with DALI's index of each shard and our index of all samples; the same bytes for the same input."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.arrays_writer import npy_bytes, open_output
from fastssl.sources.shards import SAMPLE

SHARD_MB = 256
MB = 1_000_000
_BLOCK, _RECORD = 512, 10240


class ShardsWriter:
    """``store`` rows in order, then ``finish``.

    Row r becomes the members ``<r>.jpg`` or ``<r>.png`` and ``<r>.cls`` (the class number as text).  A shard ends with the sample that brings it to
    ``shard_mb`` million bytes.
    """

    def __init__(self, folder: Path, split: str, count: int, shard_mb: int = SHARD_MB):
        self._folder, self._split, self._limit = folder, split, shard_mb * MB
        self._samples = np.zeros(count, SAMPLE)
        self._row = 0
        self._shards: list[str] = []
        self._indices: list[str] = []
        self._handle: BinaryIO | None = None
        self._offset = 0
        self._entries: list[str] = []  # of the open shard, in DALI's index

    def store(self, suffix: str, data: bytes, label: int, height: int, width: int) -> None:
        """Store one encoded image, "jpg" or "png", whose pixels are ``height`` x ``width``."""
        if self._handle is None:
            self._shards.append(f"{self._split}-{len(self._shards):06d}.tar")
            self._handle, self._offset, self._entries = open_output(self._folder / self._shards[-1]), 0, []
        offset = self._member(f"{self._row:09d}.{suffix}", data)
        self._samples[self._row] = (len(self._shards) - 1, offset, len(data), height, width, zlib.crc32(data))
        text = str(label).encode()
        place = self._member(f"{self._row:09d}.cls", text)
        parts = [(suffix, offset, len(data)), ("cls", place, len(text))]
        self._entries.append(" ".join(f"{ext} {at} {size} {self._row:09d}.{ext}" for ext, at, size in parts))
        self._row += 1
        if self._offset >= self._limit:
            self._end_shard()

    def _member(self, name: str, data: bytes) -> int:
        """Append a file to the open shard; returns where its bytes begin."""
        assert self._handle is not None
        header = tarfile.TarInfo(name)  # time 0 and no owner: nothing of the machine gets into the file
        header.size, header.mode = len(data), 0o644
        self._handle.write(header.tobuf(tarfile.USTAR_FORMAT))
        self._handle.write(data + bytes(-len(data) % _BLOCK))
        begin = self._offset + _BLOCK
        self._offset = begin + len(data) + -len(data) % _BLOCK
        return begin

    def _end_shard(self) -> None:
        assert self._handle is not None
        end = self._offset + 2 * _BLOCK
        with self._handle as handle:
            handle.write(bytes(2 * _BLOCK + -end % _RECORD))
        self._handle = None
        self._indices.append(self._shards[-1].replace(".tar", ".idx"))
        with open_output(self._folder / self._indices[-1]) as handle:
            handle.write("".join(f"{line}\n" for line in [f"v1.2 {len(self._entries)}", *self._entries]).encode())

    def finish(self) -> dict[str, Any]:
        """End the last shard and write the sample index; returns the files by role, relative to the folder."""
        if self._handle is not None:
            self._end_shard()
        samples = f"{self._split}.samples.npy"
        with open_output(self._folder / samples) as handle:
            handle.write(npy_bytes(self._samples))
        return {"shards": self._shards, "index": self._indices, "samples": samples}

    def close(self) -> None:
        """Give up: release the file handle."""
        if self._handle is not None:
            self._handle.close()
