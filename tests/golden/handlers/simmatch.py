"""SimMatch, SimMatchV2 and ShrinkMatch in its ImageNet, CIFAR and STL-10/SVHN forms (float64 files).

A view is its recorded numbers side by side, [logits | raw embedding | auxiliary logits]; the stub network cuts them apart, so gradients at views are the
recorded gradients at logits and embeddings.  What lies inside the losses is read from the calls of the functions that the methods hand it to.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from fastssl import functional
from fastssl.methods.base import Method
from fastssl.types import Batch, Loss, Out, Views
from tests.golden.identity import build_method, make_batch, make_task
from tests.golden.recorder import Recorder

TOLERANCE = 1e-9
RATIO = 1e-6  # where rho enters: its mask means are float32 in the originals
GRAD_FLOOR = 0.1  # gradients at logits are differences of probabilities
COSINE_FLOOR = 0.1  # a cosine near 0 is a sum of terms of either sign


class Stub:
    """A network whose input is its output: columns [logits | embedding | auxiliary logits]."""

    def __init__(self, classes: int, embed_dim: int = 0):
        self.classes, self.aux = classes, classes + embed_dim

    def __call__(self, *views: Tensor) -> Any:
        outs = tuple(Out(view[:, : self.classes], view, {"projection": view[:, self.classes : self.aux]}) for view in views)
        return outs[0] if len(outs) == 1 else outs

    def head(self, name: str, *feats: Tensor) -> Any:
        outs = tuple(feat[:, self.aux :] for feat in feats)
        return outs[0] if len(outs) == 1 else outs


class Call(NamedTuple):
    args: tuple[Tensor, ...]  # as they were at the call: buffers change after the loss; tensors with a gradient keep it
    options: dict[str, Any]
    result: Any


@contextmanager
def watched(method: Method, *names: str) -> Iterator[dict[str, Call]]:
    """The last call of each of the functions ``names`` by a method's module."""
    module, calls = importlib.import_module(type(method).__module__), {}

    def spy(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Tensor, **options: Any) -> Any:
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    arg.retain_grad()
            before = tuple(arg.clone() if isinstance(arg, Tensor) and not arg.requires_grad else arg for arg in args)
            calls[name] = Call(before, options, real(*args, **options))
            return calls[name].result

        return call

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(module, name, spy(name, getattr(module, name))))
        yield calls


