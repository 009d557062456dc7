"""What is known of a split once all its units are converted and before they are put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_tools.units import Unit


@dataclass
class SplitPlan:
    """Totals over the kept rows of one split, gathered unit by unit: nothing here grows with the number of images except one name per unit.

    Sizes in pixels; ``largest_bytes`` of one stored row, ``payload`` of all; ``reduced`` when some image was larger before conversion.
    """

    name: str
    channels: int
    units: Sequence[str]
    class_counts: np.ndarray
    histogram: np.ndarray
    count: int = 0
    unlabeled: int = 0
    bad: int = 0
    max_height: int = 0
    max_width: int = 0
    min_height: int = 1 << 30
    min_width: int = 1 << 30
    largest_bytes: int = 0
    payload: int = 0
    reduced: bool = False
    measured: int = 0
    largest: dict[str, int] = field(default_factory=dict)
    sums: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))

    @property
    def varied(self) -> bool:
        """Whether the images differ in size."""
        return self.min_height != self.max_height or self.min_width != self.max_width

    def add(self, unit: Unit) -> None:
        rows = unit.rows
        self.bad += len(unit.bad_rows)
        self.measured += unit.measured
        self.histogram += unit.histogram
        if not len(rows):
            return
        height, width = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
        area = int((height * width).max())
        if area > self.largest.get("height", 0) * self.largest.get("width", 0):
            place = int((height * width).argmax())
            self.largest = {"row": self.count + place, "height": int(height[place]), "width": int(width[place])}
        known = rows["label"][rows["label"] >= 0]
        self.class_counts += np.bincount(known, minlength=len(self.class_counts))
        self.unlabeled += len(rows) - len(known)
        self.count += len(rows)
        self.max_height, self.max_width = max(self.max_height, int(height.max())), max(self.max_width, int(width.max()))
        self.min_height, self.min_width = min(self.min_height, int(height.min())), min(self.min_width, int(width.min()))
        self.largest_bytes = max(self.largest_bytes, int(rows["bytes"].max()))
        self.payload += int(rows["bytes"].sum())
        self.sums += [int(height.sum()), int(width.sum())]
        self.reduced = self.reduced or bool((rows["own_height"] != rows["height"]).any() or (rows["own_width"] != rows["width"]).any())

    def sizes(self) -> dict[str, object]:
        """Statistics for the manifest: smallest, mean and largest side in pixels, stored bytes, the largest image."""
        mean = [round(float(total) / self.count, 3) for total in self.sums]
        return {
            "height": {"min": self.min_height, "mean": mean[0], "max": self.max_height},
            "width": {"min": self.min_width, "mean": mean[1], "max": self.max_width},
            "bytes": {"mean": round(self.payload / self.count, 1), "max": self.largest_bytes, "total": self.payload},
            "largest": self.largest,
        }


def plan_split(name: str, channels: int, num_classes: int, units: Sequence[str], records: Iterable[Unit]) -> SplitPlan:
    """Gather the totals of one split from its units' records, in order."""
    plan = SplitPlan(name, channels, units, np.zeros(num_classes, np.int64), np.zeros((channels, 256), np.int64))
    for unit in records:
        plan.add(unit)
    return plan
