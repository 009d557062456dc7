"""Which part of a collection becomes train, test and unlabelled rows, from the names that its files carry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from data_tools.collection import RawSplit
from data_tools.readers.joined import join, without_labels
from fastssl.errors import DataError, nearest

OPTIONS = ("train", "test", "unlabeled")
_TEST = ("test", "validation", "valid", "val")
_UNLABELED = ("unlabeled", "unlabelled", "unsupervised")
_WORD = re.compile(r"(?:^|[^a-z])(train|test|validation|valid|val|unlabeled|unlabelled|unsupervised)(?=$|[^a-z])")


def split_of(path: str) -> str:
    """The split that a relative path speaks of, ``train`` where it speaks of none: its file name counts first, then its folders from the inside out."""
    for part in reversed(path.lower().replace("\\", "/").split("/")):
        found = _WORD.findall(part)
        if found:
            return found[-1]
    return "train"


def arrange(parts: Mapping[str, RawSplit], options: Mapping[str, str]) -> dict[str, RawSplit]:
    """Splits ``train`` (with unlabelled parts appended, labels -1), ``test`` and whatever else there is under its own name.

    Options name other parts for the three roles.  Without them: train is ``train`` or the only part, test is the first of test, validation, valid, val.
    """
    for role in OPTIONS:
        if role in options and options[role] not in parts:
            raise DataError(f"option {role}={options[role]!r}: there is no such part{nearest(options[role], parts)}; there is {', '.join(parts)}")
    unlabeled = [options["unlabeled"]] if "unlabeled" in options else [name for name in _UNLABELED if name in parts]
    named = [name for name in parts if name not in unlabeled]
    train = options.get("train") or _first(("train",), named) or (named[0] if len(named) == 1 else "")
    test = options.get("test") or _first(_TEST, [name for name in named if name != train])
    if not train and not unlabeled:
        raise DataError(f"which part is the training set?  There is {', '.join(parts)}; say --option train=NAME")
    pieces = [parts[train]] if train else []
    splits = {"train": join(*pieces, *(without_labels(parts[name]) for name in unlabeled))}
    if test:
        splits["test"] = parts[test]
    return splits | {name: parts[name] for name in named if name not in (train, test)}


def _first(wanted: Iterable[str], names: Iterable[str]) -> str:
    names = list(names)
    return next((name for name in wanted if name in names), "")
