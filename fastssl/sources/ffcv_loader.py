"""Source over ``.beton`` files, second engine: the pipeline that FFCV's Loader compiles, around a decoding operation of ours, run on the caller's rows.

What of FFCV runs: a ``Loader`` is built once per process; it plans the pipeline (``Graph``), compiles it (``Compiler``, numba) and gives its memory manager's
compiled reader that finds a sample's bytes in the file.  Its image operation is :func:`_canvas_operation`: each JPEG is decoded once, by the libturbojpeg that
FFCV is linked with, straight into the caller's canvas with the canvas's row stride, neither cropped nor resized; raw pixels are copied by FFCV's memcpy.

What of FFCV does not run, and why: the epoch iterator (buffers that it overwrites under the caller, a thread left behind by each early break, orders that
it draws itself); ``imdecode`` (its result is ignored, so that a corrupt record shows an earlier sample's pixels; always the inexact cosine transform; no
row stride); the file reader (files are checked by :func:`fastssl.sources.beton.open_beton` before anything is read); numba's threads (one of its layers
aborts the process when two threads meet in it) in favour of plain threads, for the compiled code holds no interpreter lock.

As the file's addresses are arguments of the compiled code, one compilation serves all files; the Loader is built on a file of one pixel.
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastssl.errors import DataError
from fastssl.sources.beton import ALLOCATION, FIELD, HEADER, IMAGE, IMAGE_FIELD, MIN_PAGE, MODE_RAW, VERSION, BetonFile, record_dtype
from fastssl.sources.ffcv import FFCVSource

_compiling = threading.Lock()


class FFCVLoaderSource(FFCVSource):
    """:class:`FFCVSource` with FFCV's compiled pipeline in place of the interpreter's loop; same files, options, pixels and rule for corrupt images.

    Opening the first one in a process imports ffcv and compiles (some seconds).  Raises DataError naming `make ffcv` where the package is missing.
    """

    def _setup(self, beton: BetonFile, *others: Any) -> None:
        self._run = _compiled()
        super()._setup(beton, *others)
        self._gathers = False
        order = np.argsort(beton.ptr_N, kind="stable")
        self._state = (beton.data, beton.ptr_N[order].astype(np.uint64), beton.size_N[order].astype(np.uint64))
        self._records = np.zeros(beton.num_rows, IMAGE)
        for name, values in (("mode", beton.mode_N), ("width", beton.width_N), ("height", beton.height_N), ("data_ptr", beton.ptr_N)):
            self._records[name] = values

    def _fill_pixels(self, beton: BetonFile, rows: np.ndarray, extents: np.ndarray, pixels: np.ndarray) -> None:
        if not pixels.flags.c_contiguous:
            super()._fill_pixels(beton, rows, extents, pixels)
            return
        bad = np.zeros(len(rows), np.uint8)
        slots = self._longest_first(beton, rows)
        pieces = 1 if self._pool is None else min(len(rows), 8 * self.workers)
        self._share(
            lambda piece: self._run(rows, (pixels, piece, extents, bad), self._records, self._state),
            [np.ascontiguousarray(slots[start::pieces]) for start in range(pieces)],
        )
        for slot in np.flatnonzero(bad).tolist():  # the native path decides what is wrong, says so and leaves grey
            self._fill_slot(beton, int(rows[slot]), extents[slot].tolist(), pixels[slot])

    def close(self) -> None:
        """Stop the decoding threads and drop the map."""
        super().close()
        self._state = None  # type: ignore[assignment]


def _compiled() -> Callable[..., Any]:
    """``run(rows, (pixels, slots, extents, bad), records, state)``: the stage that FFCV's Loader compiled, once per process."""
    with _compiling:
        threads = torch.get_num_threads()
        try:
            return _compile()
        except (ImportError, OSError, AttributeError) as error:
            raise DataError(
                f"data.engine=ffcv needs the ffcv package, which cannot be loaded here ({error}); install it with `make ffcv`, "
                "or use data.engine=native, which reads the same files without it"
            ) from error
        finally:
            torch.set_num_threads(threads)  # the Loader sets the whole process's number of threads to its own


