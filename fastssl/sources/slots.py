"""The feed's memory: a ring of buffers with fixed addresses, and the way of a step's rows from the host to the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.errors import DataError
from fastssl.sources.pack import PACK_FROM, pack, packed_bytes, padding_share, unpack
from fastssl.types import RawBatch

PACKING = ("auto", "on", "off")
_FILLED_BY_SOURCE = ("pixels_BHWC", "extent_B2")


@dataclass
class Slot:
    """One step's buffers. ``copied``: the host buffers were read; ``free``: the trainer's device work on the previous use is done."""

    host: dict[str, RawBatch]
    device: dict[str, RawBatch]
    columns: dict[str, dict[str, np.ndarray]]  # NumPy views of everything on the host but the pixels
    packed: dict[str, Tensor] = field(default_factory=dict)  # flat host bytes of the streams that travel packed
    copied: Any = None
    free: Any = None
    used: bool = False


def is_packed(pack: str, padding: float, *, on_cuda: bool) -> bool:
    """Whether canvases with this share of ``padding`` travel packed under ``data.pack``."""
    return pack == "on" or (pack == "auto" and on_cuda and padding > PACK_FROM)


@dataclass
class _Packing:
    """A stream that travels packed: one canvas buffer that the source fills, and one landing place on the device, for all slots."""

    staging: Tensor
    landing: Tensor
    mean_bytes: float  # of one packed image


class Ring:
    """``count`` slots for ``streams``, of which this rank reads ``shares[name]`` rows per step.

    On the CPU the trainer reads the buffers that the sources fill.  On CUDA each slot has a pinned host and a device copy.  ``pack``: "on" sends images back
    to back and unpacks them on the device; "auto" does so on CUDA for streams whose canvases are more than 30 % padding; "off" sends whole canvases.
    """

    def __init__(self, streams: Sequence[Any], shares: Mapping[str, int], count: int, device: torch.device, side: Any, pack: str = "auto"):
        if pack not in PACKING:
            raise DataError(f"data.pack must be one of {', '.join(PACKING)}, got {pack!r}")
        self.device, self._streams, self._shares, self._pin = device, {s.name: s for s in streams}, dict(shares), side is not None
        self.resident = {s.name: self._pin and torch.device(getattr(s.source, "device", "cpu")).type == "cuda" for s in streams}
        self._padding = {s.name: self._padding_of(s) for s in streams}
        wanted = [s for s in streams if not self.resident[s.name] and is_packed(pack, self._padding[s.name], on_cuda=self._pin)]
        self._packing = {s.name: self._make_packing(s) for s in wanted}
        self.slots = [self._make_slot() for _ in range(count)]
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(device))  # behind the initial fills of allocate()

    # --- memory -----------------------------------------------------------------------------------------------------------------

    def _padding_of(self, stream: Any) -> float:
        extents = getattr(stream.source, "extents_N2", None)
        return 0.0 if extents is None else padding_share(extents[stream.rows_N], stream.source.canvas)

    def _make_packing(self, stream: Any) -> _Packing:
        canvas, rows = stream.source.canvas, self._shares[stream.name]
        extents = getattr(stream.source, "extents_N2", None)
        sizes = packed_bytes(np.asarray([canvas[:2]]) if extents is None else extents[stream.rows_N], canvas)
        flat = -(-rows * int(sizes.max()) // 8) * 8  # any rows fit, however they are drawn
        staging = torch.empty(rows, *canvas, dtype=torch.uint8)
        return _Packing(staging, torch.empty(flat, dtype=torch.uint8, device=self.device), float(sizes.mean()))

    def _make_slot(self) -> Slot:
        host = {name: self._make_host(name) for name in self._streams}
        columns = {n: {k: t.numpy() for k, t in b.tensors().items() if k != "pixels_BHWC"} for n, b in host.items()}
        device = dict(host)
        for name, stream in self._streams.items():
            if self._pin or name in self._packing:
                device[name] = RawBatch.allocate(self._shares[name], *stream.source.canvas, device=self.device)
        packed = {name: torch.empty(p.landing.numel(), dtype=torch.uint8, pin_memory=self._pin) for name, p in self._packing.items()}
        events = [torch.cuda.Event(), torch.cuda.Event()] if self._pin else [None, None]
        return Slot(host, device, columns, packed, *events)

    def _make_host(self, name: str) -> RawBatch:
        rows, canvas = self._shares[name], self._streams[name].source.canvas
        if name not in self._packing and not self.resident[name]:
            return RawBatch.allocate(rows, *canvas, pin=self._pin)
        batch = RawBatch.allocate(rows, 0, 0, canvas[2], pin=self._pin)  # its pixels are written elsewhere
        if name in self._packing:
            batch.pixels_BHWC = self._packing[name].staging
        return batch

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, host and device together."""
        batches = [b for slot in self.slots for b in (*slot.host.values(), *slot.device.values())]
        tensors = [t for b in batches for t in b.tensors().values()]
        tensors += [t for slot in self.slots for t in slot.packed.values()] + [t for p in self._packing.values() for t in (p.staging, p.landing)]
        return sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values())

    @property
    def bytes_per_step(self) -> int:
        """Bytes that a step brings to the device, the mean where images are packed; on the CPU the bytes of a step's buffers, which nothing copies."""
        total = 0.0
        for name, batch in self.slots[0].host.items():
            total += sum(t.nbytes for key, t in batch.tensors().items() if key not in _FILLED_BY_SOURCE)
            if not self.resident[name]:
                pixels = self._packing[name].mean_bytes * self._shares[name] if name in self._packing else batch.pixels_BHWC.nbytes
                total += pixels + batch.extent_B2.nbytes
        return round(total)

    def describe(self) -> str:
        """One line for a log: what travels per step, and how much memory the ring takes."""
        streams = []
        for name, stream in self._streams.items():
            how = "already on the device" if self.resident[name] else "packed" if name in self._packing else "whole canvases"
            high, wide, channels = stream.source.canvas
            streams.append(f"{name} {self._shares[name]} x {high}x{wide}x{channels} ({100 * self._padding[name]:.0f} % padding, {how})")
        return f"feed: {_mb(self.bytes_per_step)} per step, {_mb(self.nbytes)} in {len(self.slots)} slots; {', '.join(streams)}"

    # --- the way of a step ------------------------------------------------------------------------------------------------------

    def deliver(self, name: str, slot: Slot) -> None:
        """Bring a stream's filled host buffers to ``slot.device[name]``, asynchronously on the current stream where that is CUDA."""
        host, out = slot.host[name], slot.device[name]
        if out is host:
            return
        packing = self._packing.get(name)
        elsewhere = _FILLED_BY_SOURCE if self.resident[name] else ("pixels_BHWC",) if packing else ()
        for key, tensor in out.tensors().items():
            if key not in elsewhere:
                tensor.copy_(getattr(host, key), non_blocking=True)
        if packing:
            flat = slot.packed[name]
            used = pack(host.pixels_BHWC.numpy(), host.extent_B2.numpy(), flat.numpy())
            packing.landing[:used].copy_(flat[:used], non_blocking=True)
            unpack(packing.landing, out.extent_B2, out.pixels_BHWC)


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
