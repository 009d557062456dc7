"""Bytes of a dataset's data files that belong to no image: conversion writes zeros there, and other bytes are a sign of a damaged disk or copy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastssl.sources.beton import FIELD, HEADER, open_beton, record_dtype
from fastssl.sources.manifest import Manifest

_BLOCK = 1 << 24


def unused_bytes(manifest: Manifest, split: str) -> str:
    """What is wrong with the gaps of a ``.beton`` ("" = nothing); other formats have none (canvas padding is looked at image by image).

    Raises DataError where the file cannot be opened.
    """
    if manifest.format != "ffcv":
        return ""
    name = manifest.split(split).files["beton"]
    beton = open_beton(manifest.root / name)
    header = np.frombuffer(beton.data, HEADER, count=1)[0]
    fields = np.frombuffer(beton.data, FIELD, count=int(header["num_fields"]), offset=HEADER.itemsize)
    first = HEADER.itemsize + fields.nbytes + beton.num_rows * record_dtype(fields["type_id"].tolist()).itemsize
    if fields["arguments"].any():
        return f"the field table of {name} has changed since it was written"
    order = np.argsort(beton.ptr_N, kind="stable")
    starts, ends = beton.ptr_N[order], (beton.ptr_N + beton.size_N)[order]
    for start, stop in _gaps(np.concatenate([[first], ends]), np.concatenate([starts, [int(header["alloc_table_ptr"])]])):
        for place in range(start, stop, _BLOCK):
            if beton.data[place : min(place + _BLOCK, stop)].any():
                return f"bytes of {name} between {start} and {stop}, which belong to no image, have changed since it was written"
    return ""


def _gaps(ends: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, int]]:
    for gap in np.flatnonzero(starts > ends).tolist():
        yield int(ends[gap]), int(starts[gap])
