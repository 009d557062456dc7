"""A tiny dataset folder and tiny recipes, for tests that run whole parts end to end in seconds."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.recipe import dump_yaml, recipe_from_dict
from fastssl.schema import Recipe
from fastssl.sources.manifest import split_digest

STRONG: list[Any] = [{"flip": {}}, {"pad_crop": {"pad": 1}}, {"randaugment": {"space": "mc", "n": 2, "p": 0.5}}, {"cutout": {"side": 4, "fill": 127}}]
"""A strong policy for 8 x 8 pixels: FixMatch's own cuts out 16 x 16, which would leave nothing to see."""

ROOT = Path(__file__).resolve().parent.parent

PATIENCE_S = 240.0
"""How long a process of its own may take before a test calls it hanging: a busy machine needs most of a minute only to import everything."""


def make_dataset(root: Path, *, classes: int = 4, train: int = 64, test: int = 22, size: int = 8, labeled: int = 8, validation: int = 12) -> Path:
    """An "arrays" dataset of easily told classes (one colour each, with noise) and a label split called "tiny"."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 215, size=(classes, 3))
    splits: dict[str, Any] = {}
    content = hashlib.sha256()
    for name, count in (("train", train), ("test", test)):
        labels = (np.arange(count) % classes).astype(np.int64)
        pixels = np.clip(colours[labels][:, None, None, :] + rng.normal(0, 40, size=(count, size, size, 3)), 0, 255).astype(np.uint8)
        np.save(root / f"{name}.pixels.npy", pixels)
        np.save(root / f"{name}.labels.npy", labels)
        content.update(pixels.tobytes() + labels.tobytes())
        splits[name] = {
            "count": count,
            "class_counts": np.bincount(labels, minlength=classes).tolist(),
            "max_height": size,
            "max_width": size,
            "files": {"pixels": f"{name}.pixels.npy", "labels": f"{name}.labels.npy"},
            "labels": f"{name}.labels.npy",
        }
        if name == "train":
            mean, std = (pixels / 255.0).mean((0, 1, 2)), (pixels / 255.0).std((0, 1, 2))
    manifest = {
        "format_version": 1,
        "format": "arrays",
        "name": "tiny",
        "classes": [f"class{k}" for k in range(classes)],
        "channels": 3,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "splits": splits,
        "source": {"kind": "test", "digest": ""},
        "options": {},
        "digest": content.hexdigest(),
    }
    (root / "dataset.json").write_text(json.dumps(manifest))
    rows = np.arange(train)
    write_split(root, "tiny", rows[:labeled], rows[labeled : train - validation], rows[train - validation :])
    return root


def write_split(root: Path, name: str, labeled: Any, unlabeled: Any, validation: Any) -> Path:
    """A label split file with these rows."""
    parts = [[int(r) for r in rows] for rows in (labeled, unlabeled, validation)]
    digest = json.loads((root / "dataset.json").read_text())["digest"]
    split = {
        "format_version": 1,
        "name": name,
        "law": "test",
        "seed": 0,
        "dataset": "tiny",
        "dataset_digest": digest,
        "of": "train",
        **dict(zip(("labeled", "unlabeled", "validation"), parts, strict=True)),
        "digest": split_digest("train", "", *parts),
    }
    path = root / "splits" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(split))
    return path


def tiny_recipe(data: Path, runs: Path, *overrides: str, method: str = "fixmatch") -> Recipe:
    """A recipe that trains a very small CNN for a few updates on :func:`make_dataset`; ``overrides`` as on the command line."""
    values = {
        "name": "tiny",
        "runs_dir": str(runs),
        "method": {"name": method, **({"threshold": 0.4} if method == "fixmatch" else {})},
        "data": {"path": str(data), "split": "tiny", "labeled_batch": 4, "unlabeled_batch": 8, "workers": 1},
        "augment": {"size": 8, "strong": STRONG},
        "model": {"name": "small_cnn", "options": {"width": 4, "layers": 2}},
        "teacher": {"momentum": 0.9},
        "train": {"steps": 12, "steps_per_epoch": 5, "threads": 1},
        "eval": {"batch": 10},
        "checkpoint": {"every": 4},
        "log": {"every": 3, "trackers": []},
    }
    return recipe_from_dict(values, list(overrides))


def write_recipe(path: Path, recipe: Recipe) -> Path:
    path.write_text(dump_yaml(recipe))
    return path


def metric_lines(run: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines without what depends on the clock on the wall."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines]


def run_python(*arguments: str, timeout: float = PATIENCE_S, env: dict[str, str] | None = None, wait: bool = True, own_group: bool = False) -> Any:
    """``python ARGUMENTS`` in the project's root with one thread; the finished process, or with ``wait=False`` the running one."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    command = [sys.executable, *arguments]
    if not wait:
        return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=own_group)
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout)


def signal_at_first_checkpoint(process: subprocess.Popen[str], runs: Path, signum: int) -> tuple[Path, str]:
    """Send ``signum`` to a training process as soon as its first checkpoint is there; returns (run folder, output) after its end."""
    deadline = time.monotonic() + PATIENCE_S
    found: list[Path] = []
    output = ""
    try:
        while not found and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
            found = list(runs.glob("*/*/checkpoints/last"))
        if found:
            process.send_signal(signum)
            output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            process.kill()
    assert found, f"no checkpoint appeared: {output or process.communicate()[0]}"
    return found[0].parent.parent, output
