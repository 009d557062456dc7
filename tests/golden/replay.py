"""Replay recorded numbers of the original implementations through fastssl.

    python tests/golden/replay.py [DIR] [--kernels]

replays every .npz file of DIR (default: this folder). Per file it prints ``FILE: n of m outputs, max relative deviation X at ARRAY``, then reasons if the
file failed; the last line is ``N passed, M failed``. It exits with 1 if a file failed, is of no known kind, or if there is none.
Every array of a file must be read as an input, read as a hyper-parameter, or compared; exceptions are listed with a reason in NOT_CHECKED.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import sys
import traceback
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE.parents[1]) not in sys.path:  # started as a script: make fastssl, data_tools and tests importable from the checkout
    sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402

from fastssl.kernels import use  # noqa: E402
from tests.golden.handlers import handler_for, handlers  # noqa: E402
from tests.golden.recorder import Comparison, Recorder  # noqa: E402

NOT_CHECKED = HERE / "NOT_CHECKED.md"


@dataclass
class Result:
    """What became of one file."""

    name: str
    comparisons: list[Comparison] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults

    def line(self) -> str:
        passed = sum(c.ok for c in self.comparisons)
        worst = max(self.comparisons, key=lambda c: c.deviation, default=None)
        at = f", max relative deviation {worst.deviation:.3g} at {worst.name}" if worst else ""
        return "\n".join([f"{self.name}: {passed} of {len(self.comparisons)} outputs{at}", *(f"  FAILED {fault}" for fault in self.faults)])


def excused(name: str, not_checked: Path = NOT_CHECKED) -> list[str]:
    """Array-name patterns that NOT_CHECKED.md lists, with a reason, for the file called ``name``."""
    rows = re.findall(r"^\|\s*`([^`]+)`\s*\|\s*`([^`]+)`\s*\|\s*(\S[^|]*?)\s*\|\s*$", not_checked.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [array for file, array, _ in rows if fnmatch.fnmatchcase(name, file)]


def replay(path: Path, kernels: bool = False) -> Result:
    """Replay one file; never raises for what is wrong with the file or with the code it exercises."""
    result = Result(path.name)
    handler = handler_for(path.stem)
    if handler is None:
        result.faults.append(f"no handler for this kind of file; known prefixes: {', '.join(sorted(handlers()))}")
        return result
    try:
        recorder = Recorder.open(path, kernels)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        result.faults.append(f"not a readable .npz file: {error}")
        return result
    try:
        with use("triton" if kernels else "auto"):
            handler(recorder)
    except Exception as error:  # a wrong file and broken code both end here; the other files still get their turn
        where = traceback.extract_tb(error.__traceback__)[-1]
        result.faults.append(f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
    result.comparisons = recorder.comparisons
    result.faults += [f"{c.name}: relative deviation {c.deviation:.3g} is above {c.tolerance:.3g}" for c in recorder.comparisons if not c.ok]
    patterns = excused(path.stem)
    result.faults += [f"{n}: neither read nor compared" for n in recorder.untouched() if not any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    if not recorder.comparisons:
        result.faults.append("nothing was compared")
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Replay recorded numbers of the original implementations.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="folder of .npz files (default: the files of the test suite)")
    parser.add_argument("--kernels", action="store_true", help="through the Triton kernels (interpreted without a GPU), in float32, at 1e-5")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.kernels and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # nothing has imported triton yet
    results = []
    for path in sorted(options.folder.glob("*.npz")):
        results.append(replay(path, options.kernels))
        print(results[-1].line(), flush=True)
    if not results:
        print(f"no .npz files in {options.folder}")
    failed = sum(not result.ok for result in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
