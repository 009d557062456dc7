"""Published label splits of a collection (STL-10's folds) written beside the data that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_tools.progress import say
from data_tools.split import write_split
from data_tools.split_rows import source_places
from fastssl.sources.manifest import load_manifest
from fastssl.sources.split_text import rest_of


def write_official(folder: Path, official: Mapping[str, np.ndarray]) -> None:
    """Write each split of ``official`` (name -> labelled rows of the source's training split) for the dataset in ``folder``; all other rows are unlabelled.

    Rows whose images could not be converted are left out, and said.
    """
    if not official:
        return
    manifest = load_manifest(folder)
    places = source_places(manifest, "train")
    for name, rows in official.items():
        spot = np.minimum(np.searchsorted(places, rows), len(places) - 1)
        labeled = spot[places[spot] == rows]
        if len(labeled) < len(rows):
            say(f"label split {name}: {len(rows) - len(labeled)} of its {len(rows)} images could not be converted and are left out of it")
        if len(labeled):
            none = np.zeros(0, np.int64)
            rest = rest_of(manifest.split("train").count, labeled)
            write_split(manifest, name, law="official", seed=0, arguments={}, labeled=labeled, unlabeled=rest, validation=none, force=True)
