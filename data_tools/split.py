"""Writing label split files: which training rows are labelled, unlabelled and held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_tools.atomic import write_file
from data_tools.laws import draw, hold_out
from data_tools.longtail import draw_setting, parse_setting
from fastssl.errors import DataError
from fastssl.sources.manifest import FORMAT_VERSION, LabelSplit, load_labels, load_manifest, load_split, split_digest


def make_split(
    dataset: str | Path,
    name: str,
    *,
    law: str = "tllib",
    per_class: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
    validation: int = 0,
    force: bool = False,
    setting: str | None = None,
) -> LabelSplit:
    """Draw labelled rows of the train split by ``law`` and write ``<dataset>/splits/<name>.json``.

    The law sees the whole training set; ``validation`` rows are then held out of the rows without a label, class-balanced, with the same seed.
    ``setting`` names a long-tailed setting (:mod:`data_tools.longtail`) in place of a law; rows that it takes for neither side are left out of the split.
    The same arguments give the same bytes, and writing the same split again is not an error; another split of that name is, unless ``force``.
    """
    if not name or any(char in name for char in "/\\") or name.startswith(".") or name.endswith(".json"):
        raise DataError(f"split name {name!r} cannot be a file name; use letters, digits, - and _")
    if validation < 0:
        raise DataError(f"--validation {validation} is negative; give the number of rows to hold out")
    manifest = load_manifest(dataset)
    labels = load_labels(manifest, "train")
    arguments: dict[str, object] = {"per_class": per_class, "fraction": fraction, "validation": validation}
    if setting is None:
        labeled, unlabeled = draw(law, labels, manifest.num_classes, per_class=per_class, fraction=fraction, seed=seed)
    else:
        if per_class is not None or fraction is not None:
            raise DataError("a long-tailed --setting says how many images have labels; leave out --per-class and --fraction")
        tail = parse_setting(setting)
        labeled, unlabeled = draw_setting(tail, labels, manifest.num_classes, seed)
        law, arguments = "longtail", {**arguments, "setting": tail.text}
    held = hold_out(labels, unlabeled, manifest.num_classes, validation, seed) if validation else np.zeros(0, np.int64)
    unlabeled = unlabeled[~np.isin(unlabeled, held)]
    info = manifest.split("train")
    content = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "law": law,
        "seed": seed,
        "arguments": arguments,
        "dataset": manifest.name,
        "dataset_digest": manifest.digest,
        "rows_digest": info.rows_digest,
        "of": "train",
        "labeled": labeled.tolist(),
        "unlabeled": unlabeled.tolist(),
        "validation": held.tolist(),
        "digest": split_digest("train", info.rows_digest, labeled, unlabeled, held),
    }
    data = (json.dumps(content, separators=(",", ":")) + "\n").encode()
    file = manifest.root / "splits" / f"{name}.json"
    if file.exists() and file.read_bytes() != data and not force:
        raise DataError(f"{str(file)!r} already exists with other rows; choose another --name or add --force")
    write_file(file, data)
    return load_split(manifest, name)
