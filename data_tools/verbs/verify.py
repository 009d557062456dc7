"""``fastssl-data verify``."""

from __future__ import annotations

import argparse
from typing import Any

from data_tools.verbs import add_verb
from fastssl.errors import DataError


def add(verbs: Any) -> None:
    """Define the verb's arguments."""
    verify = add_verb(
        verbs, "verify", "check every file, image, row and label split of a dataset folder", "example:\n  fastssl-data verify data/cifar10 --leaks"
    )
    verify.add_argument("dest", metavar="DATASET", help="dataset folder")
    verify.add_argument("--leaks", action="store_true", help="also report images with the same pixels, above all in train and test")
    verify.add_argument("--workers", type=int, default=2, metavar="N", help="decoding threads (default 2)")
    verify.add_argument("--no-decode", action="store_true", help="compare hashes only, do not decode the images")
    verify.add_argument("--no-ffcv", action="store_true", help="format ffcv: do not compare with the ffcv package's own loader (some seconds per split)")


def run(args: argparse.Namespace) -> None:
    """Check, print what was found; DataError (exit code 2) where anything is wrong."""
    from data_tools.verify import verify

    found = verify(args.dest, leaks=args.leaks, workers=max(1, args.workers), ffcv=not args.no_ffcv, decode=not args.no_decode)
    for line in found.notes:
        print(line)
    for line in found.problems:
        print(f"PROBLEM: {line}")
    if found.problems:
        raise DataError(f"{args.dest} has {len(found.problems)} problem(s), listed above; convert it again")
    print(f"{args.dest}: sound")
