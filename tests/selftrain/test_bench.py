"""The benchmark's engines select the same scores, on a log small enough for a test."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_select", ROOT / "benchmarks" / "bench_select.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_select"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_select"]


def test_every_engine_selects_the_same(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "UNIT", 300)
    log = bench.make_log(tmp_path / "log", 1000, 20)
    found = {}
    for name in (*bench.OURS, *bench.PEERS):
        if name in ("polars", "pandas"):
            pytest.importorskip(name)
        found[name] = bench.phase(name, log, 7, 1000)
        assert found[name]["seconds"] > 0
    results = {name: f["result"] for name, f in found.items() if "result" in f}
    assert len(set(results.values())) == 1 and len(results) == 7
    assert {f["selected"] for f in found.values() if "selected" in f} == {140}
    assert found["filter"]["passed"] >= 140


def test_the_extrapolation_is_arithmetic(bench):
    lines = bench.on_paper({"histogram": {"rows_per_s": 1e7}}, 1000)
    assert "68 GB" in lines[0] and "13.9 h" in lines[0] and len(lines) == 2
    assert "0.28 h" in lines[1] and "2.0 %" in lines[1] and "0.28 GB" in lines[1] and "0.60 GB" in lines[1]
