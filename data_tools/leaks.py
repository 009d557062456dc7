"""Images that occur twice, within a split and across splits, found by a fingerprint of their decoded pixels."""

from __future__ import annotations

import hashlib
import heapq
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

FINGERPRINT = np.dtype([("pixels", "V16"), ("split", "i1"), ("row", "<i8"), ("label", "<i8")])
_BUCKETS = 64
_SHOWN = 5


def fingerprint(height: int, width: int, pixels: Any) -> bytes:
    """16 bytes that two images share when their size and all their pixels are equal (else with a chance of 2**-128)."""
    digest = hashlib.blake2b(f"{height} {width} ".encode(), digest_size=16)
    digest.update(pixels)
    return digest.digest()


class Ledger:
    """Fingerprints of any number of images in 64 files by their first bits; memory holds one file at a time, 1/64 of 33 bytes per image."""

    def __init__(self, splits: Iterable[str]):
        self.splits = tuple(splits)
        self._folder = tempfile.TemporaryDirectory(prefix="fastssl-leaks-")
        self._files = [open(Path(self._folder.name) / str(i), "w+b") for i in range(_BUCKETS)]

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files:
            file.close()
        self._folder.cleanup()

    def add(self, records: list[tuple[bytes, str, int, int]]) -> None:
        """(fingerprint, split, row, label) of some images, in any order."""
        table = np.zeros(len(records), FINGERPRINT)
        for place, (pixels, split, row, label) in enumerate(records):
            table[place] = (np.void(pixels), self.splits.index(split), row, label)
        bucket = table["pixels"].copy().view(np.uint8).reshape(len(table), 16)[:, 0] % _BUCKETS if len(table) else np.zeros(0, np.uint8)
        for number in np.unique(bucket):
            self._files[number].write(table[bucket == number].tobytes())

    def groups(self) -> Iterator[np.ndarray]:
        """Records of equal images, two and more, ordered by split and row within; groups in no order that means anything."""
        for file in self._files:
            file.seek(0)
            table = np.frombuffer(file.read(), FINGERPRINT)
            if len(table) < 2:
                continue
            keys = table["pixels"].copy().view([("a", "<u8"), ("b", "<u8")]).reshape(-1)
            table = table[np.lexsort((table["row"], table["split"], keys["b"], keys["a"]))]
            same = table["pixels"].copy().view("V16")
            borders = np.flatnonzero(same[1:] != same[:-1]) + 1
            starts, ends = np.concatenate([[0], borders]), np.concatenate([borders, [len(table)]])
            several = ends - starts > 1
            for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
                yield table[start:end]

    def report(self) -> list[str]:
        """Lines about repeated images: within each split, of the test split elsewhere, and the first groups that cross splits."""
        repeats, conflicts = dict.fromkeys(self.splits, 0), dict.fromkeys(self.splits, 0)
        leaked = crossing = 0
        shown: list[tuple[tuple[int, int], str]] = []
        for group in self.groups():
            for number, name in enumerate(self.splits):
                own = group[group["split"] == number]
                if len(own) > 1:
                    repeats[name] += len(own) - 1
                    known = own["label"][own["label"] >= 0]
                    conflicts[name] += len(known) > 0 and known.min() != known.max()
            if group["split"][0] != group["split"][-1]:
                crossing += 1
                leaked += sum(self.splits[number] == "test" for number in group["split"].tolist())
                shown.append(((int(group["split"][0]), int(group["row"][0])), " = ".join(self._told(record) for record in group[:_SHOWN])))
                shown = heapq.nsmallest(_SHOWN, shown)
        lines = [
            f"duplicates within {name}: {repeats[name]} images repeat an earlier one; {conflicts[name]} groups disagree on the label"
            for name in sorted(repeats)
        ]
        lines.append(f"leaks: {leaked} test images also occur in another split")
        lines += [f"  {text}" for _, text in shown]
        return [*lines, f"  ... and {crossing - len(shown)} more groups"] if crossing > len(shown) else lines

    def _told(self, record: np.void) -> str:
        label = int(record["label"])
        return f"{self.splits[int(record['split'])]} row {int(record['row'])} ({f'label {label}' if label >= 0 else 'no label'})"
