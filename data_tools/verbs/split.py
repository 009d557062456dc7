"""``fastssl-data split make|info|import|export``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.laws import LAWS
from data_tools.progress import say
from data_tools.split_lists import FORMS, NAMED, own_draw_note
from data_tools.split_rows import EXPORTS
from data_tools.verbs import add_verb
from fastssl.sources.manifest import LabelSplit, load_manifest, load_split

ACTIONS = ("make", "info", "import", "export")

SPLIT_HELP = """\
`fastssl-data split DATASET --name ...` is the same as `fastssl-data split make DATASET --name ...`
examples:
  fastssl-data split make data/cifar10 --name c250 --law simmatch_cifar --per-class 25 --seed 1 --validation 5000
  fastssl-data split make data/imagenet --name one --percent 1 --seed 0
  fastssl-data split make data/cifar10 --name lt --setting "cifar10-lt consistent gamma=100"
  fastssl-data split import data/imagenet split_1p_index.txt --as simmatch-1pct
  fastssl-data split info data/imagenet one --with simmatch-1pct
  fastssl-data split export data/imagenet one one.txt
what a split file looks like, all laws and lists: docs/data/split.md"""

MAKE_HELP = """\
laws (the same seed gives the same rows as the published code):
  tllib           --per-class n: TLlib's choice without replacement
  simmatch_cifar  --per-class n: SimMatch's and FixMatch's class-wise shuffle for CIFAR
  torchssl        --per-class n: TorchSSL's choice for SVHN and STL-10
  eman10pct       --fraction f:  FixMatch-EMAN's share of each class
  balanced        --per-class n or --percent p: nested, smaller splits are part of larger ones
