"""From passes to kernel launches: which kernel, how many programs, which tensors, which constants.  Nothing here depends on data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastssl.augment.blur import reach_of
from fastssl.augment.policy import COLOUR_PARTS
from fastssl.augment.triton_apply import apply_kernel
from fastssl.augment.triton_blur import blur_kernel
from fastssl.augment.triton_colour import colour_kernel, mean_kernel
from fastssl.augment.triton_modes import AXIS_COLUMNS
from fastssl.augment.triton_numbers import Numbers
from fastssl.augment.triton_passes import ApplyPass, BlurPass, ColourPass, Pass, ResizePass, Shape
from fastssl.augment.triton_resample import resample_kernel, taps_kernel
from fastssl.augment.triton_table import table_kernel

INTERPRETED = not isinstance(apply_kernel, triton.runtime.JITFunction)  # the interpreter replaces kernels where they are defined
WIDEST = 1 << 16  # of a program under the interpreter, which costs the same for wide blocks as for narrow ones


@dataclass(frozen=True)
class Launch:
    """One kernel call; ``arguments`` and ``constants`` by the kernel's names."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4

    def run(self) -> None:
        # products and sums stay apart, so that results equal torch's to the last bit
        self.kernel[(self.programs,)](**self.arguments, **self.constants, num_warps=self.warps, enable_fp_fusion=False)


@dataclass
class Buffers:
    """What passes read and write: the canvas, scratch bytes used in turn, tables, taps, and the view."""

    canvas: Tensor
    extent: Tensor
    norm: Tensor
    view: Tensor
    scratch: list[Tensor]
    table: Tensor
    first: Tensor
    weight: Tensor
    mean: Tensor


def blocks_of(values: int, block: int) -> tuple[int, int]:
    """(values per program, programs per image)."""
    width = min(triton.next_power_of_2(values), WIDEST if INTERPRETED else block)
    return width, triton.cdiv(values, width)


def scratch_bytes(passes: list[Pass], channels: int) -> list[int]:
    """Bytes per image of the scratch buffers, which passes fill in turn."""
    sizes = [0, 0]
    for i, p in enumerate(passes[:-1]):
        sizes[i % 2] = max(sizes[i % 2], p.out.height * p.out.width * channels)
    return sizes


def table_bytes(passes: list[Pass], channels: int) -> int:
    """Bytes per image of the tables of one op."""
    return 256 * channels if any(isinstance(p, ApplyPass) and p.op is not None for p in passes) else 0


def tap_words(passes: list[Pass]) -> tuple[int, int]:
    """(first pixels, weights) per image of one axis, in 32-bit words."""
    resizes = [p for p in passes if isinstance(p, ResizePass)]
    outs = [(p.out.width if p.along_x else p.out.height, p.taps) for p in resizes]
    return max((out for out, _ in outs), default=0), max((out * taps for out, taps in outs), default=0)


