"""``fastssl-data inspect``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from data_tools.verbs import add_verb


def add(verbs: Any) -> None:
    """Define the verb's arguments."""
    inspect = add_verb(
        verbs,
        "inspect",
        "show the facts and classes of a dataset folder and, if asked, some of its images",
        "examples:\n  fastssl-data inspect data/cifar10 --sheet sheet.png --per-class 12\n  fastssl-data inspect data/cifar10 --html cifar10.html",
    )
    inspect.add_argument("dest", metavar="DATASET", help="dataset folder")
    inspect.add_argument("--sheet", metavar="OUT.png", help="write a contact sheet, one line per class")
    inspect.add_argument("--html", metavar="OUT.html", help="write everything as one page: facts, images per class, sheets of every split, label splits")
    inspect.add_argument("--per-class", type=int, default=10, metavar="N", help="images per class on the sheet (default 10)")
    inspect.add_argument("--split", default="train", help="split shown on the sheet (default train)")
    inspect.add_argument("--labels", default="", metavar="NAME", help="show only the labelled rows of this label split on the sheet")


def run(args: argparse.Namespace) -> None:
    """Print the facts; write what was asked for."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from data_tools.inspection import contact_sheet, facts, histograms
    from data_tools.inspection_page import write_page

    table = Table(show_header=False, box=None)
    for name, value in facts(args.dest):
        table.add_row(Text(name, style="bold"), Text(value))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print("\n".join(histograms(args.dest)))
    if args.sheet:
        print(f"sheet: {contact_sheet(args.dest, args.sheet, split=args.split, per_class=args.per_class, label_split=args.labels)}")
    if args.html:
        print(f"page: {write_page(args.dest, args.html, per_class=args.per_class)}")
