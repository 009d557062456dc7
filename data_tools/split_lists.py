"""Lists of labelled images that others publish: reading their forms, and telling the named ImageNet lists apart."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastssl.errors import DataError, nearest

FORMS = ("names", "paths", "csv", "npy", "index")
INDEX_COLUMN = "index"


@dataclass(frozen=True)
class Listed:
    """One list as read: image ``names`` (base names or paths) or ``places`` in the source's order (int64), never both; ``labels`` int64 where it has them.

    ``digest`` is the sha256 of the file, ``text_digests`` those of its base names one per line, in order, with and without a line end after the last.
    """

    file: str
    form: str
    names: list[str] | None
    places: np.ndarray | None
    labels: np.ndarray | None
    digest: str
    text_digests: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names) if self.names is not None else len(self.places) if self.places is not None else 0


@dataclass(frozen=True)
class NamedList:
    """A published list by what is known of it: ``count`` images, ``per_class`` (fewest, most), the sha256 of its file where that is published."""

    count: int
    per_class: tuple[int, int]
    where: str
    sha256: str = ""
    classes: int = 1000


NAMED = {
    # The digests are those that TensorFlow Datasets publishes for the files of the SimCLR repository (imagenet_subsets/).
    "simclr-1pct": NamedList(12811, (12, 13), "SimCLR's 1percent.txt", "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17"),
    "simclr-10pct": NamedList(128116, (128, 129), "SimCLR's 10percent.txt", "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091"),
    "simmatch-1pct": NamedList(13000, (13, 13), "SimMatch's and ShrinkMatch's split_1p_index.txt"),
    "simmatch-10pct": NamedList(128000, (128, 128), "SimMatch's and ShrinkMatch's split_10p_index.txt"),
    "simmatchv2-1pct": NamedList(12811, (12, 13), "SimMatchV2's split_1p_index.txt"),
    "simmatchv2-10pct": NamedList(128116, (128, 129), "SimMatchV2's split_10p_index.txt"),
}


def read_list(file: str | Path, form: str = "auto") -> Listed:
    """Read a list of images.  ``form`` auto takes .npy and .csv by their ending; a text whose every line is a whole number is ``index``, one whose every line
    ends with a number after a name is ``paths``, anything else ``names``.  DataError for an unreadable or empty list and for one that names an image twice.
    """
    path = Path(file)
    if form not in ("auto", *FORMS):
        raise DataError(f"unknown form of list {form!r}{nearest(form, FORMS)}; known: auto, {', '.join(FORMS)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"list {str(path)!r} cannot be read ({error.strerror})") from error
    if form == "auto":
        form = {".npy": "npy", ".csv": "csv"}.get(path.suffix.lower(), "text")
    try:
        form, names, places, labels = _read_npy(data) if form == "npy" else _read_csv(data) if form == "csv" else _read_text(data, form)
    except (ValueError, UnicodeDecodeError, OverflowError, csv.Error) as error:
        raise DataError(f"list {str(path)!r} cannot be read as {form}: {error}; --form says what it is: {', '.join(FORMS)}") from error
    listed = Listed(path.name, form, names, places, labels, hashlib.sha256(data).hexdigest(), _text_digests(names))
    if not len(listed):
        raise DataError(f"list {str(path)!r} is empty")
    distinct = len(set(names)) if names is not None else np.unique(places).size if places is not None else 0
    if distinct != len(listed):
        raise DataError(f"list {str(path)!r} has {len(listed)} lines but names only {distinct} different images; remove the repeats")
    return listed


Read = tuple[str, list[str] | None, np.ndarray | None, np.ndarray | None]


def _read_npy(data: bytes) -> Read:
    array = np.load(io.BytesIO(data), allow_pickle=False).reshape(-1)
    if array.dtype.kind in "iu":
        return "npy", None, array.astype(np.int64), None
    if array.dtype.kind in "US":
        return "npy", [name.decode() if isinstance(name, bytes) else str(name) for name in array.tolist()], None, None
    raise ValueError(f"an array of {array.dtype}, expected whole numbers or text (object arrays are pickles and are not opened)")


def _read_csv(data: bytes) -> Read:
    rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    column = next((i for i, title in enumerate(rows[0]) if title.strip().lower() == INDEX_COLUMN), None) if rows else None
    if column is None:
        raise ValueError("it has no column called Index in its first line")
    try:
        return "csv", None, np.array([int(row[column]) for row in rows[1:] if row], np.int64), None
    except IndexError:
        raise ValueError("a line is shorter than the first line") from None


def _read_text(data: bytes, form: str) -> Read:
    lines = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    if form == "index" or (form == "text" and lines and all(line.isdecimal() for line in lines)):
        return "index", None, np.array([int(line) for line in lines], np.int64), None
    halves = [line.rpartition(" ") if " " in line else line.rpartition("\t") for line in lines]
    if form == "paths" or (form == "text" and all(name and label.isdecimal() for name, _, label in halves)):
        return "paths", [name.strip() for name, _, _ in halves], None, np.array([int(label) for _, _, label in halves], np.int64)
    return "names", lines, None, None


def _text_digests(names: list[str] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    text = "\n".join(name.rsplit("/", 1)[-1] for name in names).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest(), hashlib.sha256(text + b"\n").hexdigest()


def check_named(name: str, listed: Listed, counts: np.ndarray) -> None:
    """DataError unless ``listed``, with ``counts`` images per class, can be the published list ``name``."""
    if name not in NAMED:
        raise DataError(f"no list is known as {name!r}{nearest(name, NAMED)}; known: {', '.join(NAMED)}; without --as any list is taken")
    known = NAMED[name]
    if len(counts) != known.classes:
        raise DataError(f"{name} is a list of ImageNet's {known.classes} classes, the dataset has {len(counts)}; import the list without --as")
    reasons = _differences(known, listed, counts)
    if reasons:
        fits = [other for other in NAMED if not _differences(NAMED[other], listed, counts)]
        hint = f"it may be {' or '.join(fits)}" if fits else "no list known here is like that"
        raise DataError(f"{listed.file!r} is not {name} ({known.where}): {reasons[0]}; {hint}. Import it under its own name, or without --as")


def recognise(listed: Listed, counts: np.ndarray) -> list[str]:
    """Names of the published lists that ``listed`` can be; exactly one where a published digest decides."""
    fits = [name for name, known in NAMED.items() if len(counts) == known.classes and not _differences(known, listed, counts)]
    sure = [name for name in fits if NAMED[name].sha256]
    return sure or fits


def _differences(known: NamedList, listed: Listed, counts: np.ndarray) -> list[str]:
    reasons = []
    if len(listed) != known.count:
        reasons.append(f"it has {len(listed)} images, that list has {known.count}")
    low, high = int(counts.min()), int(counts.max())
    if low < known.per_class[0] or high > known.per_class[1]:
        reasons.append(f"it has {low}..{high} images per class, that list has {known.per_class[0]}..{known.per_class[1]}")
    if known.sha256 and known.sha256 not in (listed.digest, *listed.text_digests):
        held = "its names are not those of the published file, in that order" if listed.names is not None else "it holds places and no names to compare"
        reasons.append(f"{held} (sha256)")
    return reasons


def own_draw_note(percent: float | str, count: int, num_classes: int) -> str:
    """What to say when ``percent`` of a 1000-class dataset is drawn here: it is none of the published lists.  "" where no published list is near."""
    near = [
        f"{name} ({known.count} images)" for name, known in NAMED.items() if known.classes == num_classes and abs(known.count - count) <= 0.02 * known.count
    ]
    if not near:
        return ""
    return (
        f"{percent} % here is a draw of our own: {count} images, class-balanced, by the seed. Published results use other images: {', '.join(near)}; "
        "such a list comes in with `fastssl-data split import DATASET FILE --as NAME`"
    )