long-tailed settings (--setting; each also as exp=N, the number in SimPro's scripts; the rows do not depend on the seed, but for random):
  cifar10-lt, cifar100-lt  consistent|uniform|reversed|middle|head-tail|random gamma=G [gamma_u=G] [head=N] [head_u=N]
  stl10-lt gamma=G, imagenet127, imagenet1k-lt, and own-lt for other datasets (with head= and head_u=)
--validation k holds out k more rows, class-balanced, never any labelled one.  Rows whose class nobody knows always stay unlabelled.
example:
  fastssl-data split make data/cifar10 --name c250 --law simmatch_cifar --per-class 25 --seed 1 --validation 5000"""


def with_action(words: Sequence[str]) -> list[str]:
    """The command line with the action written out: ``split DATASET --name ...`` means ``split make DATASET --name ...``."""
    spelled = [*words]
    if spelled[:1] == ["split"] and len(spelled) > 1 and spelled[1] not in (*ACTIONS, "-h", "--help"):
        spelled.insert(1, "make")
    return spelled


def add(verbs: Any) -> None:
    """Define the verb's arguments."""
    actions = add_verb(verbs, "split", "choose which training images have labels", SPLIT_HELP).add_subparsers(dest="action", required=True, metavar="ACTION")
    make = add_verb(actions, "make", "draw a split by a law", MAKE_HELP)
    make.add_argument("dest", metavar="DATASET", help="dataset folder")
    make.add_argument("--name", required=True, help="recipes refer to the split by this name (data.split)")
    make.add_argument("--law", default="", help=f"one of {', '.join(LAWS)} (default tllib; balanced with --percent)")
    make.add_argument("--per-class", type=int, metavar="N", help="labelled images per class")
    make.add_argument("--percent", metavar="P", help="labelled part of all images in percent, the same number of each class but for one (balanced)")
    make.add_argument("--fraction", type=float, metavar="F", help="labelled share of each class, 0..1 (eman10pct)")
    make.add_argument("--setting", metavar="TEXT", help="a long-tailed setting in place of --law: 'cifar10-lt reversed gamma=150', 'cifar10-lt exp=2'")
    _add_common(make)

    info = add_verb(actions, "info", "show a split's header, counts and classes", "example:\n  fastssl-data split info data/cifar10 c40 --with c250")
    info.add_argument("dest", metavar="DATASET", help="dataset folder")
    info.add_argument("name", metavar="NAME", help="a split of the dataset, or a split file")
    info.add_argument("--with", dest="other", default="", metavar="OTHER", help="also say which rows it shares with this split")

    take = add_verb(
        actions,
        "import",
        "make a split from a list of images that others publish",
        "forms: names (a base name per line), paths (path and label per line), csv (a column Index), npy, index (a number per line)\n"
        f"lists that --as knows and checks: {', '.join(NAMED)}\n"
        "example:\n  fastssl-data split import data/imagenet 1percent.txt --as simclr-1pct",
    )
    take.add_argument("dest", metavar="DATASET", help="dataset folder")
    take.add_argument("file", metavar="FILE", help="the list of labelled images")
    take.add_argument("--as", dest="known_as", default="", metavar="LIST", help="which published list it is; refused if it cannot be")
    take.add_argument("--name", default="", help="the split's name (default: that of --as)")
    take.add_argument("--form", default="auto", help=f"{', '.join(FORMS)} (default: recognised)")
    take.add_argument("--sort", action="store_true", help="labelled rows in the dataset's order instead of the list's")
    take.add_argument("--skip-missing", action="store_true", help="leave out listed images that the dataset does not have")
    _add_common(take)

    give = add_verb(actions, "export", "write a split as a list for other code", "example:\n  fastssl-data split export data/cifar10 c40 c40.npy --form npy")
    give.add_argument("dest", metavar="DATASET", help="dataset folder")
    give.add_argument("name", metavar="NAME", help="a split of the dataset, or a split file")
    give.add_argument("out", metavar="OUT", help="file to write")
    give.add_argument("--form", default="names", help=f"{', '.join(EXPORTS)} (default names)")
    give.add_argument("--side", default="labeled", help="labeled (default), unlabeled or validation")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--validation", type=int, default=0, metavar="K", help="rows held out of training (default 0)")
    parser.add_argument("--force", action="store_true", help="overwrite another split of that name")


def run(args: argparse.Namespace) -> None:
    """Do the action and say what came of it."""
    {"make": _make, "info": _info, "import": _import, "export": _export}[args.action](args)


def _make(args: argparse.Namespace) -> None:
    from data_tools.split import make_split

    sizes = {"per_class": args.per_class, "percent": args.percent, "fraction": args.fraction}
    made = make_split(args.dest, args.name, law=args.law, seed=args.seed, validation=args.validation, force=args.force, setting=args.setting, **sizes)
    if args.percent is not None:
        note = own_draw_note(args.percent, made.labeled.size, load_manifest(args.dest).num_classes)
        if note:
            say(note)
    _tell(args.dest, made)


def _info(args: argparse.Namespace) -> None:
    from data_tools.split_info import describe

    print("\n".join(describe(args.dest, args.name, args.other)))


def _import(args: argparse.Namespace) -> None:
    from data_tools.split import import_split
    from fastssl.errors import DataError

    if not args.name and not args.known_as:
        raise DataError("name the split with --name, or say with --as which published list it is")
    names = "name known_as form sort seed validation skip_missing force"
    made, remarks = import_split(args.dest, args.file, **{name: getattr(args, name) for name in names.split()})
    for remark in remarks:
        print(remark)
    _tell(args.dest, made)


def _export(args: argparse.Namespace) -> None:
    from data_tools.split_rows import export_rows

    manifest = load_manifest(args.dest)
    count = export_rows(manifest, load_split(manifest, args.name), args.out, form=args.form, side=args.side)
    print(f"{args.out}: {count} {args.side} images ({args.form})")


def _tell(dataset: str, made: LabelSplit) -> None:
    print(
        f"{Path(dataset) / 'splits' / (made.name + '.txt')}: {made.labeled.size} labelled, {made.unlabeled.size} unlabelled, "
        f"{made.validation.size} validation, digest {made.digest[:16]}"
    )
