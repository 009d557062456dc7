"""An image batch on its way through a policy's laws: what moves pixels is collected, and read from the canvas in one pass when values are needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.augment import compose, pixels
from fastssl.augment.policy import Policy
from fastssl.augment.resize import Boxes, boxes_at, boxes_fast
from fastssl.errors import DataError

Rows = Tensor | slice


def update(image: Tensor, chosen_B: Tensor, grouped: bool, compute: Callable[[Rows], Tensor]) -> Tensor:
    """``image`` with the chosen rows replaced by ``compute(rows)``; in place when grouped."""
    if not grouped:
        return torch.where(chosen_B.view(-1, *[1] * (image.dim() - 1)), compute(slice(None)), image)
    rows = chosen_B.nonzero().squeeze(1)
    if rows.numel() == 0:
        return image
    target, new = image.view(image.shape[0], -1), compute(rows).reshape(rows.numel(), -1)
    if target.dtype == torch.uint8 and target.shape[1] % 8 == 0:  # eight pixels at a time: seven times faster than byte by byte
        target, new = target.view(torch.int64), new.view(torch.int64)
    target.index_copy_(0, rows, new)
    return image


def pick(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


class Canvas:
    """Planar uint8 pixels [B, C, H, W], extents [B], and what is pending: boxes to resize, then row and column maps (-1 = fill; None = as it is).

    ``mode``: ``dense`` has fixed shapes and no host reads; ``grouped`` works on the rows that need a step, with identical results; ``fast`` is
    ``grouped`` with torch's own resize kernel.
    """

    def __init__(self, pixels_BHWC: Tensor, extent_B2: Tensor, policy: Policy, mode: str):
        self.image = pixels_BHWC.permute(0, 3, 1, 2)
        self.owned = False  # whether ``image`` may be written to
        self.policy, self.grouped, self.fast = policy, mode != "dense", mode == "fast"
        canvas_H, canvas_W = self.image.shape[2:]
        if self.grouped:
            wrong = ((extent_B2 < 1) | (extent_B2[:, :1] > canvas_H) | (extent_B2[:, 1:] > canvas_W)).any(1).nonzero().flatten().tolist()
            if wrong:
                h, w = extent_B2[wrong[0]].tolist()
                raise DataError(f"row {wrong[0]} of the batch has an extent of {h}x{w} pixels; height must lie in 1..{canvas_H}, width in 1..{canvas_W}")
        # an accelerator cannot report them without a host read; there they are bounded, so that no index leaves the canvas
        self.height, self.width = extent_B2[:, 0].long().clamp(1, canvas_H), extent_B2[:, 1].long().clamp(1, canvas_W)
        # whether every pixel of the canvas is image; known without a device read only on the host
        self.full = self.grouped and bool((self.height == self.image.shape[2]).all() and (self.width == self.image.shape[3]).all())
        self.boxes: Boxes | None = None
        self.mirrored: Tensor | None = None  # which rows are mirrored behind the boxes; known besides the maps until a window follows
        self.windowed = False
        self.maps: list[Tensor | None] = [None, None]
        self.fill: tuple[int, ...] | None = None

    def colour(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """One level per channel; a colour becomes its luma on grey images."""
        levels = (value,) * 3 if isinstance(value, int) else value
        if self.policy.channels == 1:
            levels = ((levels[0] * 19595 + levels[1] * 38470 + levels[2] * 7471 + 0x8000) >> 16,)
        return tuple(levels)

    @property
    def moved(self) -> bool:
        return self.boxes is not None or any(axis is not None for axis in self.maps)

    def shape(self) -> tuple[int, int]:
        """(height, width) of the image once what is pending is done."""
        base = self.boxes.least if self.boxes is not None else self.image.shape[2:]
        return tuple(n if axis is None else axis.shape[1] for n, axis in zip(base, self.maps, strict=True))  # type: ignore[return-value]

    def map_of(self, axis: int) -> Tensor:
        """int64 [B, length]: the source position of each row (axis 0) or column (axis 1)."""
        found = self.maps[axis]
        if found is None:
            found = torch.arange(self.shape()[axis], device=self.image.device).unsqueeze(0).expand(len(self.image), -1)
        return found

    def inside(self) -> Tensor | None:
        if self.full:
            return None
        row = torch.arange(self.image.shape[2], device=self.image.device).view(1, -1, 1)
        col = torch.arange(self.image.shape[3], device=self.image.device).view(1, 1, -1)
        return (row < self.height.view(-1, 1, 1)) & (col < self.width.view(-1, 1, 1))

    def flip(self, chosen_B: Tensor) -> None:
        """Mirror the chosen rows left-right within their extent."""
        cols, last = self.map_of(1), self.width.unsqueeze(1) - 1
        place = torch.arange(cols.shape[1], device=cols.device).unsqueeze(0)
        mirrored = cols.flip(1) if self.full else cols.gather(1, torch.where(place <= last, last - place, place))
        self.maps[1] = torch.where(chosen_B.unsqueeze(1), mirrored, cols)
        self.mirrored = chosen_B if self.mirrored is None else chosen_B ^ self.mirrored

    def window(self, first_2: list[Tensor], side: int, mode: str, fill: int | tuple[int, ...]) -> None:
        """Cut a side x side window whose top-left lies at ``first`` [B] of the image's coordinates, continued outside by ``mode``."""
        if self.fill is not None:
            self.flush()
        for axis, (first, extent) in enumerate(zip(first_2, (self.height, self.width), strict=True)):
            place = first.unsqueeze(1) + torch.arange(side, device=first.device).unsqueeze(0)
            last = extent.unsqueeze(1) - 1
            if mode == "reflect":
                period = (2 * last).clamp_min(1)
                place = torch.remainder(place, period)
                source = torch.minimum(place, period - place).clamp_max(last)
            else:
                source = torch.minimum(place.clamp_min(0), last)
            before = self.maps[axis]
            taken = source if before is None else before.gather(1, source)
            self.maps[axis] = torch.where(place == source, taken, -1) if mode == "constant" else taken
        if mode == "constant":
            self.fill = self.colour(fill)
        self.height, self.width = (torch.full_like(self.height, side) for _ in range(2))
        self.full = self.windowed = True

    def resize(self, box_4: tuple[Tensor, Tensor, Tensor, Tensor], to_2: tuple[Tensor, Tensor], least: tuple[int, int], mode: str, equal: bool) -> None:
        """Boxes (top, left, height, width, each [B]) become ``to`` (height, width, each [B]); ``equal``: all of them ``least``."""
        if self.moved:
            self.flush()
        canvas_H, canvas_W = self.image.shape[2:]
        top, left = box_4[0].clamp(0, canvas_H - 1), box_4[1].clamp(0, canvas_W - 1)
        height, width = torch.minimum(box_4[2], canvas_H - top), torch.minimum(box_4[3], canvas_W - left)
        self.boxes = Boxes(top, left, height, width, *to_2, least, mode)
        self.height, self.width, self.full = *to_2, equal

    def turn(self, matrices: list[Tensor], moved_B: Tensor, fill: tuple[int, ...]) -> None:
        """Do what is pending and, in the same resampling, the affine maps (float64 [B, 6], output to source, in order of action) of the moved rows."""
        if self.boxes is None or self.windowed:
            self.flush()  # whole pixels moved so far, or a window of a resized image
        zero, boxes, image = torch.zeros_like(self.height), self.boxes, self.image
        box = (zero, zero, self.height, self.width) if boxes is None else (boxes.top, boxes.left, boxes.height, boxes.width)
        source = compose.Source.of(*box, self.height, self.width, mirrored=self.mirrored)
        most = 1 if boxes is None else compose.parts_of(image.shape[2], image.shape[3], boxes.least)
        size = self.shape()
        self.flush()

        def sample(rows: Rows) -> Tensor:
            mine, pictures, maps = source.rows(rows), pick(image, rows), [pick(m, rows) for m in matrices]
            if not self.grouped:
                return compose.sample(pictures, mine, maps, size, most, fill)
            out = pictures.new_empty(len(pictures), pictures.shape[1], *size)
            need_M = torch.maximum(mine.box_height / mine.height, mine.box_width / mine.width).ceil().clamp(1, most).view(-1)
            for parts in range(1, most + 1):  # rows that need one sample a pixel do not wait for those that need nine
                these = (need_M == parts).nonzero().squeeze(1)
                if len(these):
                    few = compose.sample(pictures[these], mine.rows(these), [m[these] for m in maps], size, parts, fill, self.fast)
                    out.index_copy_(0, these, few)
            return out

        self.image = update(self.image, moved_B, self.grouped, sample)

    def flush(self) -> None:
        """Do what is pending; afterwards ``image`` belongs to us."""
        if not self.moved:
            if not self.owned:
                self.image = self.image.contiguous().clone() if self.image.is_contiguous() else self.image.contiguous()
            self.owned = True
            return
        outside = None
        if self.fill is not None:
            outside = (self.map_of(0) < 0).unsqueeze(2) | (self.map_of(1) < 0).unsqueeze(1)
            self.maps = [axis if axis is None else axis.clamp_min(0) for axis in self.maps]
        if self.boxes is not None and self.fast:
            self.image = boxes_fast(self.image, self.boxes, *self.maps)
        elif self.boxes is not None:
            self.image = boxes_at(self.image, self.boxes, self.map_of(0), self.map_of(1))
        else:
            b, c, height, width = self.image.shape
            index = (self.map_of(0) * width).unsqueeze(2) + self.map_of(1).unsqueeze(1)
            source = self.image.flatten(2) if self.owned else self.image.permute(0, 2, 3, 1).reshape(b, height * width, c).transpose(1, 2)
            self.image = source.gather(2, index.view(b, 1, -1).expand(b, c, -1)).view(b, c, *index.shape[1:])
        if outside is not None and self.fill is not None:
            self.image = pixels.paint(self.image, outside, self.fill)
        self.boxes, self.maps, self.fill, self.owned = None, [None, None], None, True
        self.mirrored, self.windowed = None, False