@lru_cache(maxsize=1)
def _compile() -> Callable[..., Any]:
    from ffcv.loader import Loader, OrderOption

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "one-pixel.beton"
        _write_one_pixel(file)
        operation = _canvas_operation()
        loader = Loader(str(file), batch_size=1, num_workers=1, os_cache=True, order=OrderOption.SEQUENTIAL, seed=0, pipelines={"image": [operation]})
    ((stage, _),), (node,) = loader.code

    def run(rows: np.ndarray, memory: tuple[np.ndarray, ...], records: np.ndarray, state: tuple[np.ndarray, ...]) -> None:
        stage(rows, {"f0": records}, state, **{f"memory_{node}": memory, f"shared_memory_{node}": None})

    # No rows, so that the compiler runs now and not under a training run's time limit for the first batch.
    no_rows, data = np.zeros(0, np.int64), np.zeros(1, np.uint8)
    data.setflags(write=False)  # as a memory map is: the compiled code is specific to it
    memory = (np.zeros((0, 1, 1, 3), np.uint8), no_rows, np.zeros((0, 2), np.int32), np.zeros(0, np.uint8))
    run(no_rows, memory, np.zeros(0, IMAGE), (data, *np.zeros((2, 0), np.uint64)))
    return run


def _write_one_pixel(file: Path) -> None:
    header, fields, records, allocations = np.zeros(1, HEADER), np.zeros(1, FIELD), np.zeros(1, record_dtype([IMAGE_FIELD])), np.zeros(1, ALLOCATION)
    header[0] = (VERSION, 1, MIN_PAGE, 1, MIN_PAGE + 3)
    fields["type_id"] = IMAGE_FIELD
    fields["name"][0, :5] = list(b"image")
    records["f0"][0] = (MODE_RAW, 1, 1, MIN_PAGE)
    allocations[0] = (0, MIN_PAGE, 3)
    head = header.tobytes() + fields.tobytes() + records.tobytes()
    file.write_bytes(head.ljust(MIN_PAGE, b"\0") + bytes(3) + allocations.tobytes())


def _turbojpeg() -> tuple[Any, ...]:
    """(init, header, decompress, destroy) of the libturbojpeg that FFCV's library brought into the process."""
    import ffcv._libffcv

    library = ctypes.CDLL(ffcv._libffcv.__file__)
    pointer, number, length = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint64
    handle = ctypes.c_int64
    for name, result, arguments in (
        ("tjInitDecompress", handle, []),
        ("tjDecompressHeader2", number, [handle, pointer, length, pointer, pointer, pointer]),
        ("tjDecompress2", number, [handle, pointer, length, pointer, number, number, number, number, number]),
        ("tjDestroy", number, [handle]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library.tjInitDecompress, library.tjDecompressHeader2, library.tjDecompress2, library.tjDestroy


def _canvas_operation() -> Any:
    """FFCV operation: decode ``batch_indices[slot]`` into ``pixels[slot]`` for each of ``slots``; ``bad[slot]`` = 1 where libjpeg objects in any way."""
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.libffcv import memcpy
    from ffcv.pipeline.compiler import Compiler

    init, read_header, decompress, destroy = _turbojpeg()
    copy_bytes = Compiler.compile(memcpy)

    class CanvasDecoder(SimpleRGBImageDecoder):
        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
            return previous_state, None  # the memory is the caller's

        def generate_code(self) -> Callable[..., Any]:
            read_bytes = self.memory_read

            def decode(batch_indices, memory, metadata, storage_state):  # type: ignore[no-untyped-def]
                pixels, slots, extents, bad = memory
                columns, channels = pixels.shape[2], pixels.shape[3]
                found = np.zeros(3, np.int32)  # width, height, chroma subsampling
                handle = init()
                for i in range(len(slots)):
                    slot = slots[i]
                    record = metadata[batch_indices[slot]]
                    data = read_bytes(record["data_ptr"], storage_state)
                    height, width = np.int64(extents[slot, 0]), np.int64(extents[slot, 1])
                    target = pixels[slot]
                    if record["mode"] == MODE_RAW:
                        image = data.reshape(height, width, 3)
                        if channels == 3:
                            if columns == width:
                                copy_bytes(data, target)
                            else:
                                for y in range(height):
                                    copy_bytes(image[y], target[y])
                        else:
                            target[:height, :width, 0] = image[:, :, 0]
                        continue
                    wrong = read_header(handle, data.ctypes.data, data.size, found.ctypes.data, found[1:].ctypes.data, found[2:].ctypes.data)
                    if wrong != 0 or found[0] != record["width"] or found[1] != record["height"]:
                        bad[slot] = 1
                    elif channels == 3:
                        if decompress(handle, data.ctypes.data, data.size, target.ctypes.data, width, columns * 3, height, 0, 0) != 0:
                            bad[slot] = 1
                    else:
                        scratch = np.empty((height, width, 3), np.uint8)
                        if decompress(handle, data.ctypes.data, data.size, scratch.ctypes.data, width, width * 3, height, 0, 0) != 0:
                            bad[slot] = 1
                        target[:height, :width, 0] = scratch[:, :, 0]
                destroy(handle)
                return bad

            return decode

    return CanvasDecoder()
