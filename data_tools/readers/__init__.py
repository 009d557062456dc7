"""Readers of raw image collections, one file per kind; ``open_raw`` recognises which one a source is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data_tools.collection import Collection, Reader
from data_tools.readers import (
    aircraft,
    caltech101,
    cars,
    cifar_batches,
    cifar_binary,
    cifar_sheets,
    class_folders,
    cub200,
    dtd,
    flat_folder,
    flowers102,
    food101,
    idx,
    image_lists,
    imagenet_archives,
    pets,
    small_imagenet,
    stl10,
    sun397,
    svhn,
    tables,
    torchvision_sets,
    webdataset,
)  # fmt: skip
from fastssl.errors import DataError, nearest

# Asked in this order: kinds with telling file names come before kinds that are any folder of images.
READERS: tuple[Reader, ...] = (
    torchvision_sets.READER,
    cifar_sheets.READER,
    cifar_batches.READER,
    cifar_binary.READER,
    stl10.READER,
    svhn.READER,
    idx.READER,
    small_imagenet.READER,
    imagenet_archives.READER,
    food101.READER,
    cub200.READER,
    aircraft.READER,
    cars.READER,
    sun397.READER,
    dtd.READER,
    pets.READER,
    flowers102.READER,
    caltech101.READER,
    image_lists.READER,
    class_folders.READER,
    tables.SAVED,
    tables.PARQUET,
    webdataset.READER,
    class_folders.TREE,
    flat_folder.READER,
)


def open_raw(source: str | Path, *, kind: str = "auto", options: Mapping[str, str] | None = None) -> Collection:
    """Recognise what kind of collection ``source`` is and open it; ``kind`` names a reader instead, ``options`` are its settings.

    Raises DataError for a source that does not exist, is of no known kind or not of the named one, is damaged, and for unknown kinds and options.
    """
    options = dict(options or {})
    kinds = {reader.kind: reader for reader in READERS}
    if kind != "auto" and kind not in kinds:
        raise DataError(f"unknown kind of source {kind!r}{nearest(kind, kinds)}; known: auto, {', '.join(kinds)}")
    asked = READERS if kind == "auto" else (kinds[kind],)
    for reader in asked:
        found = reader.open(str(source), options)
        if found is not None:
            unknown = sorted(set(options) - set(reader.options))
            if unknown:
                known = ", ".join(reader.options) or "none"
                raise DataError(f"a source of kind {reader.kind} has no option {unknown[0]!r}{nearest(unknown[0], reader.options)}; it has: {known}")
            return found
    root = Path(source)
    if not root.exists():
        raise DataError(f"source {str(root)!r} does not exist; fetch it first with `fastssl-data fetch NAME {root}`")
    if not root.is_dir():
        raise DataError(f"source {str(root)!r} is not a folder; unpack it first")
    if kind != "auto":
        raise DataError(f"{str(root)!r} is no collection of kind {kind} (asked for {kind}), which is: {kinds[kind].shape}")
    raise DataError(f"{str(root)!r} is no known kind of image collection; known: {', '.join(kinds)}; `fastssl-data convert --help` says what each is")
