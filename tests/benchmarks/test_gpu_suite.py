"""The GPU suite without a GPU: parts that resume, rows that fail and are named, honest verdicts; and, slow, a walk through all of it."""

import json
import os

import pytest
import torch

from benchmarks import gpu_capture, gpu_common, gpu_kernels, gpu_suite, gpu_table
from benchmarks.gpu_common import Settings, ceiling, seconds, share
from benchmarks.gpu_step import covered
from fastssl.engine.capture import WARM
from tests.helpers import ROOT, run_python

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path):
    for name in ("scratch", "results"):
        (tmp_path / name).mkdir()
    return Settings(True, CPU, tmp_path / "scratch", tmp_path / "none", tmp_path / "results")


def fake_part(monkeypatch, items):
    monkeypatch.setattr(gpu_suite.importlib, "import_module", lambda name: type("Part", (), {"items": staticmethod(lambda settings: items)}))


def test_a_part_writes_each_item_at_once_and_goes_on_where_it_stopped(settings, monkeypatch):
    done = []

    def item(name, fails=()):
        def run():
            done.append(name)
            if name in fails:
                raise RuntimeError(f"{name} broke\nin many lines")
            written = gpu_table.rows_of(settings.results, "kernels")
            return {"seconds": 1.0, "before": sorted(written)}

        return run

    failing = ["b"]
    fake_part(monkeypatch, {name: item(name, failing) for name in "abc"})
    rows, left = gpu_suite.run_part("kernels", settings, minutes=9, again=False)
    assert done == ["a", "b", "c"] and left == []
    assert rows["c"]["before"] == ["a", "b"], "what is measured is on the disk before the next item starts"
    assert rows["b"]["error"] == "RuntimeError: b broke" and gpu_table.verdict(rows["b"]).startswith("FAILED")
    failing.clear()
    rows, left = gpu_suite.run_part("kernels", settings, minutes=9, again=False)
    assert done == ["a", "b", "c", "b"] and "error" not in rows["b"] and list(rows) == ["a", "b", "c"]
    gpu_suite.run_part("kernels", settings, minutes=9, again=True, only="c")
    assert done[4:] == ["c"]


def test_a_part_whose_time_is_up_says_what_is_left(settings, monkeypatch):
    fake_part(monkeypatch, {"a": dict, "b": dict})
    rows, left = gpu_suite.run_part("step", settings, minutes=0, again=False)
    assert rows == {} and left == ["a", "b"]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["fixmatch", "simmatch", "erm"])
def test_equality_of_a_method(settings, method):
    row = gpu_capture.equality(settings, method)
    assert row["equal"] and row["num_different"] == 0 and row["tensors"] > 20 and row["updates"] == WARM + 2
    assert row["host_waits"] is None, "a CPU cannot be asked"


def test_inequality_is_seen(settings, monkeypatch):
    class Off(gpu_capture.CapturedUpdate):
        def __call__(self, raw, step):
            loss = super().__call__(raw, step)
            self.updater.train_module.network.classifier.weight.data.mul_(1.01)
            return loss

    monkeypatch.setattr(gpu_capture, "CapturedUpdate", Off)
    row = gpu_capture.equality(settings, "fixmatch")
    assert not row["equal"] and row["num_different"] > 5 and len(row["different"]) == 8 and gpu_table.verdict(row).startswith("NOT EQUAL")
    assert gpu_capture.apart(torch.ones(2), torch.tensor([1.0, float("nan")])) == float("inf")


def test_an_update_that_waits_is_no_success():
    assert gpu_table.verdict({"equal": False, "host_waits": "called a synchronizing operation"}).startswith("THE HOST WAITS")


@pytest.mark.parametrize("name", ["pseudo_label_ce soft 6 x 37", "consistency kl 6 x 37", "instance_matching 4 x 70 of 16", "sgd_ema"])
def test_kernels_equal_their_references(settings, name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    row = gpu_kernels.items(settings)[name]()
    assert row["equal"] and row["seconds"] > 0 and row["bytes"] > 0
    assert row["largest_difference"] > 0 or row.get("largest_gradient_difference", 1) >= 0


def test_a_wrong_kernel_is_not_equal(settings, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    case = gpu_kernels.consistent(settings, 4, 5, "ce")
    turns = iter(range(100))
    wrong = gpu_kernels.Case(case.inputs, lambda *given: (case.call(*given)[0] * (1 + next(turns)),), 0, 1.0, 1e-2)
    assert not gpu_kernels.measure(settings, wrong)["equal"]


def test_shares_and_ceilings(settings):
    assert ceiling(settings, "copy") is None and share(1.0, 1.0, None) is None
    (settings.results / "machine.json").write_text(json.dumps({"rows": {"copy": {"per_s": 100.0}}}))
    assert share(50.0, 2.0, ceiling(settings, "copy")) == 0.25


def test_busy_time_is_the_union_of_what_ran():
    assert covered([]) is None
    assert covered([(0, 4), (1, 2), (3, 6), (8, 10)]) == pytest.approx(0.8)


def test_seconds_of_a_call():
    calls = []
    assert seconds(lambda: calls.append(1), CPU, dry=True) >= 0 and len(calls) == 1
    assert seconds(lambda: calls.append(1), CPU, rounds=2, span_s=0.001) > 0 and len(calls) > 6


def test_the_table_and_the_plot(tmp_path):
    parts = {"kernels": {"a": {"seconds": 0.002, "bandwidth_share": 0.5, "equal": True}, "b": {"error": "no"}}, "step": {"c": {"seconds": 0.1}}}
    said = gpu_table.table(parts, dry=True)
    assert "DRY RUN" in said and "equal" in said and "FAILED: no" in said and " 2 " in said and " 50 " in said
    assert gpu_table.plot(parts, tmp_path / "plot.png", dry=True).stat().st_size > 1000


def test_synthetic_data_is_made_once(tmp_path):
    made = gpu_common.synthetic(tmp_path / "data", classes=3, rows=12, size=8, labeled=6)
    stamp = os.stat(made / "dataset.json").st_mtime_ns
    assert os.stat(gpu_common.synthetic(tmp_path / "data", classes=3, rows=12, size=8, labeled=6) / "dataset.json").st_mtime_ns == stamp


@pytest.mark.slow
def test_the_dry_run_walks_all_of_it(tmp_path):
    done = run_python(str(ROOT / "benchmarks" / "gpu_suite.py"), "--dry-run", "--out", str(tmp_path), timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for part in gpu_suite.PARTS:
        found = json.loads((tmp_path / f"{part}.json").read_text())
        assert found["finished"] and found["dry_run"] and found["rows"], part
    assert (tmp_path / "gpu_suite.png").stat().st_size > 10_000 and "DRY RUN" in done.stdout
