"""The verbs of fastssl-data, one module each: ``add`` defines the arguments, ``run`` does the work."""

from __future__ import annotations

import argparse
from typing import Any


def add_verb(verbs: Any, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    """A subparser whose help ends with ``epilog`` as it is written (examples)."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser
