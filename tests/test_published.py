"""Published numbers: against a second transcription by hand, against each other, and through the command line."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from fastssl import cli
from fastssl.errors import RecipeError
from fastssl.published import PUBLISHED_ONLY, by_recipe, load_published, of_table, table_names
from fastssl.recipe import load_recipe
from fastssl.recipe_list import recipe_paths, runnables
from fastssl.recipe_proof import check_recipe, prove

ROOT = Path(__file__).resolve().parent.parent / "recipes"
ROWS = load_published(ROOT)
CELLS = {(row.table, row.method, row.setting): row for row in ROWS}

# Written down a second time, from the sources, not from the file.
BY_HAND = """
tllib_supervised | ERM | cars | 37.1
tllib_supervised | Pseudo Label | caltech101 | 85.1
tllib_supervised | Pi Model | aircraft | 26.7
tllib_supervised | Mean Teacher | cifar10 | 78.1
tllib_supervised | UDA | dtd | 49.7
tllib_supervised | FixMatch | cifar10 | 74.5
tllib_supervised | Self Tuning | cub200 | 60.5
tllib_supervised | FlexMatch | sun397 | 50.2
tllib_supervised | DebiasMatch | dtd | 54.2
tllib_supervised | DST | cifar100 | 67.8
tllib_supervised | Oracle | flowers102 | 98.1
tllib_moco_v2 | ERM | pets | 65.4
tllib_moco_v2 | Self Tuning | food101 | 34.0
tllib_moco_v2 | DST | cars | 72.0
tllib_moco_v2 | Oracle | cifar10 | 98.2
simmatch_imagenet | SimMatch | 1 % | 67.2
simmatch_imagenet | ShrinkMatch | 10 % | 74.5
simmatch_imagenet | SimMatchV2 | 1 % | 71.9
simmatch_imagenet_top5 | SimMatch | 10 % | 91.65
simmatch_imagenet_top5 | SimMatchV2 | 1 % | 89.98
shrinkmatch_small | ShrinkMatch | CIFAR-10 250 | 95.26
shrinkmatch_small | SimMatch | CIFAR-100 400 | 62.19
shrinkmatch_stl_svhn | ShrinkMatch | SVHN 40 | 97.49
simmatch_cifar100 | SimMatch | 10000 | 79.42
longtail_cifar10_gamma150 | SimPro | middle | 82.6 +- 0.38
longtail_cifar10_gamma150 | DASO | uniform | 83.1 +- 0.47
longtail_cifar10_gamma100 | ACR_d | reversed | 85.2 +- 0.12
longtail_cifar10_gamma100 | FixMatch | uniform | 73.0 +- 3.81
longtail_cifar100 | SimPro | uniform | 52.2 +- 0.16
longtail_cifar100 | CReST+ | reversed | 32.4 +- 0.08
longtail_stl10 | ACR | gamma 20 | 81.5 +- 0.25
longtail_imagenet127 | SimPro | 64 x 64 | 63.8
longtail_imagenet127_own_test | CoSSL | 32 x 32 | 43.7
longtail_imagenet1k | ACR_d | 64 x 64 | 23.4
acr_paper | ACR | gamma 100, uniform | 92.1
fixmatch_paper | FixMatch | CIFAR-100 2500 | 28.29 +- 0.11
fixmatch_paper | FixMatch | SVHN 40 | 3.96 +- 2.17
torchssl | FlexMatch | STL-10 40 | 72.13 +- 4.58
torchssl | UDA | SVHN 250 | 98.08 +- 0.05
torchssl | Mean Teacher | CIFAR-10 4000 | 91.9 +- 0.21
supervised | ResNet-50 | CIFAR-100 | 76.36
"""


@pytest.mark.parametrize("line", BY_HAND.strip().splitlines())
def test_numbers_agree_with_a_second_transcription(line):
    table, method, setting, number = (part.strip() for part in line.split(" | "))
    assert CELLS[table, method, setting].number == number


def test_no_cell_is_there_twice_and_every_row_names_its_source():
    assert len(CELLS) == len(ROWS)
    assert all(row.source and row.metric.endswith("%") and (row.deviation is None or 0 <= row.deviation < 15) for row in ROWS)


@pytest.mark.parametrize("table", ["tllib_supervised", "tllib_moco_v2"])
def test_averages_are_those_of_the_eleven_cells(table):
    for method in {row.method for row in of_table(ROWS, table)}:
        cells = [row.value for row in of_table(ROWS, table) if row.method == method]
        assert len(cells) == 12 and CELLS[table, method, "average"].value == pytest.approx(statistics.fmean(cells[:11]), abs=0.0501), method


@pytest.mark.parametrize(("table", "seeds"), [("shrinkmatch_small", 5), ("shrinkmatch_stl_svhn", 3)])
def test_means_are_those_of_the_seeds(table, seeds):
    for row in of_table(ROWS, table):
        if row.method == "ShrinkMatch":
            each = [CELLS[table, f"ShrinkMatch, seed {s}", row.setting].value for s in range(seeds)]
            assert row.value == pytest.approx(statistics.fmean(each), abs=0.0051), row.setting


def test_every_recipe_of_a_row_exists_and_no_two_settings_share_one():
    names = {runnable.name for runnable in runnables(recipe_paths(ROOT))}
    assert {row.recipe for row in ROWS if row.recipe} <= names
    for recipe, rows in by_recipe(ROWS).items():
        for table in {row.table for row in rows}:
            assert len({row.setting for row in rows if row.table == table}) == 1, f"{recipe} stands for two settings of {table}"


def test_the_recipe_of_a_cell_is_that_of_its_setting():
    assert CELLS["tllib_moco_v2", "Self Tuning", "cub200"].command == "fastssl train tllib/self_tuning@cub200_moco_v2"
    assert CELLS["longtail_cifar10_gamma100", "SimPro", "reversed"].command == "fastssl train simpro/cifar10@exp=7"
    assert CELLS["longtail_imagenet1k", "ACR", "64 x 64"].command == "fastssl train acr/imagenet1k@exp=1"
    seed = CELLS["shrinkmatch_small", "ShrinkMatch, seed 3", "CIFAR-100 2500"]
    assert seed.command == "fastssl train simmatch/shrinkmatch_cifar@cifar100_2500 seed=3 data.split=simmatch_2500_seed3"
    assert CELLS["shrinkmatch_small", "ShrinkMatch, seed 0", "CIFAR-100 2500"].overrides == ()


def test_what_nobody_specified_is_published_only():
    for table, methods in {
        "longtail_cifar10_gamma150": ("FixMatch", "CReST+", "DASO"),
        "longtail_imagenet127": ("FixMatch",),
        "longtail_imagenet127_own_test": ("FixMatch", "DARP", "CReST+", "CoSSL", "ACR", "SimPro"),
        "torchssl": ("FullySupervised", "Pi model", "Mean Teacher", "VAT", "MixMatch", "ReMixMatch"),
    }.items():
        assert {row.method for row in of_table(ROWS, table) if row.command == PUBLISHED_ONLY} == set(methods)
    assert [row.setting for row in of_table(ROWS, "tllib_supervised") if row.command == PUBLISHED_ONLY] == ["average"] * 11


TABLE = """\
tables:
  t:
    title: T
    source: S
    metric: top-1 accuracy, %
    columns: {a: one, b: ''}
    rows:
      - {method: M, values: [1.5, 2]}
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("values: [1.5, 2]", "values: [1.5]", "has 1 values and 2 recipes for 2 columns"),
        ("values: [1.5, 2]", "values: [1.5, x]", "'x' must be a number"),
        ("values: [1.5, 2]", "values: [1.5, 200]", "must be in percent"),
        ("values: [1.5, 2]", "values: [1.5, 2], recipe: r, recipes: [r, r]", "keep one"),
        ("values:", "valus:", "unknown key 'valus' .did you mean 'values'"),
        ("    source: S\n", "", "source is missing"),
        ("tables:", "table:", "it holds one key"),
        ("- {method: M, values: [1.5, 2]}", "- 3", "must be a mapping"),
    ],
)
def test_faults_of_the_file_are_named(tmp_path, old, new, words):
    (tmp_path / "published.yaml").write_text(TABLE.replace(old, new))
    with pytest.raises(RecipeError, match=words):
        load_published(tmp_path)


