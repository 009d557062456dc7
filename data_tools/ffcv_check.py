"""A second opinion on .beton files: the ffcv package reads them through its own Loader, and every image and label must be what our reader gives.

FFCV runs in a child process of its own: it compiles machine code, starts threads that never report an exception, prints warnings, and native code that
meets a damaged file may end the process.  The child writes its answer to a file; whatever else it says is shown only when it fails.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from data_tools.progress import say, track
from fastssl.errors import FastSSLError
from fastssl.sources.base import open_source
from fastssl.sources.beton import MODE_JPG, BetonFile, open_beton
from fastssl.sources.manifest import load_manifest
from fastssl.types import RawBatch

JPEG_LEVELS = 5  # FFCV decodes with the fast cosine transform, as we do for the comparison; two libjpeg builds may still round differently
STALL_S = 180.0  # no batch for so long (the first one waits for the compiler) means that FFCV hangs
_BATCH_BYTES = 16 << 20  # FFCV allocates five batches


class Left(Exception):
    """The comparison could not be made; the text says why."""


def compare(dataset: str | Path) -> tuple[int, list[str]]:
    """(number of images compared, problems) of a dataset folder of format ffcv; each problem names a split and its first differing row.

    Raises Left when the ffcv package is missing or cannot be imported here: that says nothing about the dataset.
    """
    spec = importlib.util.find_spec("ffcv")
    if spec is None or spec.origin is None:  # a folder of that name is no package
        raise Left("the ffcv package is not installed (`make ffcv`)")
    say("verify: FFCV's own loader reads the same files (it compiles first, some seconds)")
    with tempfile.TemporaryDirectory(prefix="fastssl-ffcv-") as temp:
        answer = Path(temp) / "answer.json"
        here = str(Path(__file__).resolve().parents[1])
        paths = os.pathsep.join(path for path in (here, os.environ.get("PYTHONPATH", "")) if path)
        # Without devices FFCV copies nothing to a GPU; numba's and matplotlib's folders must not depend on a home that can be written.
        env = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "NUMBA_CACHE_DIR": temp, "MPLCONFIGDIR": temp}
        command = [sys.executable, "-m", "data_tools.ffcv_check", str(Path(dataset).resolve()), str(answer)]
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        told: dict[str, Any] = json.loads(answer.read_text()) if answer.is_file() else {}
    if "unusable" in told:
        raise Left(f"the ffcv package cannot be imported ({told['unusable']}; `make ffcv` builds it again)")
    if "images" not in told:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = told.get("failed") or (lines[-1][:200] if lines else "no message")
        return 0, [f"FFCV's own loader cannot read this dataset (exit status {done.returncode}: {reason})"]
    return int(told["images"]), list(told["problems"])


def _answer(file: Path, content: dict[str, Any]) -> None:
    temp = file.with_suffix(".tmp")
    temp.write_text(json.dumps(content))
    temp.replace(file)


def child(dataset: str, answer: str) -> int:
    """What the child process does: compare every split, write the answer."""

    def thread_died(what: threading.ExceptHookArgs) -> None:
        # FFCV's loading thread ends silently and its reader would wait for ever.
        _answer(Path(answer), {"failed": f"{what.exc_type.__name__}: {what.exc_value}"})
        os._exit(3)

    threading.excepthook = thread_died
    try:
        import ffcv.loader  # noqa: F401
    except Exception as error:  # whatever a broken native package throws
        _answer(Path(answer), {"unusable": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
        return 1
    images, problems = 0, list[str]()
    try:
        manifest = load_manifest(dataset)
        for split in manifest.splits:
            count, found = _compare_split(manifest.root, split, manifest.root / manifest.split(split).files["beton"])
            images, problems = images + count, problems + found
    except FastSSLError as error:
        _answer(Path(answer), {"failed": str(error)})
        return 1
    _answer(Path(answer), {"images": images, "problems": problems})
    return 0


def _compare_split(root: Path, split: str, file: Path) -> tuple[int, list[str]]:
    source = open_source(root, split)
    try:
        beton = open_beton(file)
        height, width = int(beton.height_N.max()), int(beton.width_N.max())
        batch = max(1, min(1024, _BATCH_BYTES // (height * width * 3), source.num_rows))
        ours = RawBatch.allocate(batch, *source.canvas)
        wrong: dict[int, str] = {}
        batches = _ffcv_batches(file, batch)
        start = 0
        for pixels_BHWC, labels_B in track(batches, -(-source.num_rows // batch), f"FFCV {split} (batches of {batch})"):
            rows = np.arange(start, start + len(labels_B))
            start += len(rows)
            raw = rows[beton.mode_N[rows] != MODE_JPG]
            if len(raw):
                source.fill(raw, ours)
            place = {int(row): slot for slot, row in enumerate(raw)}
            for row, theirs, label in zip(rows.tolist(), pixels_BHWC, labels_B.tolist(), strict=True):
                extent = int(beton.height_N[row]), int(beton.width_N[row])
                theirs = theirs.reshape(-1)[: extent[0] * extent[1] * 3].reshape(*extent, 3)
                if label != source.labels_N[row]:
                    wrong[row] = f"label {label}, ours is {source.labels_N[row]}"
                elif row in place:
                    expected = ours.pixels_BHWC[place[row], : extent[0], : extent[1]].numpy()
                    if not np.array_equal(theirs, np.broadcast_to(expected, theirs.shape)):
                        wrong[row] = "other pixels"
                else:
                    reason = _jpeg_differs(beton, row, theirs)
                    if reason:
                        wrong[row] = reason
        problems = []
        if start != source.num_rows:
            problems.append(f"{split}: FFCV's own loader gives {start} images, our reader {source.num_rows}")
        if wrong:
            first = min(wrong)
            problems.append(f"{split}: FFCV's own loader disagrees on {len(wrong)} images; the first is row {first} ({wrong[first]})")
        return start, problems
    finally:
        source.close()


def _jpeg_differs(beton: BetonFile, row: int, theirs: np.ndarray) -> str:
    data = beton.data[int(beton.ptr_N[row]) : int(beton.ptr_N[row]) + int(beton.size_N[row])]
    try:
        expected = simplejpeg.decode_jpeg(data, "RGB", fastdct=True)
    except ValueError as error:
        return f"its JPEG cannot be decoded: {error}"
    if expected.shape != theirs.shape:
        return "the size of its JPEG is not the recorded one"
    worst = int(np.abs(theirs.astype(np.int16) - expected).max())
    return f"pixels differ by up to {worst} levels, {JPEG_LEVELS} are allowed" if worst > JPEG_LEVELS else ""


def _ffcv_batches(file: Path, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(pixels uint8 [B, H, W, 3], labels [B]) of one epoch in file order; an image smaller than the largest fills the first bytes of its slot.

    The arrays are FFCV's own buffers: valid until the next batch is asked for.
    """
    from ffcv.fields.decoders import IntDecoder
    from ffcv.loader import Loader, OrderOption

    # One worker: no parallel code to compile, which takes longer than reading tens of thousands of small images.
    faulthandler.dump_traceback_later(STALL_S, exit=True)
    loader = Loader(
        str(file),
        batch_size=batch,
        num_workers=1,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        batches_ahead=2,
        pipelines={"image": [_whole_image()], "label": [IntDecoder()]},
    )
    for pixels_BHWC, labels_B1 in loader:
        faulthandler.dump_traceback_later(STALL_S, exit=True)
        yield pixels_BHWC, labels_B1[:, 0]
    faulthandler.cancel_dump_traceback_later()


def _whole_image() -> Any:
    """FFCV's plain decoder, without its demand that all images have one size."""
    from dataclasses import replace

    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.pipeline.allocation_query import AllocationQuery

    class WholeImage(SimpleRGBImageDecoder):
        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
            shape = (int(self.metadata["height"].max()), int(self.metadata["width"].max()), 3)
            dtype = np.dtype("<u1")
            return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    return WholeImage()


if __name__ == "__main__":
    sys.exit(child(*sys.argv[1:]))
