"""Looking at a converted dataset: a table of facts, and a contact sheet with some images of every class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_tools.atomic import told
from fastssl.errors import DataError
from fastssl.sources.base import open_source
from fastssl.sources.manifest import load_labels, load_manifest, load_split
from fastssl.types import RawBatch


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
        ("digest", manifest.digest),
    ]
    for info in manifest.splits.values():
        low, high = min(info.class_counts), max(info.class_counts)
        lines.append((f"split {info.name}", f"{info.count} images up to {info.max_height}x{info.max_width}, {low}..{high} per class"))
    for file in sorted((manifest.root / "splits").glob("*.json")):
        try:
            split = load_split(manifest, str(file))
            text = f"{split.labeled.size} labelled, {split.unlabeled.size} unlabelled, {split.validation.size} validation ({split.law}, seed {split.seed})"
        except DataError as error:
            text = f"unusable: {error}"
        lines.append((f"labels {file.stem}", text))
    return lines


def contact_sheet(dataset: str | Path, out: str | Path, *, split: str = "train", per_class: int = 10, label_split: str = "", side: int = 64) -> Path:
    """A PNG with the first ``per_class`` images of each class, one class per line (at most 50 classes); with ``label_split`` its labelled rows only."""
    if per_class < 1:
        raise DataError(f"a sheet needs at least 1 image per class, not {per_class}")
    manifest = load_manifest(dataset)
    labels = load_labels(manifest, split)
    rows = load_split(manifest, label_split).labeled if label_split else np.arange(len(labels))
    names = manifest.classes[:50]
    margin, gap = 120, 2
    sheet = Image.new("RGB", (margin + per_class * (side + gap), len(names) * (side + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    source = open_source(dataset, split)
    try:
        batch = RawBatch.allocate(per_class, *source.canvas)
        for line, name in enumerate(names):
            chosen = rows[labels[rows] == line][:per_class]
            source.fill(chosen, batch)
            pen.text((4, line * (side + gap) + side // 2 - 5), name[:18], fill="black", font=font)
            for column in range(len(chosen)):
                height, width = batch.extent_B2[column].tolist()
                pixels = batch.pixels_BHWC[column, :height, :width].numpy()
                image = Image.fromarray(np.repeat(pixels, 3, axis=2) if manifest.channels == 1 else pixels)
                scale = side / max(height, width)
                law = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
                image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), law)
                sheet.paste(image, (margin + column * (side + gap), line * (side + gap)))
    finally:
        source.close()
    with told(Path(out)):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, format="PNG")
    return Path(out)