def test_rows_of_a_small_file(tmp_path):
    (tmp_path / "published.yaml").write_text(TABLE.replace("values: [1.5, 2]", 'recipe: f/r, values: ["1.5 +- 0.25", null]'))
    (row,) = load_published(tmp_path)
    assert (row.value, row.deviation, row.number, row.recipe, row.setting) == (1.5, 0.25, "1.5 +- 0.25", "f/r@one", "a")
    assert load_published(tmp_path / "nowhere") == [] and table_names([row]) == ["t"]
    with pytest.raises(RecipeError, match="did you mean 't'"):
        of_table([row], "tt")


# --- through the command line ---------------------------------------------------------------------------------------------------------------------------


def broken(folder: Path) -> Path:
    """A folder with one good recipe, and one fault of each kind."""
    good = "# Measured: 9 %, runs/x\ntitle: Good\nmethod: {name: fixmatch}\nmodel: {name: small_cnn, options: {width: 4}}\n"
    (folder / "good.yaml").write_text(good)
    files = {
        "policy": good + "augment: {weak: fixmatch_weaker}\n",
        "network": good.replace("small_cnn", "small_cn"),
        "law": good + "data: {labeled_law: shufle}\n",
        "pattern": good + "optim: {no_decay: [nothing_like_it]}\n",
        "method": good.replace("name: fixmatch", "name: fixmatch, treshold: 0.5"),
        "slot": good.replace("name: fixmatch", "name: simmatchv2, crops: [32, 16]"),
        "hidden": good + "variants:\n  _unused: {seed: 3}\n  a: {seed: 4}\n  b: {seed: -1}\n",
    }
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    rows = "      - {method: M, recipes: [good, bad], values: [1.5, 2]}\n"
    (folder / "published.yaml").write_text(TABLE.replace("      - {method: M, values: [1.5, 2]}\n", rows))
    return folder


