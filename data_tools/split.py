"""Making label split files (which training rows are labelled, unlabelled and held out): drawn by a law, or from a list that others publish."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from data_tools.atomic import told, write_file
from data_tools.laws import draw, hold_out
from data_tools.longtail import draw_setting, parse_setting
from data_tools.split_lists import NAMED, check_named, read_list, recognise
from data_tools.split_rows import find_rows
from fastssl.errors import DataError
from fastssl.sources.manifest import LabelSplit, Manifest, load_labels, load_manifest, load_split, split_digest
from fastssl.sources.split_text import render_split, rest_of


def make_split(
    dataset: str | Path,
    name: str,
    *,
    law: str = "",
    per_class: int | None = None,
    fraction: float | None = None,
    percent: float | str | None = None,
    seed: int = 0,
    validation: int = 0,
    force: bool = False,
    setting: str | None = None,
) -> LabelSplit:
    """Draw labelled rows of the train split by ``law`` (default tllib, or balanced with ``percent``) and write ``<dataset>/splits/<name>.txt``.

    The law sees the whole training set; ``validation`` rows are then held out of the rows without a label, class-balanced, with the same seed.
    ``setting`` names a long-tailed setting (:mod:`data_tools.longtail`) in place of a law; rows that it takes for neither side are left out of the split.
    Unlabelled rows are kept ascending, whatever the law's own order.
    The same arguments give the same bytes, and writing the same split again is not an error; another split of that name is, unless ``force``.
    """
    check_name(name)
    if validation < 0:
        raise DataError(f"--validation {validation} is negative; give the number of rows to hold out")
    manifest = load_manifest(dataset)
    labels = load_labels(manifest, "train")
    arguments: dict[str, object] = {"per_class": per_class, "fraction": fraction, "percent": percent, "validation": validation or None}
    if setting is None:
        law = law or ("tllib" if percent is None else "balanced")
        labeled, unlabeled = draw(law, labels, manifest.num_classes, per_class=per_class, fraction=fraction, percent=percent, seed=seed)
    else:
        if per_class is not None or fraction is not None or percent is not None:
            raise DataError("a long-tailed --setting says how many images have labels; leave out --per-class, --percent and --fraction")
        tail = parse_setting(setting)
        labeled, unlabeled = draw_setting(tail, labels, manifest.num_classes, seed)
        law, arguments = "longtail", {**arguments, "setting": tail.text}
    held = hold_out(labels, unlabeled, manifest.num_classes, validation, seed) if validation else np.zeros(0, np.int64)
    unlabeled = np.sort(unlabeled[~np.isin(unlabeled, held)])
    return write_split(manifest, name, law=law, seed=seed, arguments=arguments, labeled=labeled, unlabeled=unlabeled, validation=held, force=force)


def import_split(
    dataset: str | Path,
    file: str | Path,
    *,
    name: str = "",
    known_as: str = "",
    form: str = "auto",
    sort: bool = False,
    seed: int = 0,
    validation: int = 0,
    skip_missing: bool = False,
    force: bool = False,
) -> tuple[LabelSplit, list[str]]:
    """Write a list of images that others publish as the label split ``name`` (default ``known_as``); every other row is unlabelled.

    Returns the split and remarks: which published list it is or may be, and what was skipped.  Labelled rows keep the list's order, or ascend with ``sort``.
    ``known_as`` says which list of :data:`data_tools.split_lists.NAMED` it is; DataError where it cannot be.
    """
    name = name or known_as
    check_name(name)
    manifest = load_manifest(dataset)
    listed = read_list(file, form)
    if known_as and skip_missing:
        raise DataError(f"{known_as} with images missing is another list; give it a --name and leave out --as")
    labeled, skipped = find_rows(manifest, "train", listed, skip_missing=skip_missing)
    labels = load_labels(manifest, "train")
    if (labels[labeled] < 0).any():
        raise DataError(f"{listed.file!r} lists {int((labels[labeled] < 0).sum())} images whose class nobody knows; they cannot be labelled")
    counts = np.bincount(labels[labeled], minlength=manifest.num_classes)
    remarks = [f"skipped {skipped} images of the list that the dataset does not have"] if skipped else []
    if known_as:
        check_named(known_as, listed, counts)
    fits = [] if skipped else recognise(listed, counts)
    if fits and not known_as:
        sure = "this is" if NAMED[fits[0]].sha256 else "by number and classes this may be"
        remarks.append(f"{sure} {' or '.join(f'{one} ({NAMED[one].where})' for one in fits)}")
    elif known_as and not NAMED[known_as].sha256:
        remarks.append(f"{known_as}: the number of images and of each class is right; no digest of that list is published to compare with")
    labeled = np.sort(labeled) if sort else labeled
    unlabeled = rest_of(len(labels), labeled)
    held = hold_out(labels, unlabeled, manifest.num_classes, validation, seed) if validation else np.zeros(0, np.int64)
    arguments: dict[str, object] = {"file": listed.file, "form": listed.form, "sha256": listed.digest, "list": known_as or None}
    arguments |= {"validation": validation or None, "skipped": skipped or None}
    unlabeled = rest_of(len(labels), labeled, held)
    return write_split(manifest, name, law="list", seed=seed, arguments=arguments, labeled=labeled, unlabeled=unlabeled, validation=held, force=force), remarks


def check_name(name: str) -> None:
    """DataError unless ``name`` can be a split's name."""
    if not re.fullmatch(r"[^\s/\\.][^\s/\\]*", name) or name.endswith((".json", ".txt")):
        raise DataError(f"split name {name!r} cannot be a file name; use letters, digits, - and _")


def write_split(
    manifest: Manifest,
    name: str,
    *,
    law: str,
    seed: int,
    arguments: dict[str, object],
    labeled: np.ndarray,
    unlabeled: np.ndarray,
    validation: np.ndarray,
    force: bool = False,
) -> LabelSplit:
    """Write the rows as ``splits/<name>.txt`` and read them back.  ``unlabeled`` must be ascending; it is left out of the file where it is simply the rest."""
    info = manifest.split("train")
    is_rest = np.array_equal(unlabeled, rest_of(info.count, labeled, validation))
    raw = {
        "name": name,
        "law": law,
        "seed": seed,
        "arguments": {key: value for key, value in arguments.items() if value is not None},
        "dataset": manifest.name,
        "dataset_digest": manifest.digest,
        "rows_digest": info.rows_digest,
        "of": "train",
        "labeled": labeled,
        "validation": validation,
        "unlabeled": None if is_rest else unlabeled,
        "unlabeled_count": len(unlabeled),
        "digest": split_digest("train", info.rows_digest, labeled, unlabeled, validation),
    }
    data = render_split(raw).encode()
    file = manifest.root / "splits" / f"{name}.txt"
    older = manifest.root / "splits" / f"{name}.json"
    if not force and (older.is_file() or (file.is_file() and file.read_bytes() != data)):
        there = older if older.is_file() else file
        raise DataError(f"{str(there)!r} already exists with other rows or another form; choose another --name or add --force")
    write_file(file, data)
    with told(older):
        older.unlink(missing_ok=True)  # two files of one name would be two splits
    return load_split(manifest, name)
