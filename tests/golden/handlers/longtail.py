"""SimPro, ACR and ACR_d with recorded logits, step by step and over epochs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.functional import log_prior, symmetric_kl
from fastssl.methods.base import Method
from fastssl.types import Batch, Loss, Out, Task, Views
from tests.golden.identity import build_method, make_batch, make_task
from tests.golden.recorder import Recorder

TOLERANCE = 1e-5
GRAD_FLOOR = 0.1  # gradients at logits are differences of probabilities; a rounding of p = 1 is 6e-8 whatever is left of p - 1
DIVERGENCES = ("count_KL", "epoch_count_KL_sum", "epoch_kl_estim")
DIVERGENCE_ERROR = 2e-6  # absolute, as suggested beside the files: terms of either sign that cancel between distributions that are close
LABELED_DUPLICATE = -2  # the recorded marker of unlabelled rows that are also labelled
SIMPRO_VIEWS = {"x": "l_w", "x_s": "l_s", "u_w": "u_w", "u_s": "u_s", "u_s2": "u_s1"}
ACR_VIEWS = {"x": "x", "u_w": "u_w", "u_s": "u_s", "u_s2": "u_s1"}

Stacks = dict[str, list[Any]]


def batches(rec: Recorder, labeled_TB: Tensor, unlabeled_TU: Tensor) -> tuple[int, int]:
    """Rows of a labelled and of an unlabelled batch."""
    labeled, unlabeled = labeled_TB.shape[1], unlabeled_TU.shape[1]
    sizes = {"hp_B_l": labeled, "hp_B_u": unlabeled, "hp_mu": unlabeled // labeled}
    for name in sizes.keys() & rec.arrays.keys():
        rec.check(name, np.array(sizes[name]))
    return labeled, unlabeled


def task_of(rec: Recorder, labeled: int, unlabeled: int, *, lists: bool = False) -> Task:
    """``lists``: the recording says how many batches each list has; lists of just that many rows."""
    counts = tuple(rec.raw("cls_num_l").tolist())
    sizes = {"num_labeled": rec.hp("hp_l_len") * labeled, "num_unlabeled": rec.hp("hp_u_len") * unlabeled} if lists else {}
    return make_task(rec.hp("hp_C"), labeled, unlabeled, labeled_class_counts=counts, steps_per_epoch=rec.hp("hp_steps_per_epoch"), **sizes)


def epochs(rec: Recorder, method: Method, step: Callable[[int, int], None], after: Callable[[int], None], start: Callable[[int], None] | None = None) -> None:
    """The trainer's order: epoch start, steps, epoch end. ``after`` runs before the epoch's end, ``start`` after its start."""
    per_epoch = rec.hp("hp_steps_per_epoch")
    for epoch in range(rec.hp("hp_epochs")):
        method.on_epoch_start(epoch)
        if start:
            start(epoch)
        for t in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            step(t, epoch)
        after(epoch)


def check(rec: Recorder, out: Stacks) -> None:
    for name, values in out.items():
        stack = np.stack([value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value) for value in values])
        exact = "mask" in name and "now" not in name
        floor = GRAD_FLOOR if name.startswith("grad_") else 1e-3
        if name in DIVERGENCES:
            floor = max(floor, DIVERGENCE_ERROR / TOLERANCE / max(float(np.abs(rec.arrays[name]).max()), DIVERGENCE_ERROR))
        rec.check(name, stack, 0.0 if exact else TOLERANCE, floor)


# --- recorded logits ------------------------------------------------------------------------------------------------------------------


def simpro(rec: Recorder) -> None:
    logits = {view: rec.input(f"in_logits_{name}") for view, name in SIMPRO_VIEWS.items()}
    labels, (labeled, unlabeled) = rec.input("targets_l"), batches(rec, logits["x"], logits["u_w"])
    task = task_of(rec, labeled, unlabeled, lists=True)
    options = {"threshold": rec.hp("hp_threshold"), "prior_exponent": rec.hp("hp_tau"), "prior_momentum": rec.hp("hp_ema_u"), "unnormalized_prior": True}
    method: Any = build_method("simpro", options, task).to(rec.device)
    rec.check("hp_scale_ratio", np.array(method.ratio(method.config, task)), 1e-12)
    rec.check("init_adapt", method.mixture_prior, TOLERANCE)
    rec.check("init_est", method.unlabeled_prior, TOLERANCE)
    truth_C = torch.from_numpy(rec.raw("cls_num_u")).to(rec.device, torch.float32)
    truth_C = truth_C / truth_C.sum()
    rec.check("py_u", truth_C, TOLERANCE)
    out: Stacks = defaultdict(list)

    def step(t: int, epoch: int) -> None:
        out["adj_u"].append(log_prior(method.unlabeled_prior, method.config.prior_exponent))
        out["adj_l"].append(log_prior(method.mixture_prior, method.config.prior_exponent))
        batch = make_batch(labels[t], unlabeled, t, epoch)
        loss, grads = _forward_backward(method, {view: x[t] for view, x in logits.items()}, batch, _one_head)
        assert loss.pseudo is not None and loss.pseudo.confidence_B is not None
        out["pseudo_label"].append(method.kept("posterior"))
        assert torch.equal(method.kept("posterior").argmax(1), loss.pseudo.label_B)
        out["max_probs"].append(loss.pseudo.confidence_B)
        out["mask"].append(loss.pseudo.mask_B)
        for name, value in (("Lx", loss.parts["sup_loss"]), ("Lu", loss.parts["unsup_loss"]), ("loss", loss.total)):
            out[name].append(value)
        for view, name in SIMPRO_VIEWS.items():
            out[f"grad_{name}"].append(grads[view])
        out["cum_dis_unlabeled"].append(method.unlabeled_mass.clone())
        out["cum_count_labeled"].append(method.labeled_count.clone())

    def after(epoch: int) -> None:
        raw_C = method.estimates()[0]
        out["epoch_est_raw"].append(raw_C)
        out["epoch_count_forward"].append(method.labeled_count + method.unlabeled_mass)
        out["epoch_kl_estim"].append(symmetric_kl(truth_C, raw_C))  # what the run logs; the truth is a meter's to read
        method.on_epoch_end(epoch)
        out["epoch_est_ema"].append(method.unlabeled_prior.clone())
        out["epoch_adapt_ema"].append(method.mixture_prior.clone())

    epochs(rec, method, step, after)
    check(rec, out)


def acr(rec: Recorder) -> None:
    _acr(rec, "acr", {"float64_prior": True})


def acr_d(rec: Recorder) -> None:
    _acr(rec, "acr_d", {})


def _acr(rec: Recorder, name: str, extra: dict[str, Any]) -> None:
    # both heads of a view side by side
    logits = {view: torch.cat([rec.input(f"in_logits_{n}"), rec.input(f"in_logits_{n}_b")], dim=2) for view, n in ACR_VIEWS.items()}
    labels, markers, classes = rec.input("targets_x"), rec.input("u_real"), rec.hp("hp_C")
    labeled, unlabeled = batches(rec, labels, markers)
    config = {
        "threshold": "threshold",
        "temperature": "T",
        "adaptive_exponent": "tau1",
        "label_exponent": "tau12",
        "balanced_exponent": "tau2",
        "prior_momentum": "ema_u",
        "estimate_after_epoch": "est_epoch",
    }
    options = {ours: rec.hp(f"hp_{theirs}") for ours, theirs in config.items()} | {"class_presence": "last"} | extra
    method: Any = build_method(name, options, task_of(rec, labeled, unlabeled)).to(rec.device)
    c, labeled_C = method.config, method.anchors[0]
    rec.check("py_con", labeled_C, TOLERANCE)
    rec.check("py_rev", method.anchors[2], TOLERANCE)
    rec.check("init_u_py", method.unlabeled_prior, TOLERANCE)
    out: Stacks = defaultdict(list)
    ambiguous = 0

    def in_force() -> Tensor:
        return log_prior(labeled_C, method.exponent if name == "acr" else c.adaptive_exponent)

    def start(epoch: int) -> None:
        out["epoch_tau"].append(method.exponent.clone() if epoch > c.estimate_after_epoch else torch.tensor(torch.nan))  # recorded where it was computed

    def step(t: int, epoch: int) -> None:
        nonlocal ambiguous
        out["adj_l1"].append(in_force())
        out["adj_l12"].append(log_prior(labeled_C, c.label_exponent))
        out["adj_l2"].append(log_prior(labeled_C, c.balanced_exponent))
        batch = make_batch(labels[t], unlabeled, t, epoch)
        assert batch.unlabeled is not None
        batch.unlabeled.is_labeled_B = markers[t] == LABELED_DUPLICATE
        loss, grads = _forward_backward(method, {view: x[t] for view, x in logits.items()}, batch, _two_heads)
        kept = method.kept
        assert loss.pseudo is not None
        weak, weak_b = logits["u_w"][t].split(classes, dim=1)
        for suffix, row in {"": weak - out["adj_l1"][-1], "_h2": weak - out["adj_l12"][-1], "_b": weak_b, "_t": weak}.items():
            out[f"pseudo_label{suffix}"].append(torch.softmax(row / c.temperature, dim=1))
        for suffix, label in {"": loss.pseudo.label_B, "_h2": kept("label_balanced"), "_b": kept("seen")}.items():
            out[f"targets_u{suffix}"].append(label)
        passed = {suffix: out[f"pseudo_label{suffix}"][-1].max(1).values >= c.threshold for suffix in ("", "_h2", "_b", "_t")}
        for recorded, suffix in {"mask_adaptive": "", "mask_h2": "_h2", "mask_b": "_b", "mask_t": "_t"}.items():
            out[recorded].append(passed[suffix])
        out["mask_ss_t"].append(loss.pseudo.mask_B)
        out["mask_ss_b_h2"].append(kept("mask_balanced"))
        present = method.present(batch).float()
        out["now_mask"].append(present / present.sum().clamp_min(1))
        ambiguous += _disagreeing(kept("seen"), kept("counted"), classes)
        out["u_py"].append(method.unlabeled_prior.clone())
        out["count_KL"].append(method.divergence.clone())
        parts = {"Lx": "sup_loss", "Lx_b": "sup_loss_balanced", "Lu": "unsup_loss", "Lu_b": "unsup_loss_balanced"}
        for recorded, part in parts.items():
            out[recorded].append(loss.parts[part])
        out["loss"].append(loss.total)
        for view, n in ACR_VIEWS.items():
            grad, grad_b = grads[view].split(classes, dim=1)
            out[f"grad_{n}"].append(grad)
            out[f"grad_{n}_b"].append(grad_b)

    def after(epoch: int) -> None:
        out["epoch_adj_l1"].append(in_force())
        out["epoch_count_KL_sum"].append(method.divergence.clone())
        method.on_epoch_end(epoch)

    epochs(rec, method, step, after, start)
    check(rec, out)
    rec.check("n_order_ambiguous", np.array(ambiguous))


def _disagreeing(label_B: Tensor, counted_B: Tensor, classes: int) -> int:
    """Classes of which some rows count and others do not."""
    of_class = [counted_B[label_B == c] for c in range(classes)]
    return sum(bool(rows.any()) and not bool(rows.all()) for rows in of_class if len(rows))


def _one_head(rows: Tensor) -> Out:
    return Out(rows, rows)


def _two_heads(rows: Tensor) -> Out:
    standard, balanced = rows.chunk(2, dim=1)
    return Out(standard, rows, {"balanced": balanced})


def _forward_backward(method: Method, logits: dict[str, Tensor], batch: Batch, network: Callable[[Tensor], Out]) -> tuple[Loss, dict[str, Tensor]]:
    """Loss and gradients at the logits of every view (zeros where none arrives); the method has written its state after."""
    leaves = {view: x.clone().requires_grad_() for view, x in logits.items()}
    loss = method(Views({view: leaves[view] for view in method.views(method.config)}), batch, lambda *views: tuple(map(network, views)), None)
    loss.total.backward()
    method.after_backward(batch)
    return loss, {view: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for view, leaf in leaves.items()}


HANDLERS = {"simpro_": simpro, "acr_": acr, "acr_d_": acr_d}
