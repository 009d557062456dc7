"""``inspect``: facts, bars, sheets and the page, for every format."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.convert import convert
from data_tools.histogram import bars
from data_tools.inspection import draw_sheet, facts
from data_tools.split import make_split
from fastssl.errors import DataError
from tests.data_tools.collections import photo_folders


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    raw = photo_folders(tmp_path_factory.mktemp("inspect") / "raw", classes=("<b>cat<b>", "dög", "鳥"))
    return {form: convert(raw, raw.parent / form, format=form, name="pets & <co>") for form in ("arrays", "ffcv", "dali")}


@pytest.mark.parametrize("format", ["arrays", "ffcv", "dali"])
def test_facts_bars_sheet_and_page_of_every_format(photos, tmp_path, capsys, format):
    data = str(photos[format])
    make_split(data, "one", law="balanced", per_class=1, seed=0)
    assert main(["inspect", data, "--sheet", str(tmp_path / "s.png"), "--html", str(tmp_path / "new" / "p.html"), "--per-class", "3"]) == 0
    out = capsys.readouterr().out
    assert f"format        {format}" in out and "3 labelled, 9 unlabelled" in out and "train: images per class" in out and "test: images per class" in out
    assert sum("█" * 40 in line for line in out.splitlines()) == 6
    assert Image.open(tmp_path / "s.png").size == (120 + 3 * 66, 3 * 66)
    assert (tmp_path / "new" / "p.html").stat().st_size > 2000


def test_all_formats_show_the_same_images(photos):
    arrays, ffcv, dali = (np.asarray(draw_sheet(photos[form], per_class=4)).astype(int) for form in ("arrays", "ffcv", "dali"))
    assert np.array_equal(ffcv, dali) and np.abs(arrays - ffcv).max() <= 4  # the sizes of the canvas differ, not the pictures


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tags, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_takes_names_as_text(photos, tmp_path):
    make_split(photos["ffcv"], "one", law="balanced", per_class=1, seed=0)
    (photos["ffcv"] / "splits" / "bad.txt").write_text("no split")
    assert main(["inspect", str(photos["ffcv"]), "--html", str(tmp_path / "p.html"), "--per-class", "2"]) == 0
    (photos["ffcv"] / "splits" / "bad.txt").unlink()
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and len(page.addresses) == 2 and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "<b>cat<b>" in page.text and "b" not in page.tags and "dög" in page.text and "鳥" in page.text and "pets & <co>" in page.text
    assert "label split one" in page.text and "unusable:" in page.text and not re.search(r"<script|@import|url\(", text)
    sheet = Image.open(io.BytesIO(base64.b64decode(page.addresses[0].partition(",")[2])))
    assert sheet.size == (120 + 2 * 66, 3 * 66)
    assert text.count("width:100.00%") == 9  # three classes in train, in test and among the labelled


def test_rows_of_another_split_are_not_shown_as_labelled(photos):
    make_split(photos["ffcv"], "one", law="balanced", per_class=1, seed=0)
    with pytest.raises(DataError, match="rows of 'train', not of 'test'"):
        draw_sheet(photos["ffcv"], split="test", label_split="one")


def test_images_without_a_class_have_a_line_of_their_own(photos, monkeypatch):
    import data_tools.inspection

    labels = np.array([0, 0, 1, -1, 2, -1, -1, 2, 0, 1, 2, 2])
    monkeypatch.setattr(data_tools.inspection, "load_labels", lambda manifest, split: labels)
    pixels = np.asarray(draw_sheet(photos["arrays"], per_class=4))
    assert pixels.shape[0] == 4 * 66
    filled = [(pixels[3 * 66 : 3 * 66 + 64, 120 + 66 * i : 184 + 66 * i] != 255).any() for i in range(4)]
    assert filled == [True, True, True, False]


def test_facts_name_source_and_options(photos):
    found = dict(facts(photos["ffcv"]))
    assert "class_folders" in found["source"] and "format=ffcv" in found["options"]


def test_bars():
    assert bars(["a", "bb"], [4, 2], width=8) == ["a  4 ████████", "bb 2 ████"]
    assert bars(["a", "b", "c"], [1600, 1, 0], width=10) == ["a 1600 ██████████", "b    1 ▏", "c    0 "]
    assert bars([], []) == []
    many = bars([str(i) for i in range(1000)], np.arange(1000)[::-1] + 1, width=10)
    assert len(many) == 20 and many[0].startswith("classes 1-50 by size:") and "951..1000" in many[0] and many[-1].split(":")[1].split()[0] == "1..50"
    assert bars([str(i) for i in range(41)], [5] * 41, width=2)[0].split(":")[1].split() == ["5", "██"]