def test_check_finds_every_fault_and_nothing_else(tmp_path, capsys):
    broken(tmp_path)
    assert cli.main(["recipes", str(tmp_path), "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    found = {line.partition(": ")[0]: line for line in lines[:-1]}
    assert len(found) == len(lines) - 1 == 9 and lines[-1] == "8 recipes, 9 with their variants, 2 published numbers: 9 faults"
    for name, words in {
        "policy": "did you mean 'fixmatch_weak'", "network": "did you mean 'small_cnn'", "law": "did you mean 'shuffle'", "pattern": "nothing_like_it",
        "method": "did you mean 'threshold'", "slot": "crop_32", "hidden": "'_unused'", "hidden@b": "seed", "t, M, b": "'bad', which does not exist",
    }.items():  # fmt: skip
        assert words in found[name], found[name]


def test_check_of_one_of_the_recipes_that_ship(capsys):
    assert cli.main(["recipes", "simpro/cifar10", "--check"]) == 0
    assert capsys.readouterr().out == "1 recipes, 20 with their variants, 0 published numbers: all good\n"


def test_all_recipes_that_ship_can_be_trained():
    assert list(prove(recipe_paths(ROOT), ROWS)) == []


def test_the_proof_builds_equal_networks_once():
    built: set[str] = set()
    for name in ("tllib/erm@cifar10_supervised", "tllib/uda@cars_supervised", "tllib/erm@cifar10_scratch"):
        check_recipe(load_recipe(name), built)
    assert len(built) == 2, "the last one has no pattern for the backbone's rate"


def test_listing_of_published_numbers(capsys):
    assert cli.main(["recipes", "--published", "fixmatch_paper"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["table", "method", "setting", "published", "metric", "measured", "command", "source"] and len(lines) == 10
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert cells[1][:7] == ["fixmatch_paper", "FixMatch", "CIFAR-10 250", "5.07 +- 0.65", "error rate, %", "none yet", "fastssl train cifar10/fixmatch_250"]
    assert cli.main(["recipes", "--published"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS) + 1
    assert cli.main(["recipes", "--published", "fixmatch_papr"]) == 2
    assert "did you mean 'fixmatch_paper'" in capsys.readouterr().err


def test_listing_of_variants_and_of_recipes(capsys, tmp_path):
    assert cli.main(["recipes", "tllib/dst"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 33 and any("tllib/dst@cifar100_supervised" in line and "67.8 (DST, accuracy, %)" in line for line in lines)
    assert sum("no published figure" in line for line in lines) == 11, "the variants from scratch are ours"
    assert cli.main(["recipes", "acr"]) == 0 and len(capsys.readouterr().out.splitlines()) == 1 + 37, "a folder: all variants in it, and nothing of acr_d"
    assert cli.main(["recipes", "acr/cifar10", "--published"]) == 0 and len(capsys.readouterr().out.splitlines()) == 1 + 4
    assert cli.main(["recipes"]) == 0
    assert "DST on 4 labels per class, ResNet-50 (33 variants)" in capsys.readouterr().out
    assert cli.main(["recipes", str(broken(tmp_path)), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (good,) = [r for r in content["recipes"] if r["name"] == "good"]
    assert (good["measured"], good["command"], good["published"][0]["value"]) == ("9 %, runs/x", "fastssl train good", 1.5)
    assert [row["command"] for row in content["published"]] == ["fastssl train good", "fastssl train bad"] and content["published"][0][
        "measured"
    ] == "9 %, runs/x"


def test_json_of_one_table(capsys):
    assert cli.main(["recipes", "--published", "supervised", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in content["recipes"]] == ["supervised/resnet50_cifar100"] and content["published"][0]["value"] == 76.36


def test_a_result_of_one_variant_stands_in_the_header(tmp_path):
    text = "# Measured: none yet\n# Measured @a: 91.2 % top-1, runs/x\nmethod: {name: erm}\nvariants: {a: {seed: 1}, b: {seed: 2}}\n"
    (tmp_path / "r.yaml").write_text(text)
    (entry,) = recipe_paths(tmp_path)
    assert [r.measured for r in entry.runnables] == ["91.2 % top-1, runs/x", ""] and entry.measured == "none yet"
    (tmp_path / "r.yaml").write_text(text.replace("@a", "@c"))
    with pytest.raises(RecipeError, match="'c', which is none of its variants: a, b"):
        recipe_paths(tmp_path)
