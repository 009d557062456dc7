"""The replay of every recorded file, and proofs that the replay fails when it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.golden.handlers import handler_for, handlers
from tests.golden.recorder import deviation
from tests.golden.replay import HERE, NOT_CHECKED, excused, main, replay
from tests.methods import reference

FILES = sorted(HERE.glob("*.npz"))
SMALL = ["erm_c10_s101", "fixmatch_c10_s101", "simmatch_fixmatch_eman_a", "lr_schedule_s1", "simmatch_schedules_a"]


def load(stem: str) -> dict[str, np.ndarray]:
    with np.load(HERE / f"{stem}.npz") as file:
        return {name: file[name] for name in file.files}


def save(folder: Path, stem: str, arrays: dict[str, np.ndarray]) -> Path:
    path = folder / f"{stem}.npz"
    np.savez(path, **arrays)
    return path


def perturbed(array: np.ndarray) -> np.ndarray:
    """One entry changed: by 0.1 % for real numbers, 0 <-> 1 for masks, by 1 for integers, one letter for text."""
    array = array.copy()
    if array.dtype.kind == "U":
        array.flat[0] = "?" + str(array.flat[0])[1:]
    elif array.dtype.kind == "b":
        array.flat[0] = not array.flat[0]
    elif array.dtype.kind == "f":
        where = int(np.argmax(np.abs(np.nan_to_num(array))))
        array.flat[where] = 1 - array.flat[where] if np.isin(array, (0, 1)).all() else array.flat[where] * 1.001
    else:
        array.flat[0] += 1
    return array


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recorded_file_is_reproduced(path):
    result = replay(path)
    assert result.ok, result.line()


@pytest.mark.parametrize("stem", SMALL)
def test_and_in_float32(stem):
    result = replay(HERE / f"{stem}.npz", kernels=True)
    assert result.ok, result.line()


def test_the_files_of_the_methods_here_are_all_present():
    stems = {path.stem for path in FILES}
    assert {*SMALL, "erm_c25_s202", "fixmatch_c25_s202"} <= stems


@pytest.mark.parametrize("stem", SMALL)
def test_any_changed_output_fails(stem, tmp_path):
    arrays = load(stem)
    outputs = [c.name for c in replay(HERE / f"{stem}.npz").comparisons]
    assert outputs
    for name in outputs:
        result = replay(save(tmp_path, stem, arrays | {name: perturbed(arrays[name])}))
        assert not result.ok and any(fault.startswith(f"{name}:") for fault in result.faults), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_changed_output_of_every_file_fails(path, tmp_path):
    from tests.golden.recorder import Recorder

    recorder = Recorder.open(path)
    handler_for(path.stem)(recorder)
    comparison = recorder.comparisons[-1]
    array = recorder.arrays[comparison.name]
    # networks are compared at 1e-3 of the largest entry, so the change must be larger than that
    changed = array * 1.01 if array.dtype.kind == "f" and comparison.tolerance >= 1e-3 else perturbed(array)
    result = replay(save(tmp_path, path.stem, recorder.arrays | {comparison.name: changed}))
    assert any(fault.startswith(f"{comparison.name}:") for fault in result.faults), result.line()


INPUTS = ["y_l", "y_l_strong", "y_u_strong", "labels_l", "trade_off_cls_strong", "trade_off_self_training"]


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_and_hyper_parameters_are_really_used(name, tmp_path):
    arrays = load("fixmatch_c10_s101")
    changed = (arrays[name] + 1) % 10 if name == "labels_l" else arrays[name] * np.asarray(1.25, arrays[name].dtype)
    assert not replay(save(tmp_path, "fixmatch_c10_s101", arrays | {name: changed})).ok


def test_the_threshold_and_the_weak_view_are_really_used(tmp_path):
    arrays = load("fixmatch_c10_s101")
    for change in ({"threshold": np.array(0.0)}, {"y_u": arrays["y_u"][:, :, ::-1]}):
        result = replay(save(tmp_path, "fixmatch_c10_s101", arrays | change))
        assert any(fault.startswith("mask:") or fault.startswith("pseudo_labels:") for fault in result.faults), result.line()


# One file of each kind; without those whose numbers are sizes, counts of steps or a network's shape alone.
KINDS = [
    "acr_c25", "acr_d_c25", "acr_d_e2e_c10", "acr_e2e_c10", "debiasmatch_c25_s202", "dst_c25_s202", "dst_wce_c10_s101", "erm_c25_s202",
    "fixmatch_c25_s202", "flexmatch_c25_s202_warmup", "mean_teacher_c10_s101", "noisy_student_c10_s101", "pi_model_c25_s202",
    "pseudo_label_c25_s202", "self_tuning_c10_s101", "shrinkmatch_cifar_b", "shrinkmatch_imagenet_b", "shrinkmatch_stl10_a",
    "simmatch_fixmatch_eman_a", "simmatch_loss_b", "simmatchv2_loss_a", "simpro_c25", "simpro_e2e_c10", "uda_c10_s101",
]  # fmt: skip


@pytest.mark.parametrize("stem", KINDS)
def test_every_real_hyper_parameter_of_a_file_is_really_used(stem, tmp_path):
    """A handler that read a number without passing it on, or had a constant in its place, would not notice the change."""
    arrays = load(stem)
    real = [name for name, array in arrays.items() if array.ndim == 0 and array.dtype.kind == "f" and not name.startswith("s") and name != "hp_scale_ratio"]
    switches = [name for name in ("warmup", "hp.DA", "hp.use_da", "hp_est_epoch") if name in arrays and (stem, name) != ("simpro_e2e_c10", "hp_est_epoch")]
    assert real
    for name in [*real, *switches]:
        value = arrays[name] * 0.8 if name in real else np.array(1 - int(arrays[name] > 0))
        result = replay(save(tmp_path, stem, arrays | {name: value}))
        assert not all(c.ok for c in result.comparisons), f"{stem} passes with {name} = {value}"


@pytest.mark.parametrize("stem", ["simmatch_loss_b", "shrinkmatch_imagenet_b", "shrinkmatch_cifar_b", "simmatchv2_loss_b"])
def test_alignment_may_be_off_with_its_state_recorded_as_it_was(stem, tmp_path):
    arrays = load(stem) | {"hp.DA": np.array(0)}
    state = {name: np.zeros_like(array) for name, array in arrays.items() if "DA_queue_after" in name or "DA_ptr_after" in name}
    state |= {name: arrays["da0"] for name in arrays if name.endswith("da_after")}
    result = replay(save(tmp_path, stem, arrays | state))
    assert {c.name for c in result.comparisons if c.ok} >= state.keys() and state
    assert not any("neither read" in fault or "Error" in fault for fault in result.faults), result.line()


def test_divergences_are_compared_at_the_documented_absolute_error(tmp_path):
    arrays = load("acr_c10")
    where = np.unravel_index(np.argmin(np.where(arrays["count_KL"] > 0, arrays["count_KL"], np.inf)), arrays["count_KL"].shape)
    for error, passes in ((1.5e-6, True), (5e-6, False)):
        changed = arrays["count_KL"].copy()
        changed[where] += error
        assert replay(save(tmp_path, "acr_c10", arrays | {"count_KL": changed})).ok is passes


def test_an_unknown_kind_fails(tmp_path):
    result = replay(save(tmp_path, "mystery_c10", load("erm_c10_s101")))
    assert not result.ok and "no handler" in result.faults[0]


def test_an_array_that_nobody_looks_at_fails_unless_it_is_listed(tmp_path):
    arrays = load("erm_c10_s101")
    assert "cls_acc" in arrays and replay(save(tmp_path, "erm_c10_s101", arrays)).ok
    result = replay(save(tmp_path, "erm_c10_s101", arrays | {"extra": np.zeros(3)}))
    assert result.faults == ["extra: neither read nor compared"]
    result = replay(save(tmp_path, "fixmatch_c10_s101", load("fixmatch_c10_s101") | {"cls_acc": np.zeros(3)}))  # listed for another kind only
    assert result.faults == ["cls_acc: neither read nor compared"]


def test_every_exception_gives_a_reason():
    rows = [line for line in NOT_CHECKED.read_text().splitlines() if line.startswith("| `")]
    assert rows and all(len([cell for cell in row.strip("|").split("|") if cell.strip()]) == 3 for row in rows)
    assert excused("erm_anything") == ["cls_acc"]


@pytest.mark.parametrize("name", ["loss", "y_l", "grad_y_l"])
def test_a_missing_array_fails(name, tmp_path):
    arrays = load("erm_c10_s101")
    del arrays[name]
    assert not replay(save(tmp_path, "erm_c10_s101", arrays)).ok


def test_a_damaged_file_fails_and_the_others_still_run(tmp_path, capsys):
    (tmp_path / "erm_broken.npz").write_bytes(b"not a zip")
    save(tmp_path, "erm_c10_s101", load("erm_c10_s101"))
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "erm_broken.npz: 0 of 0 outputs" in lines and lines[-1] == "1 passed, 1 failed"
    assert any(line.startswith("erm_c10_s101.npz: 3 of 3 outputs, max relative deviation ") for line in lines)


def test_an_empty_folder_fails(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 0 failed"


def test_the_command_works_from_anywhere(tmp_path):
    save(tmp_path, "erm_c10_s101", load("erm_c10_s101"))
    done = subprocess.run([sys.executable, HERE / "replay.py", tmp_path, "--kernels"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 passed, 0 failed"


def test_the_longest_prefix_wins():
    known = handlers()
    assert handler_for("simmatch_fixmatch_eman_b") is known["simmatch_fixmatch_eman_"]
    assert handler_for("fixmatch_c3_s1") is known["fixmatch_"]
    assert handler_for("fixmatc") is None


def test_deviation():
    one = np.array([1.0, 100.0, 0.0])
    assert deviation(one, one) == 0 and deviation(np.array([np.nan]), np.array([np.nan])) == 0
    assert deviation(one * [1.01, 1, 1], one) == pytest.approx(0.01)
    assert deviation(one + [0, 0, 1e-3], one) == pytest.approx(1e-2)  # a zero is measured against a thousandth of the largest entry
    assert deviation(one + [0, 0, 1e-3], one, floor=0.1) == pytest.approx(1e-4)
    assert deviation(np.array([1e-30]), np.array([0.0])) == np.inf
    assert deviation(one[:2], one) == deviation(np.array([np.nan, 100, 0]), one) == deviation(np.array([np.inf, 100, 0]), one) == np.inf


# --- files made here, from another derivation, with other sizes, seeds and hyper-parameters -----------------------------------------------------------


def made_fixmatch(seed, steps, classes, labeled, unlabeled, threshold, weight, a_s, strict=True):
    """Inputs, and reference values step by step."""
    rng = np.random.default_rng(seed)
    rows = {"x": labeled, "x_s": labeled, "u_w": unlabeled, "u_s": unlabeled}
    for _ in range(steps):
        logits = {name: rng.normal(0, 4, (n, classes)).astype(np.float32).astype(np.float64) for name, n in rows.items()}
        labels = rng.integers(0, classes, labeled)
        yield logits, labels, reference.fixmatch(*logits.values(), labels, threshold=threshold, weight=weight, a_s=a_s, strict=strict)


@pytest.mark.parametrize("sizes", [(5, 2, 7, 3, 11, 0.6, 2.5, 0.3), (6, 5, 31, 12, 4, 0.85, 0.5, 0.1), (7, 1, 2, 1, 1, 0.9, 1.0, 1.0)])
def test_a_made_fixmatch_file_passes(sizes, tmp_path):
    _, _, _, _, _, threshold, weight, a_s = sizes
    columns = {"x": "y_l", "x_s": "y_l_strong", "u_w": "y_u", "u_s": "y_u_strong"}
    stacks: dict[str, list] = {}
    for logits, labels, want in made_fixmatch(*sizes):
        step = {columns[view]: array.astype(np.float32) for view, array in logits.items()}
        step |= {f"grad_{columns[view]}": want["grads"][view].astype(np.float32) for view in logits}
        step |= {"labels_l": labels, "labels_u": np.zeros(len(logits["u_w"]), np.int64)}
        step |= {"mask": want["mask"].astype(np.float32), "pseudo_labels": want["pseudo"]}
        step |= {name: np.float32(want[key]) for name, key in (("cls_loss", "sup"), ("self_training_loss", "unsup"), ("loss", "total"))}
        for name, value in step.items():
            stacks.setdefault(name, []).append(value)
    arrays = {name: np.stack(values) for name, values in stacks.items()}
    arrays |= {"threshold": np.array(threshold), "trade_off_self_training": np.array(weight), "trade_off_cls_strong": np.array(a_s)}
    result = replay(save(tmp_path, f"fixmatch_c{sizes[2]}_s{sizes[0]}", arrays))
    assert result.ok and len(result.comparisons) == 9, result.line()


@pytest.mark.parametrize("sizes", [(8, 4, 6, 5, 9, 0.8, 7.0), (9, 2, 17, 2, 3, 0.55, 0.25)])
def test_a_made_eman_file_passes(sizes, tmp_path):
    _, steps, classes, labeled, unlabeled, threshold, weight = sizes
    values = {"C": classes, "B_l": labeled, "B_u": unlabeled, "threshold": threshold, "lambda_u": weight, "steps": steps}
    arrays = {f"hp.{name}": np.array(value) for name, value in values.items()}
    for s, (logits, labels, want) in enumerate(made_fixmatch(*sizes, a_s=0.0, strict=False)):
        arrays |= {
            f"s{s}.in.logits_q": np.concatenate([logits["x"], logits["u_s"]]),
            f"s{s}.in.logits_u_w": logits["u_w"],
            f"s{s}.in.targets_x": labels,
            f"s{s}.pseudo_targets": want["pseudo"],
            f"s{s}.max_probs": want["confidence"],
            f"s{s}.mask": want["mask"],
            f"s{s}.loss_x": np.array(want["sup"]),
            f"s{s}.loss_u": np.array(want["unsup"] / weight),
            f"s{s}.loss": np.array(want["total"]),
            f"s{s}.grad.logits_q": np.concatenate([want["grads"]["x"], want["grads"]["u_s"]]),
        }
    path = save(tmp_path, "simmatch_fixmatch_eman_z", arrays)
    for kernels in (False, True):
        result = replay(path, kernels)
        assert result.ok and len(result.comparisons) == 7 * steps, result.line()


def test_a_made_schedule_file_passes(tmp_path):
    steps, lr, gamma, decay, epochs, per_epoch = np.array([0, 7, 210, 429]), 0.7, 0.003, 1.3, 11, 39
    rates = np.array([lr * (1 + gamma * k) ** -decay for k in steps])
    arrays = {"n_cases": np.array(1), "ramp_epochs": np.arange(9), "ramp_warmup7": np.array([np.exp(-5 * (1 - min(e, 7) / 7) ** 2) for e in range(9)])}
    values = {"kind": "exp", "lr": lr, "gamma": gamma, "decay": decay, "finetune": 1, "epochs": epochs, "iters_per_epoch": per_epoch}
    arrays |= {f"case0_{name}": np.array(value) for name, value in values.items()}
    arrays |= {"case0_steps": steps, "case0_group_lr": np.stack([0.1 * rates, rates, rates], axis=1)}
    result = replay(save(tmp_path, "lr_schedule_s9", arrays))
    assert result.ok and len(result.comparisons) == 2, result.line()
