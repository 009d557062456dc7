"""The page: one file, no outside references, every run and every number of the summaries, and no crash on poor folders."""

from __future__ import annotations

import json
import re
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fastssl.errors import DataError
from fastssl.report import write_report
from fastssl.report.figures import mean_curve
from fastssl.report.runs import group_runs, read_run, read_runs
from fastssl.report.tables import typed
from tests.report.fake_runs import write_run

VOID = {"meta", "img", "br", "path", "use", "link", "input", "hr", "circle", "rect", "image", "line"}


class Page(HTMLParser):
    """What tests ask of a page: tags with attributes, table rows, balanced tags, text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.rows: dict[str, dict[str, dict]] = {}
        self.words: list[str] = []
        self._row: dict | None = None
        self._cell: dict | None = None
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"unclosed {self._open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self._row = self.rows.setdefault(attrs.get("data-run") or attrs.get("data-group") or "", {})
        if tag == "td" and "data-key" in attrs and self._row is not None:
            self._cell = self._row[attrs["data-key"]] = {"value": attrs["data-value"], "std": attrs.get("data-std"), "text": ""}

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-3:]}"
        self._open.pop()
        if tag == "td":
            self._cell = None

    def handle_data(self, data):
        self.words.append(data)
        if self._cell is not None:
            self._cell["text"] += data

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def plots(self) -> list[str]:
        return [a["data-plot"] for t, a in self.tags if t == "figure" and "data-plot" in a]

    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.tags if "id" in a]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    made = [
        write_run(root / m / f"20260101-00000{s}-abcdef", m, s, steps=4096, views=(m == "fixmatch" and s == 1))
        for m in ("fixmatch", "simmatch")
        for s in (1, 2)
    ]
    return root, [*made, write_run(root / "erm" / "20260101-000001-abcdef", "erm", 1, steps=4096, confusion=False)]


@pytest.fixture(scope="module")
def page(folders):
    root, _ = folders
    before = {p for p in root.rglob("*")}
    out = write_report(root)
    assert out == root / "report.html" and {p for p in root.rglob("*")} - before == {out}, "one file, nothing beside it"
    return Page(out.read_text(encoding="utf-8")), out.read_text(encoding="utf-8")


def test_nothing_is_loaded_from_anywhere(page):
    parsed, text = page
    for tag, attrs in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert re.match(r"(#|data:image/png;base64,|$)", attrs.get(name) or ""), (tag, name, attrs[name][:60])
    assert not re.search(r"https?://|@import", text)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_references_inside_the_page_exist_and_ids_are_unique(page):
    parsed, text = page
    ids = parsed.ids()
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)", text)) | {a["href"][1:] for _, a in parsed.tags if (a.get("href") or "").startswith("#")}
    assert used <= set(ids)


def test_every_run_is_there_with_the_numbers_of_its_summary(page, folders):
    parsed, _ = page
    for folder in folders[1]:
        summary, row = json.loads((folder / "summary.json").read_text()), parsed.rows[str(folder)]
        for which in ("ema", "raw"):
            for when in ("last", "best"):
                value = summary["eval"][which][when]["top1"]
                assert float(row[f"eval.{which}.{when}.top1"]["value"]) == value
                assert row[f"eval.{which}.{when}.top1"]["text"] == f"{value:.2f}"
        assert row["images_per_s"]["text"] == f"{summary['images_per_s']:,.0f}"
        assert row["data_wait_share"]["text"] == f"{summary['data_wait_share']:.1%}"
        assert float(row["train_wall_s"]["value"]) == summary["train_wall_s"]
        assert f"{summary['method']}, seed {summary['seed']}" in parsed.text


def test_means_and_deviations_of_repeated_methods(page, folders):
    parsed, _ = page
    values = [json.loads((f / "summary.json").read_text())["eval"]["ema"]["last"]["top1"] for f in folders[1][:2]]
    cell = parsed.rows["fixmatch"]["mean:eval.ema.last.top1"]
    assert float(cell["value"]) == pytest.approx(statistics.mean(values)) and float(cell["std"]) == pytest.approx(statistics.stdev(values))
    assert cell["text"] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert "erm" not in parsed.rows, "one run has no mean"


def test_curves_exist_for_every_run_and_mean(page):
    parsed, text = page
    wanted = {"curve-steps", "curve-wall", "loss", "sup_loss", "unsup_loss", "util-ratio", "pseudo-acc", "per-class", "time-split", "rate", "confusion-1"}
    assert wanted <= set(parsed.plots())
    ids = set(parsed.ids())
    for plot in ("curve-steps", "curve-wall", "loss"):  # groups in order of folder names: erm, fixmatch, simmatch
        assert {f"{plot}-run-0-0", f"{plot}-run-1-0", f"{plot}-run-1-1", f"{plot}-run-2-0", f"{plot}-run-2-1", f"{plot}-mean-1", f"{plot}-mean-2"} <= ids
        assert f"{plot}-mean-0" not in ids
    assert "pseudo-acc-run-1-0" in ids and "pseudo-acc-run-0-0" not in ids, "erm has no pseudo-labels"
    line = re.search(r'<g id="curve-steps-run-1-0">\s*<path d="([^"]*)"[^>]*style="[^"]*var\(--m1\)', text)
    assert line and line[1].count("L") >= 3, "four evaluations, three segments"


def test_a_drawn_curve_has_the_shape_of_its_metric(page, folders):
    """The heights in the SVG are an affine image of the metric: same values, same order."""
    _, text = page
    path = re.search(r'<g id="loss-run-0-0">\s*<path d="([^"]*)"', text)[1]
    points = np.array([[float(v) for v in pair] for pair in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)])
    step, _, loss = read_run(folders[1][4]).series("train", "train/loss")
    fit = np.polyfit(step, points[: len(step), 0], 1)
    assert len(points) == len(step) and np.abs(np.polyval(fit, step) - points[:, 0]).max() < 0.01
    fit = np.polyfit(loss, points[:, 1], 1)
    assert fit[0] < 0 and np.abs(np.polyval(fit, loss) - points[:, 1]).max() < 0.01


def test_settings_show_only_what_differs(page):
    parsed, _ = page
    keys = [a["data-setting"] for t, a in parsed.tags if "data-setting" in a]
    assert {"seed", "method.name", "data.split", "method.threshold"} <= set(keys)
    assert not {"optim.lr", "train.steps", "data.labeled_batch"} & set(keys)


def test_environment_commands_and_view_sheet(page, folders):
    parsed, text = page
    assert "python -m fastssl train recipes/simmatch.yaml seed=2" in parsed.text
    assert "gpu.name" in parsed.text and "Test GPU" in parsed.text
    assert text.count("data:image/png;base64,") == 1


@pytest.mark.parametrize(
    "argv, line",
    [
        (["/opt/x/fastssl/__main__.py", "train", "a b.yaml"], "python -m fastssl train 'a b.yaml'"),
        (["/usr/bin/fastssl", "train", "r.yaml"], "fastssl train r.yaml"),
        ("torchrun -m fastssl", "torchrun -m fastssl"),
    ],
)
def test_commands_read_as_one_types_them(argv, line):
    assert typed(argv) == line


def test_colours_follow_light_and_dark(page):
    _, text = page
    assert "prefers-color-scheme:dark" in text and "var(--m2)" in text
    assert not re.search(r"#0a0b0|#01020[345]", text), "a placeholder colour was left"


def test_single_run_goes_into_its_folder_with_title_and_extras(tmp_path):
    run = write_run(tmp_path / "run", steps=2048)
    sheet = tmp_path / "strong.png"
    Image.new("RGB", (8, 8), "red").save(sheet)
    out = write_report(run, title="A <b>bold</b> title", extra_sections=[("Notes & more", "<p>as it is</p>")], views=[sheet])
    assert out == run / "report.html"
    parsed = Page(out.read_text())
    assert "A <b>bold</b> title" in parsed.text and "Notes & more" in parsed.text and "as it is" in parsed.text
    assert "strong" in parsed.text and not any(k.startswith("mean:") for row in parsed.rows.values() for k in row)
    sheet.write_text("not a picture")
    with pytest.raises(DataError, match="is not a PNG"):
        write_report(run, views=[sheet])


def test_poor_folders_still_make_a_page(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 0, "kind": "train", "train/loss": NaN}\n'
        '{"step": 2, "epoch": 0, "kind": "train", "train/loss": 1.5}\n'
        '{"step": 2, "epoch": 0, "kind": "eval", "eval/top1": 11.0, "eval/per_class": [1, null, 3]}\n{"step": 3, "kin'
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "summary.json").write_text('{"status": "failed", "error": "loss <is> not finite at step 7", "method": "fixmatch", "seed": 4, "eval": null}')
    (broken / "config.yaml").write_text("a: [1\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "summary.json").write_text("{}")
    out = write_report([bare, broken, empty], tmp_path / "deep" / "page.html")
    parsed = Page(out.read_text())
    assert {str(bare), str(broken), str(empty)} <= set(parsed.rows)
    assert "loss <is> not finite at step 7" in parsed.text and "1 unreadable line skipped" in parsed.text and "config.yaml: unreadable" in parsed.text
    assert "loss" in parsed.plots() and "curve-steps" in parsed.plots() and "per-class" in parsed.plots()


def test_a_run_without_summary_is_scored_from_its_metrics(tmp_path):
    run = write_run(tmp_path / "run", steps=4096)
    want = json.loads((run / "summary.json").read_text())["eval"]
    (run / "summary.json").unlink()
    read = read_run(run)
    for which in ("raw", "ema"):
        assert read.score(which, "last") == want[which]["last"]["top1"] and read.score(which, "best") == want[which]["best"]["top1"]


def test_unfinished_runs_do_not_enter_the_mean(tmp_path):
    good = write_run(tmp_path / "a", seed=1, steps=4096)
    cut = write_run(tmp_path / "b", seed=2, steps=4096, done=1024, status="interrupted")
    parsed = Page(write_report([good, cut], tmp_path / "r.html").read_text())
    mean = parsed.rows["fixmatch"]["mean:eval.ema.last.top1"]
    assert float(mean["value"]) == json.loads((good / "summary.json").read_text())["eval"]["ema"]["last"]["top1"] and mean["std"] == "None"
    assert "mean of 1 finished" in parsed.text and "interrupted" in parsed.text


def test_same_method_with_other_settings_is_another_group(tmp_path):
    paths = [write_run(tmp_path / f"{k}", seed=1 + k % 2, steps=1024, options={"threshold": 0.95 if k < 2 else 0.8}) for k in range(4)]
    groups = group_runs(read_runs(paths))
    assert [(g.label, len(g.runs)) for g in groups] == [("fixmatch · threshold=0.95", 2), ("fixmatch · threshold=0.8", 2)]


def test_many_classes_become_sorted_curves_with_the_worst_named(tmp_path):
    run = write_run(tmp_path / "run", steps=1024, classes=100)
    text = write_report(run).read_text()
    assert "The ten worst classes" in text and 'data-plot="per-class"' in text and "100 classes" in text


def test_mean_of_curves_covers_only_the_common_range():
    a = (np.array([0.0, 10, 20, 30]), np.array([0.0, 10, 20, 30]))
    b = (np.array([5.0, 15, 25]), np.array([7.0, 17, 27]))
    x, y = mean_curve([a, b])
    assert x.tolist() == [5, 10, 15, 20, 25] and y.tolist() == [6, 11, 16, 21, 26]
    assert len(mean_curve([a, (np.array([40.0]), np.array([1.0]))])[0]) == 0


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no run folder at"):
        write_report(tmp_path / "nothing")
    with pytest.raises(DataError, match="is not a run folder and holds none"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="at least one"):
        write_report([])
