"""Methods of the Transfer-Learning-Library that were recorded with a small network through real updates: Mean Teacher, DST, Self-Tuning (float32).

Network, optimiser, rate law and teacher are the project's own; only the recorded names are translated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.functional import cross_entropy_rows
from fastssl.methods.base import Method
from fastssl.models.ema import Teacher
from fastssl.models.heads import bottleneck, build_head
from fastssl.models.network import Network
from fastssl.schema import ScheduleConfig, TeacherConfig
from fastssl.types import Views
from tests.golden.identity import build_method, make_batch, make_task
from tests.golden.recorder import FLOOR as SCALAR_FLOOR
from tests.golden.recorder import Recorder
from tests.golden.training import FLOOR, TOLERANCE, Probe, Training, retain

MEAN_TEACHER_STATE = 2e-5


class MeanTeacherBackbone(nn.Module):
    """The recorded network below its head."""

    def __init__(self, inputs: int, hidden: int, width: int):
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden)
        self.downsample = nn.Sequential(nn.Linear(hidden, width), nn.BatchNorm1d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.downsample(torch.relu(self.bn1(self.fc1(x)))))


def mean_teacher(rec: Recorder) -> None:
    arrays = {"x": "x_l", "x_s": "x_l_strong", "u_w": "x_u", "u_t": "x_u_teacher"}
    inputs, labels = {view: rec.input(array) for view, array in arrays.items()}, rec.input("labels_l")
    classes, width = rec.raw("init.head.weight").shape
    (steps, labeled, dim), unlabeled, per_epoch = inputs["x"].shape, inputs["u_w"].shape[1], rec.hp("iters_per_epoch")
    if steps != rec.hp("epochs") * per_epoch:
        raise ValueError(f"{steps} steps are not {rec.hp('epochs')} epochs of {per_epoch}")
    weight = rec.hp("trade_off_con")
    options = {
        "unlabeled_weight": weight,
        "ramp_epochs": rec.hp("warm_up_epochs"),
        "sum_classes": True,
        "sum_rows": True,
        "strong_label_weight": rec.hp("trade_off_cls_strong"),
        "separate_forwards": True,
    }
    method = build_method("mean_teacher", options, make_task(classes, labeled, unlabeled))
    network = Network(MeanTeacherBackbone(dim, len(rec.raw("init.fc1.weight")), width), width, nn.Linear(width, classes)).train()
    names = {name: f"backbone.{name}" for name in ("fc1", "bn1", "downsample")} | {"head": "classifier"}
    schedule = ScheduleConfig(name="exp", gamma=rec.hp("lr_gamma"), decay=rec.hp("lr_decay"))
    train = Training(rec, network, names, ["fc1"], rec.hp("lr_base"), schedule)
    policy = TeacherConfig(momentum=rec.hp("alpha"), momentum_law="warmup", buffers="copy_matching", buffers_matching="bn", mode="train")
    teacher = Teacher(train.network, policy, steps)
    for step in range(steps):
        views = Views({view: x[step] for view, x in inputs.items()})
        view_names = {id(tensor): view for view, tensor in views.items()}
        student, asked = Probe(train.network, view_names), Probe(None, view_names, teacher)
        loss = train.update(method, views, make_batch(labels[step], unlabeled, step, step // per_epoch), step, student, asked)
        train.note(lr_used=torch.stack([train.rate("fc1"), train.rate("head")]))
        train.note_state("student", train.network)
        teacher.update(train.network)
        train.note(alpha_used=teacher.momentum())
        train.note_state("teacher", teacher.network)
        logits = {view: out.logits_NC.detach() for view, out in (student.outs | asked.outs).items()}
        train.note(y_l=logits["x"], y_l_strong=logits["x_s"], y_u=logits["u_w"], y_u_teacher=logits["u_t"])
        train.note(cls_loss=loss.parts["sup_loss"], con_loss=loss.parts["unsup_loss"], loss=loss.total)
        distance = ((torch.softmax(logits["u_w"], 1) - torch.softmax(logits["u_t"], 1)) ** 2).sum()
        train.note(ramp=loss.parts["unsup_loss"] / (weight * distance))
    train.check(MEAN_TEACHER_STATE)


def dst(rec: Recorder) -> None:
    arrays = {"x_s": "x_l_strong", "x": "x_l", "u_w": "x_u", "u_s": "x_u_strong"}
    inputs, labels = {view: rec.input(array) for view, array in arrays.items()}, rec.input("labels_l")
    (steps, labeled, dim), unlabeled = inputs["x"].shape, inputs["u_w"].shape[1]
    classes, width = rec.raw("init.head.weight").shape
    a_s, first = rec.hp("trade_off_cls_strong"), rec.hp("grl_iter0")
    options = {
        "threshold": rec.hp("threshold"),
        "unlabeled_weight": rec.hp("trade_off_self_training"),
        "worst_weight": rec.hp("eta"),
        "worst_label_weight": rec.hp("eta_prime"),
        "labeled_target": "prediction",
        "hidden": len(rec.raw("init.pseudo_head.0.weight")),
        "dropout": 0.0,
        "strict_threshold": True,
        "strong_label_weight": a_s,
        "separate_forwards": True,
    }
    method: Any = build_method("dst", options, make_task(classes, labeled, unlabeled))
    neck = bottleneck(len(rec.raw("init.backbone.weight")), out=width, dropout=0.0)
    network = _network(method, nn.Linear(dim, neck[0].in_features), width, classes, neck)
    # without dropout, which holds no numbers, the second layer of a head has the number 2
    heads = {f"{recorded}.{a}": f"heads.{ours}.{b}" for recorded, ours in (("pseudo_head", "pseudo"), ("adv_head", "worst")) for a, b in ((0, 0), (3, 2))}
    names = {"backbone": "backbone", "bottleneck": "neck", "head": "classifier"} | heads
    schedule = ScheduleConfig(name="exp", gamma=rec.hp("lr_gamma"), decay=rec.hp("lr_decay"))
    train = Training(rec, network, names, ["backbone"], rec.hp("lr_base"), schedule)
    groups = {"l_strong": ["x_s"], "weak": ["x", "u_w"], "u_strong": ["u_s"]}
    for step in range(steps):
        views = Views({view: x[step] for view, x in inputs.items()})
        student = Probe(train.network, {id(tensor): view for view, tensor in views.items()})
        batch = make_batch(labels[step], unlabeled, first + step)
        before = {name: value.clone() for name, value in train.network.state_dict().items()}
        loss = train.update(method, views, batch, step, student)
        train.note(grl_coeff=method.reversal(batch.clock.step))
        train.note(lr_used=torch.stack([train.rate(prefix) for prefix in ("backbone", "bottleneck", "head", "pseudo_head.0", "adv_head.0")]))
        answered = {("weak", "adv"): student.heads["worst"], ("u_strong", "pseudo"): student.heads["pseudo"]}
        for group, members in groups.items():
            answered[group, "main"] = [student.outs[view].logits_NC for view in members]
            for ours, recorded in (("worst", "adv"), ("pseudo", "pseudo")):  # what the original computes without using it
                if (group, recorded) not in answered:
                    head = {n.removeprefix(f"heads.{ours}."): value for n, value in before.items() if n.startswith(f"heads.{ours}.")}
                    feats = [student.outs[view].feat_ND.detach() for view in members]
                    answered[group, recorded] = [torch.func.functional_call(train.network.heads[ours], head, (feat,)) for feat in feats]
        for (group, head), tensors in answered.items():
            train.note(**{f"logits_{group}_{head}": torch.cat(tensors)})
            train.note(**{f"grad_logits_{group}_{head}": torch.cat([torch.zeros_like(t) if t.grad is None else t.grad for t in tensors])})
        strong = a_s * cross_entropy_rows(student.outs["x_s"].logits_NC.detach(), labels[step]).mean()
        parts, pseudo = loss.parts, loss.pseudo
        assert pseudo is not None
        train.note(cls_loss=parts["sup_loss"], cls_loss_strong=strong, cls_loss_weak=parts["sup_loss"] - strong, wce_loss=parts["worst_loss"])
        train.note(self_training_loss=parts["unsup_loss"], loss=loss.total, mask=pseudo.mask_B, pseudo_labels=pseudo.label_B)
    train.note_state("final", train.network)
    train.check()


def dst_worst_case(rec: Recorder) -> None:
    views = {name: rec.input(name) for name in ("y_l", "y_l_adv", "y_u", "y_u_adv")}
    steps, labeled, classes = views["y_l"].shape
    eta_prime = rec.hp("eta_prime")
    options = {"worst_label_weight": eta_prime, "labeled_target": "prediction"}
    method: Any = build_method("dst", options, make_task(classes, labeled, views["y_u"].shape[1]))
    out = defaultdict(list)
    for step in range(steps):
        leaves = {name: x[step].clone().requires_grad_() for name, x in views.items()}
        right, avoid = method.worst_case(leaves["y_l_adv"], leaves["y_l"].detach().argmax(1), leaves["y_u_adv"], leaves["y_u"].detach().argmax(1))
        total = eta_prime * right + avoid
        total.backward()
        for name, value in {"loss": total, "loss_u": avoid, "loss_l_times_eta_prime": eta_prime * right}.items():
            out[name].append(value.detach())
        for name, leaf in leaves.items():
            out[f"grad_{name}"].append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    for name, values in out.items():
        rec.check(name, torch.stack(values), TOLERANCE, FLOOR if name.startswith("grad") else SCALAR_FLOOR)
    rec.check("grl_coeff", method.reversal(rec.input("grl_iters")), TOLERANCE)


def self_tuning(rec: Recorder) -> None:
    arrays = {"x_q": "l_q", "x_k": "l_k", "u_q": "u_q", "u_k": "u_k"}
    inputs, labels = {view: rec.input(array) for view, array in arrays.items()}, rec.input("labels_l")
    (steps, labeled, dim), unlabeled = inputs["x_q"].shape, inputs["u_q"].shape[1]
    classes, width = rec.raw("init.head.weight").shape
    options = {
        "queue_size": rec.hp("K"),
        "projection_dim": len(rec.raw("init.projector.weight")),
        "temperature": rec.hp("T"),
        "separate_forwards": True,
        "pseudo_label_forward": True,
    }
    method: Any = build_method("self_tuning", options, make_task(classes, labeled, unlabeled)).to(labels.device)
    method.queue.copy_(rec.input("queue_init").T)
    method.pointer.copy_(rec.input("ptr_init"))
    network = _network(method, nn.Sequential(nn.Linear(dim, width), nn.ReLU()), width, classes)
    names = {"backbone": "backbone.0", "projector": "heads.projector", "head": "classifier"}
    train = Training(rec, network, names, ["backbone", "projector"], rec.hp("lr"), ScheduleConfig(name="constant"))
    policy = TeacherConfig(momentum=rec.hp("m"), buffers="leave", when="by_method", mode="train")
    teacher = Teacher(train.network, policy, steps).bind(train.network)
    calls: dict[str, list[tuple[Any, ...]]] = {}
    for name in ("log_ratios", "group_contrast", "enqueued"):
        setattr(method, name, _noted(getattr(method, name), calls.setdefault(name, [])))
    for step in range(steps):
        for noted in calls.values():
            noted.clear()
        views = Views({view: x[step] for view, x in inputs.items()})
        view_names = {id(tensor): view for view, tensor in views.items()}
        student = Probe(train.network, view_names)
        loss = train.update(method, views, make_batch(labels[step], unlabeled, step), step, student, Probe(None, view_names, teacher))
        train.note(cls_loss=loss.parts["sup_loss"], pgc_loss_labeled=loss.parts["group_loss"], pgc_loss_unlabeled=loss.parts["unsup_loss"])
        for call, (stream, view) in enumerate((("l", "x_q"), ("u", "u_q"))):
            _, query, key, queue = calls["log_ratios"][call]
            _, log_ratio, label = calls["group_contrast"][call]
            (queue_after, pointer_after), queue_before, pointer_before, *_ = calls["enqueued"][call]
            if not torch.equal(queue, queue_before):
                raise AssertionError("the queue that a call compares with is not the one that it writes to")
            logits = student.outs[view].logits_NC
            grad = torch.zeros_like(logits) if logits.grad is None else logits.grad
            values = {"queue_before": queue_before.T, "queue_after": queue_after.T, "ptr_before": pointer_before, "ptr_after": pointer_after}
            values |= {"labels_used": label, "y": logits, "grad_y": grad, "h_q": query, "grad_h_q": query.grad, "h_k": key}
            values["logp"] = _own_class_first(log_ratio, label, rec.hp("K"))
            train.note(**{f"{name}_{stream}": value for name, value in values.items()})
            share = _own_class_first(-len(label) * log_ratio.grad, label, rec.hp("K"))
            if not torch.allclose(share, share[:1].expand_as(share)):
                raise AssertionError("the target is not the same for all rows")
        train.note(y_u_for_pseudo=student.first_outs["u_q"].logits_NC)
        if not torch.equal(method.queue, calls["enqueued"][1][0][0]):
            raise AssertionError("the step did not leave what its last call wrote")
    train.note_state("final_q", train.network)
    train.note_state("final_k", teacher.network)
    train.check()
    rec.check("target_row", share[0], TOLERANCE)


def _network(method: Method, backbone: nn.Module, width: int, classes: int, neck: nn.Module | None = None) -> Network:
    """The project's network with the heads that the method asks for, in training mode."""
    specs = method.heads(method.config, method.task)
    heads = {name: build_head(spec.kind, width, spec.options, name) for name, spec in specs.items()}
    on_request = [name for name, spec in specs.items() if spec.on_request]
    return Network(backbone, width, nn.Linear(width, classes), heads, neck, on_request).train()


def _noted(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Callable[..., Any]:
    """``function`` that notes (answer, arguments...) of each call, with their gradients, or a copy of what has none."""

    def call(*arguments: Tensor) -> Any:
        answer = function(*arguments)
        for tensor in (*arguments, *(answer if isinstance(answer, tuple) else (answer,))):
            retain(tensor)
        calls.append((answer, *(tensor if tensor.requires_grad else tensor.clone() for tensor in arguments)))
        return answer

    return call


def _own_class_first(rows: Tensor, label_n: Tensor, places: int) -> Tensor:
    """[n, 1 + C K] from (own key, class 0, class 1, ...) to (own key, the row's class, the others in ascending order)."""
    out = []
    for row, label in zip(rows, label_n.tolist(), strict=True):
        blocks = list(row[1:].split(places))
        out.append(torch.cat([row[:1], blocks.pop(label), *blocks]))
    return torch.stack(out)


HANDLERS = {"mean_teacher_": mean_teacher, "dst_": dst, "dst_wce_": dst_worst_case, "self_tuning_": self_tuning}