class Launcher:
    """Builds the launches of one render call."""

    def __init__(self, passes: list[Pass], numbers: Numbers, buffers: Buffers, channels: int):
        self.passes, self.numbers, self.buffers, self.channels = passes, numbers, buffers, channels

    def launches(self) -> list[Launch]:
        prepared = [self._columns(p) for p in self.passes]
        self.rows, self.reals = self.numbers.tensors()
        result: list[Launch] = []
        for i, (p, columns) in enumerate(zip(self.passes, prepared, strict=True)):
            result += getattr(self, "_launch_" + type(p).__name__)(i, p, columns)
        return result

    def _columns(self, p: Pass) -> dict[str, int]:
        """Add a pass's numbers; where they are."""
        n = self.numbers
        if isinstance(p, ApplyPass):
            code_at, real_at = n.op(*p.op, p.domain) if p.op else (-1, 0)
            box_at = n.add(*n.plan.laws[p.box]["box"].unbind(1)) if p.box is not None else -1
            after_at = n.move(p.after, p.domain)
            return {"MAP_AT": n.move(p.before, p.source), "CODE_AT": code_at, "REAL_AT": real_at, "BOX_AT": box_at, "AFTER_AT": after_at}
        if isinstance(p, ResizePass):
            return {"AT": n.axes(p, p.source) if p.along_x else -1, "MIRROR_AT": n.mirror(p.mirror)}
        if isinstance(p, ColourPass):
            order_at, real_at = n.jitter(p.jitter)
            map_at = n.move(p.before, p.source)
            return {"ORDER_AT": order_at, "REAL_AT": real_at, "MAP_AT": map_at, "GREY_AT": n.coin(p.grey), "SOLARIZE_AT": n.coin(p.solarize)}
        if isinstance(p, BlurPass):
            return {"AT": n.blur(p.law) if p.along_x else -1, "SOLARIZE_AT": n.coin(p.solarize)}
        raise TypeError(type(p))

    def _source(self, i: int) -> tuple[Tensor, dict[str, int]]:
        """What pass i reads, and its strides in values."""
        p, c = self.passes[i], self.channels
        if i == 0:
            image, line, _, _ = self.buffers.canvas.stride()
            return self.buffers.canvas, {"IMAGE": image, "PITCH": line, "C": c}
        return self.buffers.scratch[(i - 1) % 2], {"IMAGE": p.source.height * p.source.width * c, "PITCH": p.source.width * c, "C": c}

    def _out(self, i: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments and constants of what pass i writes."""
        p, c, view = self.passes[i], self.channels, self.buffers.view
        if p.final:
            strides, out = view.stride(), view
            packed = view.is_contiguous(memory_format=torch.channels_last)
        else:
            strides, out, packed = (p.out.height * p.out.width * c, 1, p.out.width * c, c), self.buffers.scratch[i % 2], True
        names = ("out_image", "out_channel", "out_line", "out_pixel")
        arguments = {"norm": self.buffers.norm, "out": out, **dict(zip(names, strides, strict=True))}
        return arguments, {"OUT_H": p.out.height, "OUT_W": p.out.width, "PACKED": packed, "FINAL": p.final}

    def _launch_ApplyPass(self, i: int, p: ApplyPass, columns: dict[str, int]) -> Iterator[Launch]:
        source, strides = self._source(i)
        out, written = self._out(i)
        batch = len(self.rows)
        shared = {
            "COLUMNS": self.rows.shape[1], "REALS": self.reals.shape[1], "CODE_AT": columns["CODE_AT"], "REAL_AT": columns["REAL_AT"],
            "MAP_AT": columns["MAP_AT"], "MODE": p.before.mode, "FILL": p.before.fill, **strides, **_sides("SRC", p.source), **_sides("DOM", p.domain),
        }  # fmt: skip
        arguments = {"source": source, "extent": self.buffers.extent, "rows": self.rows, "reals": self.reals, "table": self.buffers.table}
        if p.op:
            block, _ = blocks_of(p.domain.height * p.domain.width, 4096)
            yield Launch(table_kernel, batch, arguments, {**shared, "BLOCK": block}, warps=8)
        block, blocks = blocks_of(p.out.height * p.out.width * self.channels, 512 if p.bilinear else 1024)
        own = {
            "BILINEAR": p.bilinear, "OP_FILL": p.op_fill, "BOX_AT": columns["BOX_AT"], "BOX_FILL": p.box_fill,
            "AFTER_AT": columns["AFTER_AT"], "AFTER": p.after.mode, "AFTER_FILL": p.after.fill, "BLOCK": block, "BLOCKS": blocks,
        }  # fmt: skip
        yield Launch(apply_kernel, batch * blocks, {**arguments, **out}, {**shared, **written, **own})

    def _launch_ResizePass(self, i: int, p: ResizePass, columns: dict[str, int]) -> Iterator[Launch]:
        source, strides = self._source(i)
        out, written = self._out(i)
        batch = len(self.rows)
        at = self._shared_at(p, columns)
        side = p.out.width if p.along_x else p.out.height
        taps = {"rows": self.rows, "first_pixel": self.buffers.first, "weight": self.buffers.weight}
        common = {"COLUMNS": self.rows.shape[1], "K": p.taps}
        own = {"AT": at + AXIS_COLUMNS * p.along_x, "OUT": side, "BICUBIC": p.bicubic, "BLOCK": triton.next_power_of_2(side)}
        yield Launch(taps_kernel, batch, taps, {**common, **own})
        block, blocks = blocks_of(p.out.height * p.out.width * self.channels, 1024)
        own = {"AT": at, "MIRROR_AT": columns["MIRROR_AT"], "ALONG_X": p.along_x, "BLOCK": block, "BLOCKS": blocks}
        yield Launch(resample_kernel, batch * blocks, {"source": source, **taps, **out}, {**common, **strides, **written, **own})

    def _shared_at(self, p: ResizePass | BlurPass, columns: dict[str, int]) -> int:
        """Both passes of a resize or blur read the columns that the first one added."""
        if p.along_x:
            self._pair_at = columns["AT"]
        return self._pair_at

    def _launch_ColourPass(self, i: int, p: ColourPass, columns: dict[str, int]) -> Iterator[Launch]:
        source, strides = self._source(i)
        out, written = self._out(i)
        laws, batch = self.numbers.policy.laws, len(self.rows)
        parts = sum((laws[p.jitter][part] > 0) << k for k, part in enumerate(COLOUR_PARTS)) if p.jitter is not None else 0
        shared = {
            "COLUMNS": self.rows.shape[1], "REALS": self.reals.shape[1], "ORDER_AT": columns["ORDER_AT"], "REAL_AT": columns["REAL_AT"], "PARTS": parts,
            "MAP_AT": columns["MAP_AT"], "MODE": p.before.mode, "FILL": p.before.fill, **strides, **_sides("SRC", p.source), **_sides("DOM", p.out),
        }  # fmt: skip
        arguments = {"source": source, "extent": self.buffers.extent, "rows": self.rows, "reals": self.reals, "mean": self.buffers.mean}
        if p.jitter is not None and laws[p.jitter]["contrast"]:
            block, _ = blocks_of(p.out.height * p.out.width, 2048)
            yield Launch(mean_kernel, batch, arguments, {**shared, "BLOCK": block}, warps=8)
        block, blocks = blocks_of(p.out.height * p.out.width, 512)
        own = {
            "GREY_AT": columns["GREY_AT"] if self.channels == 3 else -1, "SOLARIZE_AT": columns["SOLARIZE_AT"],
            "THRESHOLD": 0 if p.solarize is None else laws[p.solarize]["threshold"], "FINAL": written["FINAL"], "BLOCK": block, "BLOCKS": blocks,
        }  # fmt: skip
        yield Launch(colour_kernel, batch * blocks, {**arguments, **out}, {**shared, **own})

    def _launch_BlurPass(self, i: int, p: BlurPass, columns: dict[str, int]) -> Iterator[Launch]:
        source, strides = self._source(i)
        out, written = self._out(i)
        laws = self.numbers.policy.laws
        at = self._shared_at(p, columns)
        length, others = (p.out.width, p.out.height) if p.along_x else (p.out.height, p.out.width)
        longest = triton.next_power_of_2(length)
        lines, blocks = blocks_of(others * self.channels, max(4, 2048 // longest))
        own = {
            "COLUMNS": self.rows.shape[1], "AT": at, "FAR": reach_of(laws[p.law]["sigma_high"]), "SOLARIZE_AT": columns["SOLARIZE_AT"],
            "THRESHOLD": 0 if p.solarize is None else laws[p.solarize]["threshold"], "ALONG_X": p.along_x, **_sides("SRC", p.source),
            "FINAL": written["FINAL"], "LINES": lines, "LENGTH": longest, "BLOCKS": blocks,
        }  # fmt: skip
        arguments = {"source": source, "extent": self.buffers.extent, "rows": self.rows, **out}
        yield Launch(blur_kernel, len(self.rows) * blocks, arguments, {**strides, **own})


def _sides(name: str, shape: Shape) -> dict[str, Any]:
    return {f"{name}_H": shape.height, f"{name}_W": shape.width, f"{name}_FULL": shape.full}
