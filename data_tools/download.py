"""One file over HTTP: continued where an earlier attempt stopped, checked against its published checksum, with progress."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.atomic import told
from data_tools.progress import duration, say

ATTEMPT_S = 20.0  # without a byte for so long, an attempt has failed
_BLOCK = 1 << 18
_ATTEMPTS = 8  # per address, as long as each brings something


class NotAvailable(Exception):
    """One way of fetching did not work; the text says why in a few words."""


def download(urls: Sequence[str], target: Path, *, md5: str = "", attempt_s: float = ATTEMPT_S) -> str:
    """Get ``target`` from the first of ``urls`` that has it and return that address.

    Unfinished bytes lie in ``<target>.part`` and are continued by the next attempt or run where ``md5`` is known (without one nothing could tell that the
    parts belong together).  A file of the wrong checksum is thrown away and fetched once more from the beginning.  Raises NotAvailable with each reason;
    DataError where the disk is full.
    """
    if target.is_file() and (not md5 or file_md5(target) == md5):
        return "already there"
    reasons = []
    part = target.with_name(f"{target.name}.part")
    for url in urls:
        for _ in range(_ATTEMPTS):
            before = part.stat().st_size if part.is_file() else 0
            try:
                _receive(url, part, attempt_s, resume=bool(md5))
            except (OSError, http.client.HTTPException, ValueError) as error:
                reasons.append(f"{url}: {_why(error, attempt_s)}")
                if part.is_file() and part.stat().st_size > before and md5:
                    say(f"{target.name}: {_why(error, attempt_s)}; going on from {part.stat().st_size / 1e6:.1f} MB")
                    continue
                break
            if not md5 or file_md5(part) == md5:
                with told(target):
                    os.replace(part, target)
                return url
            part.unlink()
            reasons.append(f"{url}: its checksum is not the published one")
            if not before:  # a whole file from one server is wrong: so is the next
                break
            say(f"{target.name}: its checksum is not the published one; fetching it once more from the beginning")
    raise NotAvailable("; ".join(reasons[-3:]) or "no address is known")


def file_md5(file: Path) -> str:
    """md5 (hex) of a file's bytes: what publishers of these datasets give, good against damage, not against malice."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _receive(url: str, part: Path, attempt_s: float, *, resume: bool) -> None:
    """Append what is missing to ``part``, or write all of it where the server does not continue."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("no web address")
    have = part.stat().st_size if part.is_file() and resume else 0
    request = urllib.request.Request(url, headers={"User-Agent": "fastssl-data", **({"Range": f"bytes={have}-"} if have else {})})
    try:
        answer = urllib.request.urlopen(request, timeout=attempt_s)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        error.close()
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
            return  # all of it was there
        part.unlink()  # longer than the file: not a part of it
        return _receive(url, part, attempt_s, resume=resume)
    with answer:
        continued = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        start = have if continued else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        with told(part):
            part.parent.mkdir(parents=True, exist_ok=True)
            out = open(part, "ab" if continued else "wb")
        with out:
            got = _copy(answer, out, part, start, total)
    if total is not None and got != total:
        raise OSError(f"the connection ended after {got} of {total} bytes")


def _copy(answer: Any, out: Any, part: Path, start: int, total: int | None) -> int:
    meter = _Progress(part.name.removesuffix(".part"), start, total)
    got = start
    try:
        while block := answer.read1(_BLOCK):
            with told(part):
                out.write(block)
            got += len(block)
            meter.show(got)
    finally:
        meter.close(got)
    return got


class _Progress:
    """One changing line on a terminal, a line every 10 s in a log."""

    def __init__(self, name: str, start: int, total: int | None):
        self._name, self._start, self._total, self._live = name, start, total, sys.stderr.isatty()
        self._begun = self._told = time.monotonic()

    def show(self, got: int) -> None:
        now = time.monotonic()
        if now - self._told >= (0.2 if self._live else 10.0):
            self._told = now
            self._tell(got, now)

    def _tell(self, got: int, now: float) -> None:
        rate = (got - self._start) / max(now - self._begun, 1e-9)
        of = f" of {self._total / 1e6:.1f}" if self._total is not None else ""
        left = f", {duration((self._total - got) / rate)} left" if self._total is not None and rate > 0 and got < self._total else ""
        text = f"{self._name}: {got / 1e6:.1f}{of} MB, {rate / 1e6:.1f} MB/s{left}"
        if self._live:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            say(text)

    def close(self, got: int) -> None:
        self._tell(got, time.monotonic())
        if self._live:
            print(file=sys.stderr)


def _why(error: BaseException, attempt_s: float) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server says {error.code} {error.reason}"
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, TimeoutError):
        return f"no answer within {attempt_s:.0f} s"
    return str(inner) or type(inner).__name__
