"""A dataset on one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import numpy as np

from data_tools.atomic import write_file
from data_tools.inspection import MAX_LINES, draw_sheet, facts
from fastssl.errors import DataError
from fastssl.sources.manifest import load_labels, load_manifest, load_split, split_files

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .1em .8em .1em 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums } td.bar { width: 60% }
td.bar div { background: #4878a8; height: .8em; min-width: 1px } td.bar div.none { min-width: 0 }
div.scroll { max-height: 30em; overflow: auto } img { max-width: 100%; image-rendering: auto } code { overflow-wrap: anywhere }
"""


def write_page(dataset: str | Path, out: str | Path, *, per_class: int = 10) -> Path:
    """Facts, images per class and a contact sheet of every split, and the label splits, as one HTML file."""
    manifest = load_manifest(dataset)
    parts = [f"<h1>{escape(manifest.name)}</h1>", _table(facts(dataset))]
    for info in manifest.splits.values():
        parts.append(f"<h2>{escape(info.name)}: {info.count} images</h2>")
        parts.append(_histogram(manifest.classes, np.asarray(info.class_counts)))
        shown = f"the first {MAX_LINES} of {manifest.num_classes} classes, " if manifest.num_classes > MAX_LINES else ""
        parts.append(f"<p>{shown}the first {per_class} images of each:</p>")
        parts.append(f'<img alt="contact sheet of {escape(info.name)}" src="data:image/png;base64,{_sheet(dataset, info.name, per_class)}">')
    for file in split_files(manifest.root):
        parts.append(f"<h2>label split {escape(file.stem)}</h2>")
        try:
            split = load_split(manifest, str(file))
        except DataError as error:
            parts.append(f"<p>unusable: {escape(str(error))}</p>")
            continue
        numbers = {"labelled": split.labeled, "unlabelled": split.unlabeled, "validation": split.validation}
        parts.append(
            _table([("law", f"{split.law}, seed {split.seed}"), *((name, str(len(rows))) for name, rows in numbers.items()), ("digest", split.digest)])
        )
        parts.append(_histogram(manifest.classes, np.bincount(load_labels(manifest, split.of)[split.labeled], minlength=manifest.num_classes)))
    text = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(manifest.name)}</title><style>{_STYLE}</style></head>\n<body>'
    write_file(Path(out), (text + "\n".join(parts) + "\n</body></html>\n").encode("utf-8", "replace"))
    return Path(out)


def _table(pairs: list[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>" for name, value in pairs) + "</table>"


def _histogram(names: tuple[str, ...], counts: np.ndarray) -> str:
    top = max(1, int(counts.max(initial=0)))
    rows = []
    for name, count in zip(names, counts.tolist(), strict=True):
        bar = f'<div{"" if count else " class=none"} style="width:{100 * count / top:.2f}%"></div>'
        rows.append(f'<tr><td>{escape(name)}</td><td class="number">{count}</td><td class="bar">{bar}</td></tr>')
    return f'<div class="scroll"><table style="width:100%">{"".join(rows)}</table></div>'


def _sheet(dataset: str | Path, split: str, per_class: int) -> str:
    buffer = io.BytesIO()
    draw_sheet(dataset, split=split, per_class=per_class).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
