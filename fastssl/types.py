"""The nouns every layer shares: raw canvases, views, batches, network outputs, losses, the task.

Shape letters used in tensor names throughout the project:
B rows of one stream's batch on this rank, N rows of a whole list, H W C canvas height/width/channels, K classes, D features.
All tensors of a run keep one shape, dtype and address for the whole run, so that a step can be captured and replayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

StreamName = Literal["labeled", "unlabeled"]
STREAM_IDS: dict[str, int] = {"labeled": 0, "unlabeled": 1, "eval": 2}


@dataclass
class RawBatch:
    """One stream's slice of one step, as delivered by a source: decoded pixels and where they came from.

    ``label_B`` is -1 for unlabelled rows.  ``truth_B`` is the hidden label or -1; only meters may read it.
    ``index_B`` is the row's position in the stream's split list, ``draw_B`` the position in the stream's infinite global sequence:
    ``draw_B`` is unique for each use of a row and keys every random number drawn for it.
    """

    pixels_BHWC: Tensor  # uint8 canvas; only [:h, :w] of each row is image, the rest is undefined padding
    extent_B2: Tensor  # int32, valid (height, width) of the canvas
    size_B2: Tensor  # int32, (height, width) of the image itself, before any reduction at conversion or decoding; crop laws are drawn on it
    row_B: Tensor  # int64, stable row of the dataset
    index_B: Tensor  # int64
    draw_B: Tensor  # int64
    label_B: Tensor  # int64
    truth_B: Tensor  # int64
    is_labeled_B: Tensor  # bool, this row is also in the labelled split

    @classmethod
    def allocate(cls, batch: int, height: int, width: int, channels: int = 3, *, pin: bool = False, device: str | torch.device = "cpu") -> RawBatch:
        """Buffers for ``batch`` rows; pixel contents are undefined until a source fills them."""

        def make(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device, pin_memory=pin)

        def ids() -> Tensor:
            return make(batch, dtype=torch.int64).fill_(-1)

        return cls(
            pixels_BHWC=make(batch, height, width, channels, dtype=torch.uint8),
            extent_B2=make(batch, 2, dtype=torch.int32).zero_(),
            size_B2=make(batch, 2, dtype=torch.int32).zero_(),
            row_B=ids(),
            index_B=ids(),
            draw_B=ids(),
            label_B=ids(),
            truth_B=ids(),
            is_labeled_B=make(batch, dtype=torch.bool).zero_(),
        )

    def __len__(self) -> int:
        return self.pixels_BHWC.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def copy_(self, other: RawBatch, non_blocking: bool = False) -> RawBatch:
        """Overwrite every buffer in place from ``other`` (same shapes, any device)."""
        for name, tensor in self.tensors().items():
            tensor.copy_(getattr(other, name), non_blocking=non_blocking)
        return self


@dataclass(frozen=True)
class View:
    """A method's wish: this stream's rows, rendered by this policy slot ("weak", "strong", or a name in ``augment.extra``) of the recipe.

    ``size`` overrides the recipe's view side in pixels (multi-crop methods).
    ``each_step`` = False: for ``Method.prepare`` alone; no update renders it and ``Views`` does not hold it.
    """

    stream: StreamName
    policy: str
    size: int | None = None
    each_step: bool = True


class Views(Mapping[str, Tensor]):
    """Rendered views of one step: name -> NCHW float tensor (channels-last memory), also readable as attributes.

    Views of one resolution are row ranges of one buffer, in the order in which the method declared them.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["_tensors"][name]
        except KeyError:
            raise AttributeError(f"no view named {name!r}; this step has {sorted(self.__dict__.get('_tensors', ()))}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass
class StreamBatch:
    """What a method may know of a stream's rows (everything of RawBatch but pixels and hidden truth)."""

    row_B: Tensor
    index_B: Tensor
    draw_B: Tensor
    label_B: Tensor
    is_labeled_B: Tensor

    @classmethod
    def of(cls, raw: RawBatch) -> StreamBatch:
        return cls(raw.row_B, raw.index_B, raw.draw_B, raw.label_B, raw.is_labeled_B)


@dataclass
class ClockTensors:
    """Progress as device tensors (int64 scalars): number of finished updates and finished epochs."""

    step: Tensor
    epoch: Tensor


@dataclass
class Batch:
    """Everything but pixels that a method's forward may read. ``draws`` holds what the method's ``draws`` asked for, new numbers at each step."""

    labeled: StreamBatch
    unlabeled: StreamBatch | None
    clock: ClockTensors
    draws: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Out:
    """A network's answer for one view. ``heads`` holds extra heads by name, un-normalised; heads on request are not in it."""

    logits_NC: Tensor
    feat_ND: Tensor
    heads: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class PseudoLabels:
    """What meters need to judge pseudo-labels: ``label_B`` int64, ``mask_B`` 0/1 float, ``confidence_B`` float; one row per unlabelled row."""

    label_B: Tensor
    mask_B: Tensor
    confidence_B: Tensor | None = None


@dataclass
class Loss:
    """``total`` is differentiated; ``parts`` are detached scalars for meters, named without prefix (``sup_loss``, ``unsup_loss``)."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    pseudo: PseudoLabels | None = None


@dataclass(frozen=True)
class HeadSpec:
    """An extra head on the features: ``kind`` names a builder in ``models/heads.py`` and ``options`` its arguments.

    ``on_request``: the network does not answer with it; the method applies it itself, ``student.head(name, feat)``, to the features it wants
    (some views only, or a changed gradient).
    """

    kind: str
    options: dict[str, object] = field(default_factory=dict)
    on_request: bool = False


@dataclass(frozen=True)
class Draw:
    """Random numbers that a method wants at every step, keyed by (seed, step or draw_B, name) and so equal at any world size and after a resume.

    ``permutation``: int64 [length], the same on every rank: of rows of the GLOBAL batch.
    ``uniform``: float32 [length] in [0, 1), the same on every rank.   ``beta``: float32 [length] of Beta(alpha, alpha), the same on every rank.
    ``normal``: float32 standard normal numbers in the shape of the view ``like`` on this rank, keyed row by row; ``length`` is ignored.
    """

    kind: Literal["permutation", "uniform", "beta", "normal"]
    length: int = 1
    alpha: float = 1.0
    like: str = ""


@dataclass(frozen=True)
class Task:
    """The sizes a method may depend on. Batch sizes are global (summed over ranks).

    ``labeled_labels[i]`` is the label of the labelled row with ``index_B`` = i; empty where nobody gave it.
    """

    num_classes: int
    num_labeled: int
    num_unlabeled: int
    labeled_class_counts: tuple[int, ...]
    labeled_batch: int
    unlabeled_batch: int
    total_steps: int
    steps_per_epoch: int
    labeled_labels: tuple[int, ...] = ()
