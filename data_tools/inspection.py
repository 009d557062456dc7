"""Looking at a converted dataset: a table of facts, class histograms, and a contact sheet with some images of every class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_tools.atomic import told
from data_tools.histogram import bars
from fastssl.errors import DataError
from fastssl.sources.base import Source, open_source
from fastssl.sources.manifest import Manifest, load_labels, load_manifest, load_split, split_files
from fastssl.types import RawBatch

MAX_LINES = 50  # classes on a sheet
_MARGIN, _GAP = 120, 2


def facts(dataset: str | Path) -> list[tuple[str, str]]:
    """(name, value) pairs that describe a dataset folder, in reading order."""
    manifest = load_manifest(dataset)
    size = sum(file.stat().st_size for file in manifest.root.rglob("*") if file.is_file())
    lines = [
        ("folder", str(manifest.root)),
        ("name", manifest.name),
        ("format", manifest.format),
        ("classes", f"{manifest.num_classes}: {', '.join(manifest.classes[:12])}{' ...' if manifest.num_classes > 12 else ''}"),
        ("channels", str(manifest.channels)),
        ("mean", ", ".join(f"{value:.5f}" for value in manifest.mean)),
        ("std", ", ".join(f"{value:.5f}" for value in manifest.std)),
        ("size on disk", f"{size / 1e6:.1f} MB"),
        ("source", ", ".join(f"{key} {value}" for key, value in manifest.source.items() if value)),
        ("options", ", ".join(f"{key}={value}" for key, value in manifest.options.items())),
        ("digest", manifest.digest),
    ]
    for info in manifest.splits.values():
        low, high = min(info.class_counts, default=0), max(info.class_counts, default=0)
        unknown = f", {info.unlabeled} without a class" if info.unlabeled else ""
        lines.append((f"split {info.name}", f"{info.count} images up to {info.max_height}x{info.max_width}, {low}..{high} per class{unknown}"))
    for file in split_files(manifest.root):
        try:
            split = load_split(manifest, str(file))
            text = f"{split.labeled.size} labelled, {split.unlabeled.size} unlabelled, {split.validation.size} validation ({split.law}, seed {split.seed})"
        except DataError as error:
            text = f"unusable: {error}"
        lines.append((f"labels {file.stem}", text))
    return lines


def histograms(dataset: str | Path) -> list[str]:
    """Images per class of every split as lines with bars."""
    manifest = load_manifest(dataset)
    lines = []
    for info in manifest.splits.values():
        lines.append(f"{info.name}: images per class")
        lines += [f"  {line}" for line in bars(manifest.classes, info.class_counts)]
    return lines


def draw_sheet(dataset: str | Path, *, split: str = "train", per_class: int = 10, label_split: str = "", side: int = 64) -> Image.Image:
    """The first ``per_class`` images of each class, one class per line (at most 50, then a line for images without a class); with ``label_split`` its labelled
    rows only.  Images are read one by one, so that memory does not depend on the size of the sheet's images."""
    if per_class < 1:
        raise DataError(f"a sheet needs at least 1 image per class, not {per_class}")
    manifest = load_manifest(dataset)
    labels = load_labels(manifest, split)
    rows = np.arange(len(labels))
    if label_split:
        chosen = load_split(manifest, label_split)
        if chosen.of != split:
            raise DataError(f"label split {label_split!r} has rows of {chosen.of!r}, not of {split!r}; add --split {chosen.of}")
        rows = chosen.labeled
    lines = [(name, rows[labels[rows] == line][:per_class]) for line, name in enumerate(manifest.classes[:MAX_LINES])]
    if (labels[rows] < 0).any():
        lines.append(("(no class)", rows[labels[rows] < 0][:per_class]))
    sheet = Image.new("RGB", (_MARGIN + per_class * (side + _GAP), len(lines) * (side + _GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    source = open_source(dataset, split)
    try:
        batch = RawBatch.allocate(1, *source.canvas)
        for line, (name, chosen_rows) in enumerate(lines):
            pen.text((4, line * (side + _GAP) + side // 2 - 5), _printable(name), fill="black", font=font)
            for column, row in enumerate(chosen_rows.tolist()):
                sheet.paste(_small(source, batch, row, manifest, side), (_MARGIN + column * (side + _GAP), line * (side + _GAP)))
    finally:
        source.close()
    return sheet


def contact_sheet(dataset: str | Path, out: str | Path, *, split: str = "train", per_class: int = 10, label_split: str = "", side: int = 64) -> Path:
    """``draw_sheet`` written as a PNG file."""
    sheet = draw_sheet(dataset, split=split, per_class=per_class, label_split=label_split, side=side)
    with told(Path(out)):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, format="PNG")
    return Path(out)


def _small(source: Source, batch: RawBatch, row: int, manifest: Manifest, side: int) -> Image.Image:
    source.fill(np.array([row]), batch)
    height, width = batch.extent_B2[0].tolist()
    pixels = batch.pixels_BHWC[0, :height, :width].numpy()
    image = Image.fromarray(np.repeat(pixels, 3, axis=2) if manifest.channels == 1 else pixels)
    scale = side / max(height, width)
    law = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), law)


def _printable(name: str) -> str:
    """The built-in font may know Latin letters only; a question mark stands for the others."""
    return name[:18].encode("latin-1", "replace").decode("latin-1")
