"""A selection as a dataset view: rows of a pool, each with the label of the list it stands in; an image of several lists is there once for each.

selection.json   counts, rule, teacher, pool, the files with their digests
part-00000.parquet, ...   image_id uint64 (row of the pool's split), cls int32, score float32, rank int32, n_lists int32, copies int32; by class, then rank
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastssl.errors import DataError
from fastssl.sources.manifest import Manifest, load_manifest
from fastssl.sources.sealed import read_sealed

FORMAT_VERSION = 1
MANIFEST_NAME = "selection.json"
COLUMNS = {"image_id": "uint64", "cls": "int32", "score": "float32", "rank": "int32", "n_lists": "int32", "copies": "int32"}
_MEND = "make the selection again with `fastssl select topk`"


@dataclass(frozen=True)
class Selection:
    """A selection on disk: ``info`` is selection.json, ``digest`` its own digest. ``pool``: the manifest of the dataset whose rows are selected."""

    folder: Path
    info: dict[str, Any]
    digest: str

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.info["classes"])

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Columns of all rows (all columns if none are named). Raises DataError for files that are not what was written."""
        wanted = list(names) or list(COLUMNS)
        tables = []
        for entry in self.info["files"]:
            path = self.folder / entry["name"]
            try:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                    raise ValueError("its digest differs")
                tables.append(pq.read_table(pa.BufferReader(content), columns=wanted))
            except (OSError, ValueError, pa.ArrowException) as error:
                raise DataError(f"{path} is damaged ({error}); {_MEND}") from None
        if not tables:
            return {name: np.empty(0, dtype=COLUMNS[name]) for name in wanted}
        table = pa.concat_tables(tables)
        return {name: table.column(name).to_numpy() for name in wanted}

    def pool(self) -> Manifest:
        """The pool's manifest. Raises DataError where it is gone or holds other data now."""
        place = self.info["pool"]
        manifest = load_manifest(place["path"])
        if manifest.digest != place["dataset_digest"]:
            raise DataError(f"{place['path']} is not the data that {self.folder} was selected from (its digest differs); {_MEND}")
        return manifest

    def rows_and_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 rows of the pool and int64 labels, one entry per training example: copies are repeated."""
        found = self.columns("image_id", "cls", "copies")
        return tuple(np.repeat(found[name].astype(np.int64), found["copies"]) for name in ("image_id", "cls"))  # type: ignore[return-value]


def load_selection(path: str | Path) -> Selection:
    """Open a selection folder. Raises DataError for a missing, damaged or unknown one."""
    folder = Path(path)
    file = folder / MANIFEST_NAME
    if not file.is_file():
        raise DataError(f"{folder} is no selection: it has no {MANIFEST_NAME}; make one with `fastssl select topk`")
    info = read_sealed(file, _MEND)
    if info.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{file} has format version {info.get('format_version')}, this fastssl reads version {FORMAT_VERSION}; {_MEND}")
    return Selection(folder, info, hashlib.sha256(file.read_bytes()).hexdigest())


def check_classes(selection: Selection, classes: Sequence[str]) -> None:
    """DataError unless the selection's lists are about these classes."""
    if selection.classes != tuple(classes):
        raise DataError(f"{selection.folder} has lists of {len(selection.classes)} other classes than the dataset's {len(classes)}; use the teacher's dataset")
