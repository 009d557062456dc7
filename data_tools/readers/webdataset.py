"""Tar shards as WebDataset writes them: files that share a name up to its first dot are one sample (image, .cls, .json, .txt)."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.collection import UNKNOWN, Collection, Keys, Reader, digest_of, file_state
from data_tools.readers.class_maps import class_names, names_or_numbers
from data_tools.readers.names import IMAGE_SUFFIXES
from data_tools.readers.split_names import OPTIONS, arrange, split_of
from data_tools.readers.tar_index import Member, TarSplit, members, read_at
from fastssl.errors import DataError, nearest

IMAGE_ENDINGS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
_FIELDS = ("label", "cls", "class", "target", "class_name")
_LABELS = ("auto", "cls", "json", "txt", "folder", "none")


def _open(source: str, options: Mapping[str, str]) -> Collection | None:
    root = Path(source)
    if root.is_file() and root.name.lower().endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")):
        raise DataError(f"{str(root)!r} is compressed and cannot be read in any order; decompress it to a plain .tar first")
    files = [root] if root.is_file() and root.suffix == ".tar" else sorted(root.rglob("*.tar")) if root.is_dir() else []
    if not files:
        return None
    base = root.parent if root.is_file() else root
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(file.relative_to(base).as_posix()), []).append(file)
    ask = _Asked(options)
    known = list(class_names(options["classes"])) if "classes" in options else []
    words = {name: label for label, name in enumerate(known)}
    fixed = bool(known)
    raw = {name: _index(base, shards, ask, words, fixed) for name, shards in by_split.items()}
    if words and not fixed:  # names in their order of appearance become names in alphabetical order
        if any(split.labels.max(initial=UNKNOWN) >= len(words) for split in raw.values()):
            raise DataError(f"{str(root)!r}: some labels are names and some are numbers; give the class names in label order with --option classes=FILE")
        order = np.argsort(np.argsort(np.array(list(words))))
        raw = {name: _relabel(split, order) for name, split in raw.items()}
        classes = tuple(sorted(words))
    else:
        classes = tuple(known) or names_or_numbers(options, base, [split.labels for split in raw.values()])
    return Collection("tar", root.resolve().name.removesuffix(".tar"), classes, 3, arrange(raw, options))


class _Asked:
    """What the options say of images and labels: ``label=cls|json[:FIELD]|txt|folder|none``, ``image=ENDING``."""

    def __init__(self, options: Mapping[str, str]):
        self.kind, _, self.field = options.get("label", "auto").partition(":")
        if self.kind not in _LABELS:
            raise DataError(f"option label={self.kind!r} is unknown{nearest(self.kind, _LABELS)}; it takes {', '.join(_LABELS)} (json:FIELD names the field)")
        self.image = options.get("image", "").lower().lstrip(".")

    def is_image(self, ending: str) -> bool:
        return ending == self.image if self.image else ending in IMAGE_ENDINGS


def _index(base: Path, shards: list[Path], ask: _Asked, words: dict[str, int], fixed: bool) -> TarSplit:
    shard_N, offset_N, size_N, labels = (array("q") for _ in range(4))

    def names() -> Iterator[str]:
        for number, shard in enumerate(shards):
            for key, sample in _samples(shard):
                images = [ending for ending in sample if ask.is_image(ending)]
                if not images and not ({"cls", "json"} & set(sample)):
                    continue  # a file that belongs to no image, such as a read-me
                if len(images) != 1:
                    found = ", ".join(sorted(sample))
                    hint = "; choose one with --option image=ENDING" if images else ""
                    raise DataError(f"{str(shard)!r}: sample {key!r} has {len(images)} images (it holds {found}){hint}")
                member = sample[images[0]]
                shard_N.append(number)
                offset_N.append(member.offset)
                size_N.append(member.size)
                labels.append(_label(shard, key, sample, ask, words, fixed))
                yield member.name

    found = Keys.of(names())
    if not len(found):
        raise DataError(f"{str(shards[0])!r} holds no images; known endings: {', '.join(IMAGE_ENDINGS)}")
    archives = tuple(shard.relative_to(base).as_posix() for shard in shards)
    columns = [np.frombuffer(column, np.int64) for column in (shard_N, offset_N, size_N, labels)]
    return TarSplit(str(base), archives, found, columns[0], columns[1], columns[2], columns[3], digest_of(*map(file_state, shards)))


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, ending -> member) of the samples of a shard: neighbours with one key."""
    current = ""
    sample: dict[str, Member] = {}
    for member in members(shard):
        folder, slash, name = member.name.rpartition("/")
        stem, dot, ending = name.partition(".")
        if not stem or not dot or "__MACOSX" in folder:
            continue
        key = f"{folder}{slash}{stem}"
        if key != current and sample:
            yield current, sample
            sample = {}
        current = key
        sample[ending.lower()] = member
    if sample:
        yield current, sample


def _label(shard: Path, key: str, sample: dict[str, Member], ask: _Asked, words: dict[str, int], fixed: bool) -> int:
    kind = ask.kind
    if kind == "auto":
        kind = next((ending for ending in ("cls", "json") if ending in sample), "")
        if not kind:
            there = ", ".join(sorted(sample))
            raise DataError(
                f"{str(shard)!r}: sample {key!r} has neither .cls nor .json (it holds {there}); say --option label=none for images without labels, "
                "label=cls where some lack theirs, label=txt for class names in .txt, or label=folder for class folders"
            )
    value: Any = None
    if kind == "folder":
        value = key.rpartition("/")[0].rpartition("/")[2] or None
    elif kind != "none" and kind in sample:
        value = _content(shard, sample[kind], kind, ask.field)
    if value is None:
        return UNKNOWN
    try:
        if isinstance(value, str) and fixed and value in words:
            return words[value]
        number = int(value)
        if kind != "folder":
            return number if number >= 0 else UNKNOWN
    except (ValueError, TypeError):
        pass
    name = str(value)
    if fixed and name not in words:
        raise DataError(f"{str(shard)!r}: sample {key!r} has the class {name[:60]!r}, which the class map lacks{nearest(name, words)}: wrong class map")
    return words.setdefault(name, len(words))


def _content(shard: Path, member: Member, kind: str, field: str) -> Any:
    """The label that a .cls, .txt or .json member holds; None where it says nothing."""
    data = read_at(shard, member.offset, member.size)
    try:
        text = data.decode().strip()
        if kind != "json":
            return text or None
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{str(shard)!r}: {member.name!r} cannot be read as a label ({error})") from error
    if not isinstance(found, dict):
        return found
    names = (field,) if field else _FIELDS
    name = next((name for name in names if name in found), None)
    if name is None:
        have = ", ".join(sorted(found)) or "nothing"
        raise DataError(f"{str(shard)!r}: {member.name!r} has no field {' or '.join(names)} (it has {have}); say --option label=json:FIELD or label=none")
    return found[name]


def _relabel(split: TarSplit, order: np.ndarray) -> TarSplit:
    labels = np.where(split.labels >= 0, order[split.labels], UNKNOWN)
    return TarSplit(split.root, split.archives, split.names, split.archive_N, split.offset_N, split.size_N, labels, split.state)


READER = Reader("tar", "tar or WebDataset shards (*.tar; labels in .cls, .json or .txt)", _open, ("label", "image", "classes", *OPTIONS))
