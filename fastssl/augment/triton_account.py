"""How many bytes the Triton passes move through memory, beside the least that any renderer must: each canvas byte read once, each view byte written once.

The aim is at most three times that floor, held by a test for FixMatch's views at 32 pixels and the ImageNet views at 224 from 375 x 500.  Of a view that
is cut from a larger canvas less is read than the floor says.

Counted are images, tables, filter weights and the per-row numbers as kernels read them; a byte that several threads of a pass read counts once, as
caches serve the rest.  Not counted: drawing the plan and turning it into per-row numbers, about a kilobyte per row whatever the image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastssl.augment.ops import CODE, HISTOGRAM, KIND, SPACES, TONE
from fastssl.augment.policy import Policy
from fastssl.augment.triton_passes import ApplyPass, BlurPass, ColourPass, Pass, ResizePass, Shape, passes_of

NUMBERS = 48 * 8 * 2  # per row: at most 48 numbers of 8 bytes, written once, read once from memory


@dataclass
class Account:
    """Bytes of a whole batch.  ``worst``: every row's ops need statistics and tables and its crop is the whole canvas; ``mean``: over the law."""

    floor: int
    worst: int = 0
    mean: float = 0.0
    passes: list[tuple[str, int]] = field(default_factory=list)  # what and its bytes at worst

    def add(self, name: str, worst: int, mean: float | None = None) -> None:
        self.passes.append((name, worst))
        self.worst += worst
        self.mean += worst if mean is None else mean

    @property
    def ratio(self) -> float:
        """Bytes at worst over the floor."""
        return self.worst / self.floor

    @property
    def mean_ratio(self) -> float:
        return self.mean / self.floor


def bytes_account(policy: Policy, batch: int, canvas: tuple[int, int], out_dtype: torch.dtype = torch.bfloat16) -> Account:
    """The account of rendering ``batch`` canvases of ``canvas`` = (height, width) pixels into views of ``out_dtype``."""
    c = policy.channels
    view = policy.size**2 * c * torch.empty(0, dtype=out_dtype).element_size()
    account = Account(floor=batch * (canvas[0] * canvas[1] * c + view))
    account.add("numbers", batch * NUMBERS)
    for p in passes_of(policy, *canvas):
        written = view if p.final else _bytes(p.out, c)
        _Count(account, policy, batch, c).count(p, written)
    return account


def _bytes(shape: Shape, channels: int) -> int:
    return shape.height * shape.width * channels


@dataclass
class _Count:
    account: Account
    policy: Policy
    batch: int
    c: int

    def add(self, name: str, worst: int, mean: float | None = None) -> None:
        self.account.add(name, self.batch * worst, None if mean is None else self.batch * mean)

    def count(self, p: Pass, written: int) -> None:
        read = _bytes(p.source, self.c)
        if isinstance(p, ApplyPass):
            if p.op:
                self._table(p, min(read, _bytes(p.domain, self.c)))
            self.add("apply", min(read, _bytes(p.domain, self.c), _bytes(p.out, self.c)) + written)
        elif isinstance(p, ResizePass):
            side = p.out.width if p.along_x else p.out.height
            self.add("weights", 2 * 4 * side * (p.taps + 1))
            law = self.policy.laws[p.law]
            share = sum(law["scale"]) / 2 if law.name == "resized_crop" else 1.0
            lines = share**0.5  # of the canvas's lines, for a crop of this share
            if p.along_x:
                self.add("resize x", read + written, read * share + written * lines)
            else:
                self.add("resize y", read + written, read * lines + written)
        elif isinstance(p, ColourPass):
            if p.jitter is not None and self.policy.laws[p.jitter]["contrast"]:
                self.add("mean", read, read * self.policy.laws[p.jitter]["p"])
            self.add("colour", read + written)
        elif isinstance(p, BlurPass):
            self.add("blur x" if p.along_x else "blur y", read + written)

    def _table(self, p: ApplyPass, read: int) -> None:
        assert p.op is not None
        law = self.policy.laws[p.op[0]]
        pool = SPACES[law["space"]].pool
        counts = sum(KIND[code] == HISTOGRAM or code == CODE["Contrast"] for code in pool) / len(pool)
        tables = sum(KIND[code] in (HISTOGRAM, TONE) for code in pool) / len(pool)
        table = 2 * 256 * self.c
        self.add("table", read + table, law["p"] * (read * counts + table * tables))
