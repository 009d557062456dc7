"""A selection as pictures and HTML: parts for the report of a pipeline, or a page of its own."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from fastssl.engine.sheet import read_rows
from fastssl.selftrain.files import replace_file
from fastssl.selftrain.judge import Judgement, coarse
from fastssl.sources.base import open_source

SHOWN_CLASSES = 12  # on a contact sheet
TILE, EDGE, LEFT = 72, 3, 150
RIGHT, WRONG, UNKNOWN = (0, 130, 95), (213, 94, 0), (190, 190, 190)
_STYLE = """:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:0 auto;padding:24px 18px}
h2{font-size:19px;margin:32px 0 6px}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13.5px}td,th{padding:4px 9px;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;height:auto;background:#fff;border-radius:6px}p{max-width:80ch}"""


def sections(judgement: Judgement, name: str = "", *, pictures: int = 8) -> list[tuple[str, str]]:
    """(heading, HTML) pairs about a selection."""
    of = f" of {name}" if name else ""
    info = judgement.selection.info
    facts = "".join(f"<p>{escape(line)}</p>" for line in judgement.lines())
    if info["bad_images"]:
        facts += f"<p>{info['bad_images']} images of the pool could not be scored.</p>"
    plots = "".join(_image(_png(figure), label) for figure, label in _figures(judgement))
    out = [(f"Selection{of}", facts + plots + _table(judgement))]
    sheet = contact_sheet(judgement, pictures)
    if sheet is not None:
        note = "<p>Best rows of a list on the left, last ones that were selected on the right; green frames are right, orange ones wrong.</p>"
        out.append((f"Selected images{of}", note + _image(sheet, "contact sheet")))
    return out


def write_page(judgement: Judgement, out: str | Path | None = None, *, pictures: int = 8) -> Path:
    """Write one self-contained HTML file about a selection, by default report.html in its folder."""
    path = Path(out) if out else judgement.selection.folder / "report.html"
    body = "".join(f"<h2>{escape(heading)}</h2>{content}" for heading, content in sections(judgement, pictures=pictures))
    title = escape(f"Selection {judgement.selection.folder}")
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>'
    page = f"{head}<body><h1>{title}</h1>{body}</body></html>\n"
    replace_file(path, page.encode())
    return path


def contact_sheet(judgement: Judgement, pictures: int) -> bytes | None:
    """PNG: per class its best and its last selected images, ``pictures`` of each; the least precise classes where that is known. None without rows."""
    selection, columns = judgement.selection, judgement.columns
    classes = _classes_to_show(judgement)
    if not classes:
        return None
    place = selection.info["pool"]
    source = open_source(place["path"], place["split"])
    width = LEFT + 2 * pictures * TILE + TILE // 2
    sheet = Image.new("RGB", (width, len(classes) * TILE + 4), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    try:
        for line, c in enumerate(classes):
            mine = np.flatnonzero(columns["cls"] == c)
            best, last = mine[:pictures], mine[max(pictures, len(mine) - pictures) :]
            _draw_text(pen, line, selection.classes[c], len(mine), judgement.precision_C, c)
            for at, rows in ((LEFT, best), (LEFT + pictures * TILE + TILE // 2, last)):
                if len(rows) == 0:
                    continue
                raw = read_rows(source, columns["image_id"][rows].astype(np.int64))
                for column, row in enumerate(rows.tolist()):
                    h, w = raw.extent_B2[column].tolist()
                    picture = raw.pixels_BHWC[column, :h, :w].cpu().numpy()
                    _draw_tile(sheet, pen, picture, at + column * TILE, line * TILE + 2, _colour(judgement, row))
    finally:
        source.close()
    return _png_bytes(sheet)


def _classes_to_show(judgement: Judgement) -> list[int]:
    present = np.flatnonzero(np.bincount(judgement.columns["cls"], minlength=len(judgement.selection.classes)))
    if len(present) <= SHOWN_CLASSES:
        return present.tolist()
    if judgement.precision_C is not None:
        return np.sort(present[np.argsort(judgement.precision_C[present], kind="stable")[:SHOWN_CLASSES]]).tolist()
    return present[np.linspace(0, len(present) - 1, SHOWN_CLASSES).astype(int)].tolist()


def _draw_text(pen: ImageDraw.ImageDraw, line: int, name: str, rows: int, precision_C: np.ndarray | None, c: int) -> None:
    pen.text((6, line * TILE + 18), name[:22], fill=(20, 20, 20))
    judged = "" if precision_C is None or np.isnan(precision_C[c]) else f", {precision_C[c]:.1f} %"
    pen.text((6, line * TILE + 34), f"{rows} rows{judged}", fill=(110, 110, 110))


def _colour(judgement: Judgement, row: int) -> tuple[int, int, int]:
    if judgement.right_N is None or judgement.known_N is None or not judgement.known_N[row]:
        return UNKNOWN
    return RIGHT if judgement.right_N[row] else WRONG


def _draw_tile(sheet: Image.Image, pen: ImageDraw.ImageDraw, pixels: np.ndarray, x: int, y: int, colour: tuple[int, int, int]) -> None:
    side = TILE - 2 * EDGE - 2
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).convert("RGB")
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    pen.rectangle((x, y, x + TILE - 3, y + TILE - 3), fill=colour)
    sheet.paste(picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR), (x + EDGE, y + EDGE))


def _figures(judgement: Judgement) -> list[tuple[Figure, str]]:
    out = []
    if judgement.curve is not None:
        figure, axes = _panel("Precision of lists cut to k rows", "k", "precision (%)")
        axes.semilogx(judgement.curve.k, judgement.curve.all, label="all rows")
        axes.semilogx(judgement.curve.k, judgement.curve.classes, "--", label="mean over classes")
        axes.legend(frameon=False)
        out.append((figure, "precision against k"))
    info = judgement.selection.info
    figure, axes = _panel("Rows per class, from most to least", "class rank", "rows")
    axes.step(np.arange(1, len(info["per_class"]) + 1), sorted(info["per_class"], reverse=True), where="mid")
    axes.set_ylim(bottom=0)
    out.append((figure, "rows per class"))
    figure, axes = _panel("Scores", "log-odds", "rows")
    score, right, known = judgement.columns["score"], judgement.right_N, judgement.known_N
    if right is not None and known is not None:
        axes.hist(
            [score[known & right], score[known & ~right]], bins=60, stacked=True, label=["selected, right", "selected, wrong"], color=["#00825f", "#d55e00"]
        )
    else:
        axes.hist(score, bins=60, label="selected")
    if judgement.histogram is not None:
        middles, first = coarse(judgement.histogram["first"])
        inside = first > 0
        axes.plot(middles[inside], first[inside], color="#555555", lw=1, label="log: best class of each image")
        axes.set_yscale("log")
    axes.legend(frameon=False)
    out.append((figure, "score histogram"))
    return out


def _panel(title: str, xlabel: str, ylabel: str):
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _table(judgement: Judgement) -> str:
    """Per class: rows, lowest score, precision; the 30 with the lowest precision (else the fewest rows) where there are more."""
    info, columns = judgement.selection.info, judgement.columns
    counts = np.asarray(info["per_class"])
    lowest = np.full(len(counts), np.nan)
    lowest[columns["cls"]] = columns["score"]  # rows of a class come best first: the last one stays
    key = counts if judgement.precision_C is None else np.nan_to_num(judgement.precision_C, nan=np.inf)
    shown = np.arange(len(counts)) if len(counts) <= 30 else np.sort(np.argsort(key, kind="stable")[:30])
    precision = judgement.precision_C if judgement.precision_C is not None else np.full(len(counts), np.nan)
    rows = [
        (info["classes"][c], str(counts[c]), _number(lowest[c], "{:.2f}"), _number(1 / (1 + np.exp(-lowest[c])), "{:.4f}"), _number(precision[c], "{:.2f}"))
        for c in shown
    ]
    return _html_table(("class", "rows", "lowest score", "as probability", "precision (%)"), rows)


def _number(value: float, form: str) -> str:
    return "-" if np.isnan(value) else form.format(value)


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(f'<th>{escape(h)}</th>' for h in head)}</tr></thead><tbody>{cells}</tbody></table>"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _image(png: bytes, label: str) -> str:
    return f'<figure><img alt="{escape(label, quote=True)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
