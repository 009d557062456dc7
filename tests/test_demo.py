"""The demo's judgement: what it compares, what it prints, and when its exit status says no. Training itself is tested elsewhere."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "recipes" / "demo" / "run.py"


@pytest.fixture
def demo():
    spec = importlib.util.spec_from_file_location("demo_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_run"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo_run"]


def finished_run(folder: Path, seed: int, top1: float, status: str = "finished") -> Path:
    folder.mkdir(parents=True)
    cells = {"last": {"step": 8, "top1": top1}, "best": {"step": 4, "top1": top1 + 1}}
    raw = {"last": {"step": 8, "top1": top1 - 2}, "best": {"step": 4, "top1": top1 - 1}}
    speed = {"images_per_s": 100.0 + seed, "data_wait_share": 0.01, "train_wall_s": 2.0}
    summary = {"status": status, "seed": seed, "steps": 8, "eval": {"ema": cells, "raw": raw}, **speed}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_means_and_deviations_over_seeds(demo, tmp_path, capsys):
    folders = {"erm": [finished_run(tmp_path / f"erm{s}", s, top1) for s, top1 in ((1, 70.0), (2, 72.0), (3, 74.0))]}
    row = demo.compare(folders)["erm"]
    assert (row["accuracy_mean"], row["accuracy_std"], row["accuracy_per_seed"]) == (72.0, 2.0, [70.0, 72.0, 74.0])
    assert (row["ema_best_mean"], row["raw_last_mean"], row["raw_best_mean"]) == (73.0, 70.0, 71.0)
    assert (row["seeds"], row["steps"], row["images_per_s"]) == ([1, 2, 3], 8, 102.0)
    demo.print_table({"erm": row}, 12.0)
    assert "72.00 ± 2.00" in capsys.readouterr().out


def test_one_seed_has_no_deviation(demo, tmp_path, capsys):
    row = demo.compare({"erm": [finished_run(tmp_path / "a", 1, 70.0)]})["erm"]
    assert row["accuracy_std"] is None
    demo.print_table({"erm": row}, 1.0)
    assert "±" not in capsys.readouterr().out


def test_an_unfinished_run_ends_the_demo(demo, tmp_path):
    with pytest.raises(SystemExit, match="not finished"):
        demo.compare({"erm": [finished_run(tmp_path / "a", 1, 70.0, status="failed")]})


def test_a_failing_stage_ends_the_demo_with_its_status(demo):
    with pytest.raises(SystemExit) as stopped:
        demo.call("sh", "-c", "exit 3")
    assert stopped.value.code == 3


@pytest.mark.parametrize(("fixmatch", "quick", "status"), [(80.0, False, 0), (70.0, False, 1), (60.0, False, 1), (60.0, True, 0)])
def test_exit_status_says_whether_fixmatch_won(demo, tmp_path, monkeypatch, fixmatch, quick, status):
    folders = {"erm": [finished_run(tmp_path / "e", 1, 70.0)], "fixmatch": [finished_run(tmp_path / "f", 1, fixmatch)]}
    called = []
    monkeypatch.setattr(demo, "prepare_data", lambda data: None)
    monkeypatch.setattr(demo, "fastssl", lambda *words: called.append(words))
    monkeypatch.setattr(demo, "train_all", lambda *a: folders)
    monkeypatch.setattr("sys.argv", ["run.py", "--cpu", "--runs", str(tmp_path / "runs"), *(["--quick"] if quick else [])])
    assert demo.main() == status
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert summary["methods"]["fixmatch"]["accuracy_mean"] == fixmatch and summary["quick"] is quick
    assert [words[0] for words in called] == ["doctor", "views", "views", "report"]
