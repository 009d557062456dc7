"""``fastssl-data``: fetch, convert, split, verify, inspect and list datasets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_tools.verbs import convert, fetch, inspect, list, split, verify
from fastssl.errors import FastSSLError

EXAMPLES = """\
from nothing to a dataset that fastssl trains on:
  fastssl-data fetch cifar10 raw/cifar10
  fastssl-data convert raw/cifar10 data/cifar10
  fastssl-data split make data/cifar10 --name c40 --law simmatch_cifar --per-class 4 --seed 1
  fastssl-data verify data/cifar10 --leaks
  fastssl-data inspect data/cifar10 --sheet cifar10.png
your own images, in folders train/<class>/ and test/<class>/:
  fastssl-data convert photos data/photos --format ffcv
each verb explains itself: fastssl-data VERB --help"""


VERBS = {"fetch": fetch, "convert": convert, "split": split, "verify": verify, "inspect": inspect, "list": list}


def build_parser() -> argparse.ArgumentParser:
    """The command line, one subparser per verb."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fastssl-data", description="Prepare image datasets for fastssl.", epilog=EXAMPLES, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for module in VERBS.values():
        module.add(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 fine, 2 wrong input (one line on standard error), 130 interrupted."""
    words = sys.argv[1:] if argv is None else [*argv]
    args = build_parser().parse_args(split.with_action(words))
    try:
        VERBS[args.verb].run(args)
    except FastSSLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; no half-written dataset was left", file=sys.stderr)
        return 130
    return 0
