"""Rules and selections: the paper's semantics, the variants, and what a student sees of a selection."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.engine.assemble import build_streams, build_task, open_data
from fastssl.errors import DataError, FastSSLError
from fastssl.selftrain.duck import check_with_duckdb, open_log
from fastssl.selftrain.judge import judge
from fastssl.selftrain.log import Part
from fastssl.selftrain.pages import contact_sheet, write_page
from fastssl.selftrain.ranking import hash64
from fastssl.selftrain.rules import Rule, apply_rule, automatic_k, log_odds, rule_from
from fastssl.selftrain.select import rank, read_excluded, select
from fastssl.sources.selection import load_selection
from tests.helpers import make_dataset, tiny_recipe
from tests.selftrain.parts import CLASSES, fill, make_log, scores_of

NAMES = [f"class{c}" for c in range(CLASSES)]


def parts_of(rows, p, pieces=3):
    def parts():
        for some in np.array_split(np.arange(rows), pieces):
            cls, score = scores_of(some, p)
            yield Part(some.astype(np.uint64), cls, score)

    return parts


def plain(rows, p, k_C, seed, score_floor=-math.inf, floor=0):
    """The paper's rule in plain Python: P classes per image first, then each class's images by score, then its first k."""
    cls, score = scores_of(np.arange(rows), p)
    hashes = hash64(np.arange(rows, dtype=np.uint64), seed).tolist()
    out = []
    for c in range(CLASSES):
        have = sorted((-score[i, j], hashes[i], i) for i in range(rows) for j in range(p) if cls[i, j] == c)[: k_C[c]]
        out += [(c, r, -s, i) for r, (s, _, i) in enumerate(have) if -s >= score_floor or r < floor]
    return out


def listed(ranked):
    return list(zip(ranked.cls_N.tolist(), ranked.rank_N.tolist(), ranked.score_N.tolist(), ranked.id_N.tolist(), strict=True))


@pytest.mark.parametrize("method", ["table", "histogram", "auto"])
@pytest.mark.parametrize("p", [1, 3, CLASSES])
@pytest.mark.parametrize("k", [4, 1000])
def test_ranking_is_the_papers_rule(method, p, k):
    lists = rank(parts_of(60, CLASSES), NAMES, 60, Rule(k=k, p=p, seed=2), method=method)
    assert listed(lists.ranked) == plain(60, p, [k] * CLASSES, 2) and lists.images == 60


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(0, 8), st.sampled_from([0.0, 0.3, 0.9]), st.integers(0, 4), st.integers(0, 6), st.integers(1, 5))
def test_caps_threshold_and_floor(rows, k, probability, floor, cap, p):
    rule = Rule(k=k or 7, p=p, min_probability=probability, floor=floor, caps={"class1": cap, "3": 2})
    k_C = rule.rows_per_class(NAMES, rows)
    assert k_C.tolist() == [k or 7, cap, k or 7, 2, k or 7]
    lists = rank(parts_of(rows, CLASSES), NAMES, rows, rule)
    chosen = apply_rule(rule, lists.ranked, k_C)
    assert listed(chosen.ranked) == plain(rows, p, k_C, 0, np.float32(log_odds(probability)), floor)
    assert (chosen.copies_N == 1).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 3))
def test_rare_classes_are_repeated_up_to_k(rows, k, seed):
    rule = Rule(k=k, p=2, seed=seed, fill="duplicate")
    lists = rank(parts_of(rows, CLASSES), NAMES, rows, rule)
    chosen = apply_rule(rule, lists.ranked, lists.k_C)
    assert listed(chosen.ranked) == plain(rows, 2, [k] * CLASSES, seed), "the rows themselves are the same"
    for c in range(CLASSES):
        copies = chosen.copies_N[chosen.ranked.cls_N == c]
        if len(copies):
            assert copies.sum() == k and copies.max() - copies.min() <= 1, "all as often as possible alike"


def test_one_list_over_all_classes_is_unbalanced():
    rule = Rule(k=4, p=3, over="all")
    for method in ("table", "histogram"):
        ranked = rank(parts_of(40, CLASSES), NAMES, 40, rule, method=method).ranked
        every = sorted((row for row in plain(40, 3, [1000] * CLASSES, 0)), key=lambda row: -row[2])
        assert len(ranked) == 4 * CLASSES and sorted(ranked.score_N.tolist(), reverse=True) == [row[2] for row in every[: 4 * CLASSES]]
        assert (np.diff(ranked.cls_N) >= 0).all() and len(set(zip(ranked.cls_N.tolist(), ranked.id_N.tolist(), strict=True))) == 20
    assert len(set(ranked.counts(CLASSES).tolist())) > 1


def test_automatic_k_is_the_papers_ratio():
    assert automatic_k(1000, 100_000_000) == 16_000 and automatic_k(1000, 25_000_000) == 4_000
    for classes, pool in ((10, 46_000), (100, 40_000), (21_841, 1_000_000)):
        assert classes * automatic_k(classes, pool) <= 0.2 * pool
    assert automatic_k(10, 1) == 1


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"k": -1}, "select.k = -1"),
        ({"k": 1.5}, "whole number"),
        ({"min_probability": 1.0}, "min_probability"),
        ({"fill": "dup"}, "one of none, duplicate"),
        ({"over": "all", "floor": 2}, "leave them out"),
        ({"kk": 1}, "did you mean 'k'"),
        ({"caps": {"a": -1}}, "caps"),
    ],
)
def test_rules_that_mean_nothing(values, why):
    with pytest.raises(DataError, match=why):
        rule_from(values)


def test_caps_of_unknown_classes():
    with pytest.raises(DataError, match="no class 'clas1' \\(did you mean 'class1'"):
        Rule(k=1, caps={"clas1": 2}).rows_per_class(NAMES, 10)


# --- on disk ----------------------------------------------------------------------------------------------------------------------


def test_short_and_empty_classes_are_reported(tmp_path):
    log = make_log(tmp_path / "log", rows=4, unit_rows=3, p=1)
    for unit in log.units:
        rows = log.rows(unit)
        log.commit(unit, Part(rows.astype(np.uint64), np.full((len(rows), 1), 2, np.uint16), np.ones((len(rows), 1), np.float32)), [])
    info = select(log, Rule(k=3), tmp_path / "out").info
    assert info["per_class"] == [0, 0, 3, 0, 0] and info["short_classes"] == {f"class{c}": 0 for c in (0, 1, 3, 4)}
    info = select(log, Rule(k=30), tmp_path / "all").info
    assert info["short_classes"]["class2"] == 4 and info["rows"] == info["images"] == 4


def test_rows_and_images_are_both_counted(tmp_path):
    made = select(fill(make_log(tmp_path / "log")), Rule(k=100), tmp_path / "out")
    found = made.columns()
    assert made.info["rows"] == 47 * 3 and made.info["images"] == 47 and (found["n_lists"] == 3).all()
    assert made.info["examples"] == len(made.rows_and_labels()[0]) == 47 * 3


def test_excluded_rows_never_enter(tmp_path):
    (tmp_path / "rows.txt").write_text("3\n7\n11\n")
    np.save(tmp_path / "rows.npy", np.array([3, 7, 11]))
    excluded = read_excluded(tmp_path / "rows.txt")
    assert (excluded == read_excluded(tmp_path / "rows.npy")).all()
    log = fill(make_log(tmp_path / "log"))
    made = select(log, Rule(k=100), tmp_path / "out", excluded=excluded)
    assert made.info["images"] == 44 and not np.isin([3, 7, 11], made.columns("image_id")["image_id"]).any()
    assert "same" in check_with_duckdb(log, made, Rule(k=100), excluded)
    (tmp_path / "rows.txt").write_text("three")
    with pytest.raises(DataError, match="one row of the pool per line"):
        read_excluded(tmp_path / "rows.txt")


def test_the_same_selection_is_not_made_twice_and_another_is_refused(tmp_path):
    log = fill(make_log(tmp_path / "log"))
    first = select(log, Rule(k=5), tmp_path / "out")
    assert select(log, Rule(k=5), tmp_path / "out").digest == first.digest
    with pytest.raises(DataError, match="another selection"):
        select(log, Rule(k=6), tmp_path / "out")
    with pytest.raises(DataError, match="p = 4, but the log has 3"):
        select(log, Rule(k=6, p=4), tmp_path / "more")
    assert not (tmp_path / "more").exists() and [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_a_damaged_selection_is_an_error(tmp_path):
    made = select(fill(make_log(tmp_path / "log")), Rule(k=5), tmp_path / "out")
    file = tmp_path / "out" / made.info["files"][0]["name"]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="is damaged"):
        load_selection(tmp_path / "out").columns()
    text = (tmp_path / "out" / "selection.json").read_text()
    (tmp_path / "out" / "selection.json").write_text(text.replace('"rows": 25', '"rows": 26'))
    with pytest.raises(DataError, match="not what was written"):
        load_selection(tmp_path / "out")
    with pytest.raises(DataError, match="no selection"):
        load_selection(tmp_path)


def test_large_selections_are_split_between_classes(tmp_path, monkeypatch):
    from fastssl.selftrain import select as module

    whole = select(fill(make_log(tmp_path / "log")), Rule(k=5), tmp_path / "one").columns()
    monkeypatch.setattr(module, "FILE_ROWS", 11)
    made = select(fill(make_log(tmp_path / "log2")), Rule(k=5), tmp_path / "many")
    assert [(f["first_class"], f["last_class"], f["rows"]) for f in made.info["files"]] == [(0, 1, 10), (2, 3, 10), (4, 4, 5)]
    assert all((made.columns()[name] == whole[name]).all() for name in whole)


def test_duckdb_reads_the_log_and_agrees(tmp_path):
    log = fill(make_log(tmp_path / "log"))
    assert open_log(log).sql("select count(*), count(distinct image_id), max(place) from log").fetchall() == [(141, 47, 3)]
    for number, rule in enumerate((Rule(k=4, seed=5), Rule(k=100, p=2), Rule(k=9, min_probability=0.9, floor=2, caps={"class0": 1}))):
        made = select(log, rule, tmp_path / f"out{number}")
        assert f"same {made.info['rows']} rows" in check_with_duckdb(log, made, rule)
    with pytest.raises(DataError, match="DuckDB selects other rows"):
        check_with_duckdb(log, load_selection(tmp_path / "out0"), Rule(k=4, seed=6))


# --- as a dataset view ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("pool") / "data")


def selection_of(dataset, folder, k=4, fill="none", p=2):
    """A selection from all rows of the tiny dataset by made-up scores: right for even rows."""
    from fastssl.selftrain.log import Log

    manifest = json.loads((dataset / "dataset.json").read_text())
    count, labels = manifest["splits"]["train"]["count"], np.load(dataset / "train.labels.npy")
    identity = {
        "teacher": {"weights_sha256": "w"},
        "classes": manifest["classes"],
        "pool": {"dataset_digest": manifest["digest"]},
        "rows": {"kind": "all", "count": count, "digest": None},
        "unit_rows": 10,
        "p": p,
    }
    log = Log.create(folder / "log", identity, {"pool": {"path": str(dataset), "split": "train", "rows": "all", "label_split": ""}}, None)
    for unit in log.missing():
        rows = log.rows(unit)
        guess = (labels[rows] + (rows // 4) % 2) % 4
        cls = np.stack([guess, (guess + 1) % 4], 1)[:, :p].astype(np.uint16)
        score = np.stack([-(rows % 13) / 4.0, np.full(len(rows), -9.0)], 1)[:, :p].astype(np.float32)
        log.commit(unit, Part(rows.astype(np.uint64), cls, score), [])
    return select(log, Rule(k=k, fill=fill), folder / "sel"), log


def test_a_student_sees_rows_with_their_lists_labels(dataset, tmp_path):
    made, _ = selection_of(dataset, tmp_path, k=40, fill="duplicate")
    recipe = tiny_recipe(dataset, tmp_path, f"data.selection={tmp_path / 'sel'}", method="erm")
    data = open_data(recipe, torch.device("cpu"))
    task, (stream,) = build_task(recipe, data), build_streams(recipe, data, unlabeled=False)
    found = made.columns()
    assert task.num_labeled == len(stream.rows_N) == made.info["examples"] == 160 and task.labeled_class_counts == (40,) * 4
    assert (stream.rows_N == np.repeat(found["image_id"], found["copies"])).all() and (stream.labels_N == np.repeat(found["cls"], found["copies"])).all()
    assert (stream.truth_N == np.load(dataset / "train.labels.npy")[stream.rows_N]).all() and (stream.truth_N != stream.labels_N).any()
    assert stream.source is data.source
    plain_digest = open_data(tiny_recipe(dataset, tmp_path, method="erm"), torch.device("cpu")).split.digest
    assert data.split.digest != plain_digest, "a checkpoint notices another selection"
    data.close()


def test_a_selection_may_be_the_unlabeled_stream(dataset, tmp_path):
    made, _ = selection_of(dataset, tmp_path, k=5)
    recipe = tiny_recipe(dataset, tmp_path, f"data.selection={tmp_path / 'sel'}", "data.selection_as=unlabeled")
    data = open_data(recipe, torch.device("cpu"))
    task, (labeled, unlabeled) = build_task(recipe, data), build_streams(recipe, data, unlabeled=True)
    assert task.num_labeled == len(labeled.rows_N) == 8 and task.num_unlabeled == len(unlabeled.rows_N) == made.info["examples"]
    assert (unlabeled.labels_N == -1).all() and (unlabeled.rows_N == made.rows_and_labels()[0]).all()
    assert unlabeled.is_labeled_N.tolist() == np.isin(unlabeled.rows_N, data.split.labeled).tolist()


def test_a_pool_of_its_own_feeds_the_student(dataset, tmp_path):
    other = make_dataset(tmp_path / "pool", train=40, size=12)
    selection_of(other, tmp_path, k=3)
    recipe = tiny_recipe(dataset, tmp_path, f"data.selection={tmp_path / 'sel'}", method="erm")
    data = open_data(recipe, torch.device("cpu"))
    (stream,) = build_streams(recipe, data, unlabeled=False)
    assert stream.source is not data.source and stream.source.canvas == (12, 12, 3) and len(stream.rows_N) == 12
    data.close()
    with pytest.raises(DataError, match="closed"):
        stream.source.fill(np.array([0]), None)


def test_selections_that_do_not_fit_are_refused(dataset, tmp_path):
    selection_of(dataset, tmp_path)
    grown = make_dataset(tmp_path / "more", classes=5)
    with pytest.raises(FastSSLError, match="other classes"):
        open_data(tiny_recipe(grown, tmp_path, f"data.selection={tmp_path / 'sel'}", method="erm"), torch.device("cpu"))
    info = json.loads((dataset / "dataset.json").read_text())
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "dataset.json").write_text(json.dumps({**info, "digest": "0"}))
    made = load_selection(tmp_path / "sel")
    made.info["pool"]["path"] = str(moved)
    with pytest.raises(DataError, match="not the data"):
        made.pool()


def test_precision_is_counted_against_hidden_truth(dataset, tmp_path):
    made, log = selection_of(dataset, tmp_path, k=10, p=1)
    found, truth = made.columns(), np.load(dataset / "train.labels.npy")
    right = truth[found["image_id"].astype(int)] == found["cls"]
    judged = judge(tmp_path / "sel")
    assert judged.precision() == pytest.approx(100 * right.mean()) and 20 < judged.precision() < 90
    assert judged.precision_C.tolist() == pytest.approx([100 * right[found["cls"] == c].mean() for c in range(4)])
    for k, rows, value in zip(judged.curve.k, judged.curve.rows, judged.curve.all, strict=True):
        inside = found["rank"] < k
        assert rows == inside.sum() and value == pytest.approx(100 * right[inside].mean())
    beyond = judge(tmp_path / "sel", log=log.folder)
    assert beyond.curve.k[-1] > judged.curve.k[-1] and beyond.histogram["first"].sum() == 64
    assert beyond.curve.all[beyond.curve.k.index(3)] == pytest.approx(judged.curve.all[judged.curve.k.index(3)])
    page = write_page(beyond).read_text()
    assert page.count("data:image/png;base64,") == 4 and "precision" in page and "http" not in page
    assert contact_sheet(judged, 3).startswith(b"\x89PNG")


def test_without_truth_there_is_no_precision(dataset, tmp_path):
    made, _ = selection_of(dataset, tmp_path)
    judged = judge(tmp_path / "sel")
    judged.right_N = judged.known_N = judged.precision_C = judged.curve = None
    assert judged.precision() is None and len(judged.lines()) == 1 and "precision" not in " ".join(judged.lines())
    assert "orange" in write_page(judged, tmp_path / "page.html").read_text()
