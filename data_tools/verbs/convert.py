"""``fastssl-data convert``."""

from __future__ import annotations

import argparse
import time
from typing import Any

from data_tools.images import MAX_PIXELS
from data_tools.readers import READERS
from data_tools.storage import MODES
from data_tools.verbs import add_verb
from fastssl.errors import DataError
from fastssl.sources.manifest import FORMATS, load_manifest


def add(verbs: Any) -> None:
    """Define the verb's arguments."""
    convert = add_verb(
        verbs,
        "convert",
        "turn raw images into a dataset folder",
        "SOURCE may be:\n"
        + "".join(f"  {reader.kind:14}  {reader.shape}\n" for reader in READERS)
        + "formats:\n  arrays  plain uint8 pixels, best up to about 96x96 (images of different sizes are padded to the largest)\n"
        "  ffcv    one .beton file per split, best for photos: JPEG originals are kept byte for byte\n"
        "  dali    WebDataset tar shards with DALI's index: JPEG originals byte for byte, everything else PNG; read with or without DALI\n"
        "examples:\n  fastssl-data convert raw/cifar10 data/cifar10\n  fastssl-data convert photos data/photos --format ffcv\n"
        "  fastssl-data convert imagenet data/imagenet-500 --format ffcv --max-side 500\n"
        "DEST appears only when everything is written; an existing DEST is refused unless --force.  A stopped conversion is continued by the same command.\n"
        "Images that cannot be converted are left out and listed in DEST/bad.parquet with the reason.  All rules: docs/data/convert.md",
    )
    convert.add_argument("source", metavar="SOURCE", help="raw images")
    convert.add_argument("dest", metavar="DEST", help="dataset folder to write")
    convert.add_argument("--format", default="arrays", metavar="FORMAT", help=f"{' or '.join(FORMATS)} (default arrays)")
    convert.add_argument("--name", default="", help="the dataset's name (default: the known name, or the source folder's)")
    convert.add_argument("--mode", default="auto", help=f"ffcv, dali: {', '.join(MODES)} (default auto: JPEGs stay JPEGs, all else without loss)")
    convert.add_argument("--quality", "--jpeg-quality", dest="quality", type=int, default=95, metavar="Q", help="of new JPEGs: 1..100 (default 95)")
    convert.add_argument("--proportion", type=float, default=0.5, metavar="P", help="with --mode proportion: share of rows stored as JPEG (default 0.5)")
    convert.add_argument("--smart-threshold", type=int, default=1_000_000, metavar="B", help="--mode smart: JPEG above B bytes of pixels (default 1000000)")
    convert.add_argument("--max-side", type=int, default=0, metavar="N", help="reduce larger images until the longer side is N (default: keep all)")
    convert.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"larger images are bad (default {MAX_PIXELS})")
    convert.add_argument("--exif", default="apply", help="apply (default) turns photos upright; ignore leaves them as torchvision's loader would")
    convert.add_argument("--check", default="structure", help="of JPEGs kept as they are: structure (default) or decode, which decodes every one")
    convert.add_argument("--strict", action="store_true", help="an image that cannot be converted is an error")
    convert.add_argument("--shard-mb", type=int, default=256, metavar="MB", help="dali: a shard ends once it has this many million bytes (default 256)")
    convert.add_argument("--workers", type=int, default=0, metavar="N", help="default: one per core; any number gives the same bytes")
    convert.add_argument("--pool", default="auto", help="workers are threads or processes (default auto: processes where there is enough to do)")
    convert.add_argument("--unit-rows", type=int, default=512, metavar="N", help="images per unit of work: what a kill can lose per worker (default 512)")
    convert.add_argument("--kind", default="auto", help="which of the kinds above SOURCE is (default: recognised)")
    convert.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="a setting of that kind of source; may be repeated")
    convert.add_argument("--restart", action="store_true", help="throw away what a stopped conversion to DEST has done")
    convert.add_argument("--force", action="store_true", help="replace an existing dataset folder DEST once the new one is complete")


def run(args: argparse.Namespace) -> None:
    """Convert, then say what was made."""
    from data_tools.convert import convert

    start = time.monotonic()
    pairs = [text.partition("=") for text in args.option]
    if not all(key and equals for key, equals, _ in pairs):
        raise DataError(f"--option takes KEY=VALUE, not {' '.join(args.option)!r}")
    names = "format name mode quality proportion smart_threshold shard_mb max_side max_pixels exif check strict force restart workers pool unit_rows kind"
    path = convert(args.source, args.dest, options={key: value for key, _, value in pairs}, **{name: getattr(args, name) for name in names.split()})
    manifest = load_manifest(path)
    rows = ", ".join(f"{info.count} {name}" for name, info in manifest.splits.items())
    took = time.monotonic() - start
    print(f"{path}: {manifest.name}, {manifest.format}, {rows}, {manifest.num_classes} classes, {took:.1f} s, digest {manifest.digest[:16]}")
    if (path / "bad.parquet").is_file():
        print(f"some images were left out; {path / 'bad.parquet'} lists them with the reasons")
