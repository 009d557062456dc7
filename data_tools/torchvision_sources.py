"""Which files torchvision downloads for a dataset, from where, with which checksum: read from its classes, so that no address stands in this package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_tools.download import NotAvailable
from data_tools.known import Known


@dataclass(frozen=True)
class Remote:
    """One published file: its name, addresses in order of preference, md5 (hex) or "" where torchvision has none."""

    name: str
    urls: tuple[str, ...]
    md5: str


def remotes(known: Known) -> list[Remote]:
    """The files of ``known``; NotAvailable where torchvision is not installed or keeps its addresses elsewhere than it used to."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise NotAvailable(f"torchvision cannot be imported ({error})") from error
    try:
        found = list(_remotes(getattr(datasets, known.torchvision), known.parts))
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        raise NotAvailable(f"this torchvision does not say where {known.torchvision} is ({error})") from error
    if not found:
        raise NotAvailable(f"this torchvision does not say where {known.torchvision} is")
    return found


def _remotes(of: Any, parts: tuple[str, ...]) -> Iterator[Remote]:
    if hasattr(of, "mirrors"):  # MNIST and its kin
        for name, md5 in of.resources:
            yield Remote(name, tuple(mirror + name for mirror in of.mirrors), md5)
    elif hasattr(of, "split_list"):  # SVHN
        for part in parts:
            url, name, md5 = of.split_list[part]
            yield Remote(name, (url,), md5)
    elif hasattr(of, "tgz_md5"):  # CIFAR, STL-10
        yield Remote(of.filename, (of.url,), of.tgz_md5)
    elif hasattr(of, "_RESOURCES"):  # Oxford-IIIT Pet
        for url, md5 in of._RESOURCES:
            yield _named(url, md5)
    elif hasattr(of, "_file_dict"):  # Oxford Flowers
        for name, md5 in of._file_dict.values():
            yield Remote(name, (of._download_url_prefix + name,), md5)
    elif hasattr(of, "_DATASET_URL"):  # SUN397
        yield _named(of._DATASET_URL, of._DATASET_MD5)
    elif hasattr(of, "_URL"):  # Food-101, DTD, FGVC-Aircraft (which has no checksum)
        yield _named(of._URL, getattr(of, "_MD5", ""))


def _named(url: str, md5: str) -> Remote:
    return Remote(url.rpartition("/")[2], (url,), md5)
