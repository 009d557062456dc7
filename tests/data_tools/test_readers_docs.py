"""The pages on sources say every kind and option that there is, and their commands do what they say."""

import re
import shlex
from pathlib import Path

import pytest

from data_tools.cli import build_parser, main
from data_tools.readers import READERS
from data_tools.readers.torchvision_sets import KNOWN
from data_tools.verbs.split import with_action
from fastssl.sources import load_manifest
from fastssl.sources.manifest import load_split
from tests.data_tools.layouts import jpeg, put

DOCS = Path(__file__).parents[2] / "docs" / "data"


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.kind)
def test_every_kind_and_option_is_described(reader):
    text = (DOCS / "sources.md").read_text()
    assert f"`{reader.kind}`" in text
    line = next(line for line in text.splitlines() if f"| `{reader.kind}`" in line or f"Kind `{reader.kind}`" in line)
    if reader.kind == "torchvision":
        assert all(name in text for name in KNOWN) and "root=FOLDER" in text and "download=yes" in text
    elif "| the same |" not in line:
        for option in reader.options:
            assert re.search(rf"[`(;, ]{option}=", line), option


def commands(page):
    return [shlex.split(line) for line in re.findall(r"^ +(fastssl-data .*)$", (DOCS / page).read_text(), re.M) if "[--" not in line]


def test_commands_of_the_sources_page_are_understood():
    parser = build_parser()
    kinds = {reader.kind for reader in READERS}
    for words in commands("sources.md"):
        args = parser.parse_args(words[1:])
        options = dict(pair.split("=") for pair in args.option)
        known = {option for reader in READERS for option in reader.options}
        assert set(options) <= known and args.kind in kinds | {"auto"}


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_every_command_on_every_page_is_one_that_there_is(page):
    for words in commands(page):
        if not any(word.startswith("[") or word == "..." for word in words):
            assert build_parser().parse_args(with_action(words[1:])).verb == words[1]


def test_the_guide_for_your_own_dataset_works_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(30):
        put(tmp_path / "photos" / ("train", "train", "test")[i % 3] / ("cat", "dog")[i % 2] / f"{i}.jpg", jpeg(i, 40, 50))
    for i in range(3):
        put(tmp_path / "photos" / "unlabeled" / f"{i}.jpg", jpeg(90 + i))
    found = commands("your-own-dataset.md")
    assert [words[1] for words in found] == ["convert", "verify", "inspect", "split"]
    for words in found:
        assert main([*words[1:], *(["--no-ffcv"] if words[1] == "verify" else [])]) == 0
    manifest = load_manifest(tmp_path / "data" / "photos")
    split = load_split(manifest, "four")
    assert len(split.labeled) == 8 and len(split.unlabeled) == 15 and manifest.split("train").unlabeled == 3
    assert (tmp_path / "photos.png").is_file()
    assert len((DOCS / "your-own-dataset.md").read_text().splitlines()) <= 50  # one screen