def one_step(method: Method, stub: Stub, views: dict[str, Tensor], batch: Batch) -> tuple[Loss, dict[str, Tensor]]:
    """Forward, backward, state. The student sees ``views[name]``, the teacher ``views["teacher.name"]``; a view that one of them lacks is the other's."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in views.items()}
    given = Views({name: leaves[name if name in leaves else f"teacher.{name}"] for name in method.views(method.config)})

    def teacher(*asked: Tensor) -> Any:
        names = [next(name for name, view in given.items() if view is tensor) for tensor in asked]
        with torch.no_grad():
            return stub(*(leaves.get(f"teacher.{name}", given[name]) for name in names))

    loss = method(given, batch, stub, teacher if method.needs_teacher(method.config) else None)
    loss.total.backward()
    method.after_backward(batch)
    return loss, {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


def _method(rec: Recorder, name: str, options: dict[str, Any], classes: int, **sizes: Any) -> Any:
    method = build_method(name, options, make_task(classes, rec.hp("hp.B_l"), rec.hp("hp.B_u"), **sizes)).to(rec.device)
    return method if rec.kernels else method.double()


def _batch(rec: Recorder, at: str, index: Tensor | None = None, epoch: int = 0) -> Batch:
    batch = make_batch(rec.input(at + "in.targets_x"), rec.hp("hp.B_u"), epoch=epoch)
    return batch if index is None else replace(batch, labeled=replace(batch.labeled, index_B=index))


def _columns(rec: Recorder, *names: str) -> Tensor:
    return torch.cat([rec.input(name) for name in names], dim=-1)


# --- SimMatch, and ShrinkMatch on it -----------------------------------------------------------------------------------------------------------------


def simmatch(rec: Recorder) -> None:
    _with_bank(rec, "simmatch", shrinks=False)


def shrinkmatch_imagenet(rec: Recorder) -> None:
    _with_bank(rec, "shrinkmatch", shrinks=True)


def _with_bank(rec: Recorder, name: str, shrinks: bool) -> None:
    steps, classes, dim, images, labeled = (rec.hp(f"hp.{key}") for key in ("steps", "C", "D", "K", "B_l"))
    weight, instance_weight = rec.hp("hp.lambda_u"), rec.hp("hp.lambda_in")
    options = {
        "threshold": rec.hp("hp.threshold"),
        "unlabeled_weight": weight,
        "instance_weight": instance_weight,
        "student_temperature": rec.hp("hp.st"),
        "teacher_temperature": rec.hp("hp.tt"),
        "smoothing": rec.hp("hp.c_smooth"),
        "alignment": "ring" if rec.hp("hp.DA") else "none",
        "alignment_length": rec.hp("hp.DA_len"),
        "embed_dim": dim,
    }
    method = _method(rec, name, options, classes, num_labeled=images)
    method.bank_ND.copy_(rec.input("bank0").T)
    method.bank_label_N.copy_(rec.input("bank_labels0"))
    dataset_labels, stub = rec.input("dataset_labels"), Stub(classes, dim)
    for at in (f"s{step}." for step in range(steps)):
        student, teacher = (_columns(rec, f"{at}in.logits_{who}", f"{at}in.embed_raw_{who}") for who in "qk")
        views = {"x": student[:labeled], "u_s": student[labeled:], "teacher.x": teacher[:labeled], "teacher.u_w": teacher[labeled:]}
        if shrinks:
            views["u_s"] = torch.cat([views["u_s"], rec.input(at + "in.logits_u_s_aux")], dim=1)
        index, on = rec.input(at + "in.index"), rec.hp(at + "in.start_unlabel")
        batch = _batch(rec, at, index, epoch=on)
        assert torch.equal(batch.labeled.label_B, dataset_labels[index])
        with watched(method, "instance_matching", "soft_cross_entropy_rows", *(["shrink_loss"] if shrinks else [])) as calls:
            loss, grads = one_step(method, stub, views, batch)
        assert loss.pseudo is not None

        args, temperatures, (instance_U, neighbours_UK) = calls["instance_matching"]
        student_UD, teacher_UD, bank_ND, label_N, prob_UK = args
        rec.check(at + "prob_ku_orig", prob_UK, TOLERANCE)
        rec.check(at + "pseudo_label", calls["soft_cross_entropy_rows"].args[1], TOLERANCE)
        if on:
            inner = functional.instance_distributions(*args, **temperatures)
            rec.check(at + "teacher_logits", functional.similarity(teacher_UD, bank_ND), TOLERANCE, COSINE_FLOOR)
            rec.check(at + "teacher_prob_orig", inner.teacher_BN, TOLERANCE)
            rec.check(at + "factor", prob_UK[:, label_N], TOLERANCE)
            rec.check(at + "teacher_prob", inner.calibrated_BN, TOLERANCE)
            rec.check(at + "student_prob", inner.log_student_BN.exp(), TOLERANCE)
            rec.check(at + "aggregated_prob", neighbours_UK, TOLERANCE)
        rec.check(at + "loss_in_per_sample", instance_U if on else loss.parts["instance_loss"], TOLERANCE)
        rec.check(at + "mask", loss.pseudo.mask_B)
        rec.check(at + "loss_x", loss.parts["sup_loss"], TOLERANCE)
        rec.check(at + "loss_u", loss.parts["unsup_loss"] / weight, TOLERANCE)  # recorded without weights
        rec.check(at + "loss_in", loss.parts["instance_loss"] / instance_weight, TOLERANCE)
        rec.check(at + "loss", loss.total, RATIO if shrinks else TOLERANCE)
        at_student = torch.cat([grads["x"], grads["u_s"][:, : classes + dim]])
        rec.check(at + "grad.logits_q", at_student[:, :classes], TOLERANCE, GRAD_FLOOR)
        rec.check(at + "grad.embed_raw_q", at_student[:, classes:], TOLERANCE, GRAD_FLOOR)
        assert student_UD.grad is not None
        at_unit = torch.cat([torch.zeros_like(student_UD)[:1].expand(labeled, -1), student_UD.grad])  # embeddings of x are not used
        rec.check(at + "grad.embed_norm_q", at_unit, TOLERANCE, GRAD_FLOOR)
        if shrinks:
            _check_shrink(rec, at, loss, *calls["shrink_loss"].result)
            rec.check(at + "loss_shrink_sum", calls["shrink_loss"].result[0].sum(), TOLERANCE)
            rec.check(at + "certain_ratio_ema", method.ratio, RATIO)
            rec.check(at + "grad.logits_u_s_aux", grads["u_s"][:, classes + dim :], RATIO, GRAD_FLOOR)
        rec.check(at + "bank_after", method.bank_ND.T, TOLERANCE)
        rec.check(at + "bank_labels_after", method.bank_label_N)
        _check_ring(rec, at, method)


def _check_ring(rec: Recorder, at: str, method: Any) -> None:
    """Of a long ring only the first rows are recorded; the others are zero. Without alignment it may be recorded all the same: as it was, zeros."""
    if method.config.alignment == "ring":
        stored = len(rec.arrays[at + "DA_queue_after"])
        rec.check(at + "DA_queue_after", method.ring_LK[:stored], TOLERANCE)
        assert not method.ring_LK[stored:].any()
        rec.check(at + "DA_ptr_after", method.ring_slot)
        return
    for name in {at + "DA_queue_after", at + "DA_ptr_after"} & rec.arrays.keys():
        rec.check(name, torch.zeros(rec.arrays[name].shape))


def _check_shrink(rec: Recorder, at: str, loss: Loss, shrink_U: Tensor, first_U: Tensor) -> None:
    """Recorded are -1 for certain rows and, in some files, the loss per row."""
    assert loss.pseudo is not None
    rec.check(at + "shrink_c", torch.where(loss.pseudo.mask_B > 0, -1, first_U))
    if at + "shrink_per_sample" in rec.arrays:
        rec.check(at + "shrink_per_sample", shrink_U, TOLERANCE)


# --- ShrinkMatch on FixMatch -------------------------------------------------------------------------------------------------------------------------


def shrinkmatch_cifar(rec: Recorder) -> None:
    steps, classes, unlabeled = (rec.hp(f"hp.{key}") for key in ("steps", "C", "B_u"))
    options = {
        "pseudo_labels": "student",
        "bank": False,
        "threshold": rec.hp("hp.threshold"),
        "unlabeled_weight": 1.0,
        "alignment": "ring" if rec.hp("hp.DA") else "none",
        "alignment_length": rec.hp("hp.DA_len"),
        "ratio_reset": True,
    }
    method = _method(rec, "shrinkmatch", options, classes)
    method.on_epoch_start(0)
    for at in (f"s{step}." for step in range(steps)):
        x, u_w, u_s = rec.input(at + "in.logits").split([rec.hp("hp.B_l"), unlabeled, unlabeled])
        views = {"x": x, "u_w": u_w, "u_s": torch.cat([u_s, rec.input(at + "in.logits_u_s_aux")], dim=1)}
        with watched(method, "soft_cross_entropy_rows", "shrink_loss") as calls:
            loss, grads = one_step(method, Stub(classes), views, _batch(rec, at))
        assert loss.pseudo is not None
        rec.check(at + "pseudo_label", calls["soft_cross_entropy_rows"].args[1], TOLERANCE)
        rec.check(at + "mask", loss.pseudo.mask_B)
        _check_shrink(rec, at, loss, *calls["shrink_loss"].result)
        rec.check(at + "loss_shrink_sum", calls["shrink_loss"].result[0].sum(), TOLERANCE)
        rec.check(at + "certain_ratio_ema", method.ratio, RATIO)
        rec.check(at + "loss_x", loss.parts["sup_loss"], TOLERANCE)
        rec.check(at + "loss_u", loss.parts["unsup_loss"], TOLERANCE)
        rec.check(at + "loss", loss.total, RATIO)
        rec.check(at + "grad.logits", torch.cat([grads["x"], grads["u_w"], grads["u_s"][:, :classes]]), TOLERANCE, GRAD_FLOOR)
        rec.check(at + "grad.logits_u_s_aux", grads["u_s"][:, classes:], RATIO, GRAD_FLOOR)
        _check_ring(rec, at, method)


def shrinkmatch_torchssl(rec: Recorder) -> None:
    steps, classes, labeled, unlabeled = (rec.hp(f"hp.{key}") for key in ("steps", "C", "B_l", "B_u"))
    options = {
        "pseudo_labels": "student",
        "bank": False,
        "threshold": rec.hp("hp.threshold"),
        "unlabeled_weight": rec.hp("hp.lambda_u"),
        "alignment": "moving" if rec.hp("hp.use_da") else "none",
        "hard_targets": True,
        "shrink_scores": "raw",
        "aux_views": "all",
        "ratio_momentum": rec.hp("hp.ratio_decay"),
    }
    method = _method(rec, "shrinkmatch", options, classes)
    for at in (f"s{step}." for step in range(steps)):
        rows = _columns(rec, at + "in.logits", at + "in.logits_aux").split([labeled, unlabeled, unlabeled])
        watch = ["shrink_loss", "align_rows"] if rec.hp("hp.use_da") else ["shrink_loss"]
        with watched(method, *watch) as calls:
            loss, grads = one_step(method, Stub(classes), dict(zip(("x", "u_w", "u_s"), rows, strict=True)), _batch(rec, at))
        assert loss.pseudo is not None and loss.pseudo.confidence_B is not None
        shrink = calls["shrink_loss"]
        rec.check(at + "pseudo_label", calls["align_rows"].result if rec.hp("hp.use_da") else shrink.args[0], TOLERANCE)
        rec.check(at + "max_probs", loss.pseudo.confidence_B, TOLERANCE)
        rec.check(at + "max_idx", loss.pseudo.label_B)
        rec.check(at + "mask", loss.pseudo.mask_B)
        _check_shrink(rec, at, loss, *shrink.result)
        rec.check(at + "certain_ratio_ema", method.ratio, RATIO)
        rec.check(at + "loss_x", loss.parts["sup_loss"], TOLERANCE)
        rec.check(at + "loss_certain", loss.parts["unsup_loss"] / options["unlabeled_weight"], TOLERANCE)
        rec.check(at + "loss_shrink_mean", shrink.result[0].mean(), TOLERANCE)
        rec.check(at + "loss", loss.total, RATIO)
        at_rows = torch.cat([grads[name] for name in ("x", "u_w", "u_s")])
        rec.check(at + "grad.logits", at_rows[:, :classes], TOLERANCE, GRAD_FLOOR)
        rec.check(at + "grad.logits_aux", at_rows[:, classes:], RATIO, GRAD_FLOOR)
        if rec.hp("hp.use_da"):
            rec.check(at + "p_model_after", method.mean_K, TOLERANCE)


# --- SimMatchV2 --------------------------------------------------------------------------------------------------------------------------------------


def simmatchv2(rec: Recorder) -> None:
    steps, classes, dim, images, length, labeled, unlabeled, crops = (rec.hp(f"hp.{key}") for key in ("steps", "C", "D", "N_l", "K", "B_l", "B_u", "S"))
    weights = {loss: rec.hp(f"hp.lambda_{loss}") for loss in ("nn", "ee", "ne")}
    options = {
        "threshold": rec.hp("hp.threshold"),
        "node_weight": weights["nn"],
        "edge_weight": weights["ee"],
        "node_edge_weight": weights["ne"],
        "temperature": rec.hp("hp.t"),
        "propagation": rec.hp("hp.alpha"),
        "neighbours": rec.hp("hp.topn"),
        "bank_batches": length // unlabeled,
        "alignment": "moving" if rec.hp("hp.DA") else "none",
        "alignment_momentum": rec.hp("hp.da_m"),
        "embed_dim": dim,
        "crops": list(range(crops, 0, -1)),
    }
    dataset_labels = rec.input("dataset_labels")
    method = _method(rec, "simmatchv2", options, classes, num_labeled=images, labeled_labels=tuple(dataset_labels.tolist()))
    assert torch.equal(torch.nn.functional.one_hot(method.label_N, classes), rec.input("l_labels").long())
    method.label_bank_ND.copy_(rec.input("l_bank0"))
    method.bank_MD.copy_(rec.input("u_bank0"))
    method.bank_label_MK.copy_(rec.input("u_labels0"))
    method.mean_K.copy_(rec.input("da0")[0])
    stub, names = Stub(classes, dim), list(method.strong_views(method.config))
    for at in (f"s{step}." for step in range(steps)):
        strong = _columns(rec, at + "in.logits_u_s", at + "in.embed_raw_u_s")
        teacher = _columns(rec, at + "in.logits_k", at + "in.embed_raw_k")
        views = {"x": _columns(rec, at + "in.logits_x", at + "in.embed_raw_x"), "teacher.x": teacher[:labeled], "teacher.u_w": teacher[labeled:]}
        views |= dict(zip(names, strong, strict=True))
        index, bank_before = rec.input(at + "in.index"), method.label_bank_ND.clone()
        batch = _batch(rec, at, index)
        assert torch.equal(batch.labeled.label_B, dataset_labels[index])
        with watched(method, "propagation_weights", "soft_cross_entropy_rows", "edge_matching") as calls:
            loss, grads = one_step(method, stub, views, batch)
        assert loss.pseudo is not None

        nodes_UVD = calls["propagation_weights"].args[0]
        near_Un = functional.similarity(nodes_UVD[:, 1:].flatten(0, 1), bank_before).argmax(1).view(unlabeled, -1)
        rec.check(at + "l_sim_index_sorted", near_Un.sort(dim=1).values)
        rec.check(at + "propagation_row0", calls["propagation_weights"].result[:, 0], TOLERANCE)
        rec.check(at + "pseudo_label", calls["soft_cross_entropy_rows"].args[1], TOLERANCE)
        (student_SUD, teacher_UD, bank_MD, _, temperature), _, (_, score_SUK) = calls["edge_matching"]
        rec.check(at + "prob_ku", method.kept("prob_UK"), TOLERANCE)
        rec.check(at + "relation_ku", functional.relation(teacher_UD, bank_MD, float(temperature)).exp(), TOLERANCE)
        rec.check(at + "relation_qu_last", functional.relation(student_SUD[-1], bank_MD, float(temperature)).exp(), TOLERANCE)
        rec.check(at + "nn_qu_last", score_SUK[-1], TOLERANCE)
        rec.check(at + "mask", loss.pseudo.mask_B)
        rec.check(at + "loss_sup", loss.parts["sup_loss"], TOLERANCE)
        for part, name in (("nn", "unsup_loss"), ("ee", "edge_loss"), ("ne", "node_edge_loss")):
            rec.check(f"{at}loss_{part}", loss.parts[name] / weights[part], TOLERANCE)  # recorded without weights
        rec.check(at + "loss", loss.total, TOLERANCE)
        at_strong = torch.stack([grads[name] for name in names])
        for array, gradient in (("logits_x", grads["x"][:, :classes]), ("embed_raw_x", grads["x"][:, classes:]),
                                ("logits_u_s", at_strong[..., :classes]), ("embed_raw_u_s", at_strong[..., classes:])):  # fmt: skip
            rec.check(f"{at}grad.{array}", gradient, TOLERANCE, GRAD_FLOOR)
        rec.check(at + "l_bank_after", method.label_bank_ND, TOLERANCE)
        rec.check(at + "u_bank_after", method.bank_MD, TOLERANCE)
        rec.check(at + "u_labels_after", method.bank_label_MK, TOLERANCE)
        rec.check(at + "ptr_after", method.bank_slot)
        rec.check(at + "da_after", method.mean_K[None], TOLERANCE)


HANDLERS = {
    "simmatch_loss_": simmatch,
    "simmatchv2_loss_": simmatchv2,
    "shrinkmatch_imagenet_": shrinkmatch_imagenet,
    "shrinkmatch_cifar_": shrinkmatch_cifar,
    "shrinkmatch_stl10_": shrinkmatch_torchssl,
    "shrinkmatch_svhn_": shrinkmatch_torchssl,
}
