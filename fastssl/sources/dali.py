"""Source over the same shards as :mod:`fastssl.sources.shards`, decoded by NVIDIA DALI: on the host, or on a GPU (``mixed``, nvJPEG) into device memory.

We read the encoded bytes by our own index in the caller's order and check them; DALI only decodes (and, on a GPU, pads).  So order, resuming and the treatment
of damaged images are those of every other source.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from fastssl.errors import DataError
from fastssl.sources.base import check_rows
from fastssl.sources.encoded import BAD_PIXEL
from fastssl.sources.manifest import Manifest
from fastssl.sources.shards import ShardsSource
from fastssl.types import RawBatch

_CHUNK_BYTES = 64 << 20  # of decoded canvases that DALI holds at a time
_MAX_CHUNK = 256


class DaliSource(ShardsSource):
    """``workers`` are DALI's decoding threads.  With a CUDA ``device`` canvases are decoded there and ``fill`` wants buffers there.

    DALI's pipeline fails as a whole when one image is damaged.  Damaged bytes are therefore found by their checksum before they reach it; should it fail all
    the same (an index without checksums, a kind of image that it does not know), that chunk is decoded without DALI, by the same rule for damaged images, and
    rows that were fine that way are never given to DALI again.  Calls from several threads take turns.
    """

    def __init__(self, manifest: Manifest, split: str = "train", *, workers: int = 1, device: str | torch.device | None = None):
        self._dali = _import_dali()
        super().__init__(manifest, split, workers=1)
        self.workers = workers
        self.device = torch.device("cpu" if device is None else device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise DataError("decoding on a GPU was asked for, but torch sees no CUDA device; leave out device, or check the driver with `fastssl doctor`")
        self._chunk = max(1, min(_MAX_CHUNK, _CHUNK_BYTES // int(np.prod(self.canvas))))
        self._pipeline: Any = None
        self._turn = threading.Lock()
        self.not_for_dali: set[int] = set()
        """Sound rows that DALI could not decode, or that were in a chunk with which it failed."""

    def fill(self, rows: np.ndarray, out: RawBatch) -> None:
        """See Source.fill."""
        on_gpu = self.device.type == "cuda"
        with self._turn:
            if self._closed:
                raise DataError("this source is closed; open it again before reading rows")
            rows = check_rows(rows, self.num_rows, self.canvas, out, device_type=self.device.type)
            extents = torch.from_numpy(self.extents_N2[rows])
            out.extent_B2[: len(rows)].copy_(extents)
            for first in range(0, len(rows), self._chunk):
                part = slice(first, min(first + self._chunk, len(rows)))
                if on_gpu:
                    self._fill_gpu(rows[part], out.pixels_BHWC[part])
                else:
                    self._fill_host(rows[part], out.pixels_BHWC[part].numpy())

    # --- on the host: the decoded images are copied to their places, no padding needed -----------------------------------------------

    def _fill_host(self, rows: np.ndarray, pixels: np.ndarray) -> None:
        data, for_dali = self._sort(rows, pixels)
        images = self._run([data[i] for i in for_dali])
        if images is None:
            self._without_dali(rows, data, for_dali, pixels)
            return
        for place, image in zip(for_dali, (np.asarray(images.at(i)) for i in range(len(for_dali))), strict=True):
            self._take(int(rows[place]), data[place], image, pixels[place])

    def _sort(self, rows: np.ndarray, pixels: np.ndarray) -> tuple[list[bytes], list[int]]:
        """The rows' bytes, and the places of those that DALI shall decode; all others are decoded here."""
        data, for_dali = [self._read(row) for row in rows.tolist()], []
        for place, row in enumerate(rows.tolist()):
            if row in self.not_for_dali or not self._is_sound(row, data[place]):
                self._decode_row(row, data[place], pixels[place])
            else:
                for_dali.append(place)
        return data, for_dali

    def _is_sound(self, row: int, data: bytes) -> bool:
        try:
            self._check_bytes(row, data)
        except ValueError:
            return False
        return bool(data)

    def _take(self, row: int, data: bytes, image: np.ndarray, slot: np.ndarray) -> None:
        height, width = self.extents_N2[row].tolist()
        if image.shape[:2] == (height, width):
            slot[:height, :width] = image
        else:
            self._decode_row(row, data, slot)  # finds the same difference and applies the rule

    def _without_dali(self, rows: np.ndarray, data: list[bytes], places: list[int], pixels: np.ndarray) -> None:
        sound = [place for place in places if self._decode_row(int(rows[place]), data[place], pixels[place])]
        if len(sound) == len(places):  # nothing is damaged: DALI lacks something that these images need
            self.not_for_dali.update(int(rows[place]) for place in sound)
        else:
            self.not_for_dali.update(int(rows[place]) for place in places if place not in sound)

    # --- on a GPU: one padded batch, copied in one piece ---------------------------------------------------------------------------

    def _fill_gpu(self, rows: np.ndarray, pixels: torch.Tensor) -> None:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        height, width, channels = self.canvas
        host = np.full((len(rows), height, width, channels), BAD_PIXEL, np.uint8)  # only for what DALI cannot decode
        data, for_dali = self._sort(rows, host)
        images = self._run([data[i] for i in for_dali])
        if images is None:
            self._without_dali(rows, data, for_dali, host)
            for_dali = []
        elsewhere = [place for place in range(len(rows)) if place not in set(for_dali)]
        if elsewhere:
            pixels[elsewhere, :height, :width] = torch.from_numpy(host[elsewhere]).to(self.device)
        if for_dali:
            dense = torch.empty(len(for_dali), height, width, channels, dtype=torch.uint8, device=self.device)
            feed_ndarray(images.as_tensor(), dense, cuda_stream=torch.cuda.current_stream(self.device))
            pixels[for_dali, :height, :width] = dense

    # --- DALI -----------------------------------------------------------------------------------------------------------------------

    def _run(self, encoded: list[bytes]) -> Any:
        """DALI's decoded images for ``encoded``; None if it fails, which also throws the pipeline away."""
        if not encoded:
            return []
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
            return self._pipeline.run()[0]
        except RuntimeError:
            self._pipeline = None
            return None

    def _build(self) -> Any:
        fn, types, pipeline_class = self._dali
        height, width, channels = self.canvas
        on_gpu = self.device.type == "cuda"
        index = (self.device.index if self.device.index is not None else torch.cuda.current_device()) if on_gpu else None
        pipeline = pipeline_class(batch_size=self._chunk, num_threads=self.workers, device_id=index, prefetch_queue_depth=1, set_affinity=False)
        hints = {"preallocate_height_hint": height, "preallocate_width_hint": width} if on_gpu else {}
        with pipeline:
            encoded = fn.external_source(name="encoded", device="cpu", batch=True, dtype=types.UINT8, ndim=1)
            # A camera's orientation tag is ignored here as everywhere else: the recorded size is that of the stored pixels.
            image = fn.decoders.image(
                encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB if channels == 3 else types.GRAY, adjust_orientation=False, **hints
            )
            pipeline.set_outputs(fn.pad(image, axis_names="HW", shape=[height, width], fill_value=0) if on_gpu else image)
        pipeline.build()
        return pipeline

    def close(self) -> None:
        """Stop DALI's threads and close the files."""
        with self._turn:
            super().close()
            self._pipeline = None


def _import_dali() -> tuple[Any, Any, Any]:
    try:
        from nvidia.dali import Pipeline, fn, types
    except Exception as error:  # a broken CUDA library raises other things than ImportError
        raise DataError(
            f"decoding with DALI needs the nvidia-dali package, which cannot be imported ({type(error).__name__}: {error}); "
            "install it with `make dali`, or read the same shards without it: data.source=shards"
        ) from error
    return fn, types, Pipeline
