"""DST: which head learns from what, and how the worst case reaches the features."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastssl import methods
from fastssl.models.heads import build_head
from fastssl.models.joint import NetworkForward
from fastssl.models.network import Network
from fastssl.types import Views
from tests.golden.identity import build_method, make_batch, make_task
from tests.methods import reference_tllib as reference
from tests.methods.reference import cross_entropy, softmax

DST = methods.get("dst")


def make(classes=4, labeled=3, unlabeled=5, **options):
    return build_method("dst", {"hidden": 6, "dropout": 0.0} | options, make_task(classes, labeled, unlabeled))


def network_for(method, dim=5, seed=0):
    torch.manual_seed(seed)
    specs = method.heads(method.config, method.task)
    heads = {name: build_head(spec.kind, dim, spec.options, name) for name, spec in specs.items()}
    net = Network(nn.Linear(dim, dim), dim, nn.Linear(dim, method.task.num_classes), heads, None, [n for n, s in specs.items() if s.on_request])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    return net.double().train()


def inputs(seed, labeled=3, unlabeled=5, dim=5):
    generator = torch.Generator().manual_seed(seed)
    rows = {"x_s": labeled, "x": labeled, "u_w": unlabeled, "u_s": unlabeled}
    return {name: 2 * torch.randn(n, dim, generator=generator, dtype=torch.float64) for name, n in rows.items()}


def run(method, net, views, labels, step=0):
    net.zero_grad()
    given_views = Views({name: views[name] for name in method.views(method.config)})
    loss = method(given_views, make_batch(labels, len(views["u_w"]), step), NetworkForward(net), None)
    loss.total.backward()
    return loss


def worst_rows(logits, avoid):
    """mean -log min(1, 1 - p + 1e-6) and its gradient."""
    loss, grad = 0.0, np.zeros_like(logits)
    for i, (row, c) in enumerate(zip(logits, avoid, strict=True)):
        p = softmax(row)
        inside = 1 - p[c] + 1e-6
        loss -= np.log(min(1.0, inside)) / len(logits)
        if inside <= 1:
            grad[i] = p[c] * (np.eye(len(p))[c] - p) / inside / len(logits)
    return loss, grad


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labeled=st.integers(1, 5),
    unlabeled=st.integers(1, 6),
    classes=st.integers(2, 5),
    threshold=st.sampled_from([0.0, 0.4, 0.7, 1.5]),
    a_s=st.sampled_from([0.0, 0.2]),
    target=st.sampled_from(["label", "prediction"]),
    strict=st.booleans(),
    separate=st.booleans(),
    step=st.sampled_from([0, 1, 500, 20_000]),
)
def test_equals_the_plain_derivation(seed, labeled, unlabeled, classes, threshold, a_s, target, strict, separate, step):
    options = {"threshold": threshold, "unlabeled_weight": 0.6, "worst_weight": 0.8, "worst_label_weight": 1.7, "labeled_target": target}
    options |= {"strict_threshold": strict, "strong_label_weight": a_s, "separate_forwards": separate, "reversal_low": 0.01}
    method = make(classes, labeled, unlabeled, **options)
    net, views = network_for(method, seed=seed), inputs(seed, labeled, unlabeled)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, classes, labeled))
    loss = run(method, net, views, labels, step)

    # logits by hand, gradients at the logits by hand, then one backward through the plain network with them
    feat = {name: net.backbone(view) for name, view in views.items()}
    for tensor in feat.values():
        tensor.retain_grad()
    heads = {("main", name): net.classifier(f) for name, f in feat.items()}
    away = {name: feat[name].detach().requires_grad_() for name in ("x", "u_w")}
    heads |= {("worst", name): net.heads["worst"](f) for name, f in away.items()} | {("pseudo", "u_s"): net.heads["pseudo"](feat["u_s"])}
    z = {key: tensor.detach().numpy() for key, tensor in heads.items()}
    ce, grad_x = cross_entropy(z["main", "x"], labels.numpy())
    ce_s, grad_x_s = cross_entropy(z["main", "x_s"], labels.numpy())
    unsup, grad_u, mask, pseudo, _ = reference.hard_rows(z["main", "u_w"], z["pseudo", "u_s"], thresholds=[threshold] * classes, weight=0.6, strict=strict)
    aim = labels.numpy() if target == "label" else z["main", "x"].argmax(1)
    right, grad_right = cross_entropy(z["worst", "x"], aim)
    avoid, grad_avoid = worst_rows(z["worst", "u_w"], pseudo)
    parts = {"sup_loss": ce + a_s * ce_s, "unsup_loss": unsup, "worst_loss": 0.8 * (1.7 * right + avoid)}
    for name, want in parts.items():
        assert float(loss.parts[name]) == pytest.approx(want, rel=1e-9, abs=1e-12), name
    assert loss.total.item() == pytest.approx(sum(parts.values()), rel=1e-9)
    np.testing.assert_array_equal(loss.pseudo.mask_B.numpy(), mask)
    np.testing.assert_array_equal(loss.pseudo.label_B.numpy(), pseudo)

    got = {name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in net.named_parameters()}
    net.zero_grad()
    at = {("main", "x"): grad_x, ("main", "x_s"): a_s * grad_x_s, ("pseudo", "u_s"): grad_u}
    at |= {("worst", "x"): 0.8 * 1.7 * grad_right, ("worst", "u_w"): 0.8 * grad_avoid}
    torch.autograd.backward([heads[key] for key in at], [torch.from_numpy(g) for g in at.values()], retain_graph=True)
    kappa = 0.01 + 0.09 * (2 / (1 + np.exp(-step / 1000)) - 1)
    torch.autograd.backward([feat["x"], feat["u_w"]], [-kappa * away[name].grad for name in ("x", "u_w")])
    for name, parameter in net.named_parameters():
        want = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(got[name], want, rtol=1e-6, atol=1e-9, msg=name)


def test_gradcheck_without_reversal():
    """The reversed gradient is no derivative of the loss; at kappa 0 it vanishes, and what is left is one."""
    method = make(threshold=0.3, worst_weight=0.0, strong_label_weight=0.2)
    net, views = network_for(method), inputs(1)
    batch = make_batch(torch.tensor([0, 1, 3]), 5)
    weak = views["u_w"]

    def total(x, x_s, u_s):
        return method(Views({"x_s": x_s, "x": x, "u_w": weak, "u_s": u_s}), batch, NetworkForward(net), None).total

    assert torch.autograd.gradcheck(total, tuple(views[name].requires_grad_() for name in ("x", "x_s", "u_s")))


def test_each_head_learns_from_its_own_term_alone():
    labels = torch.tensor([0, 1, 3])
    whole = make(threshold=0.0)
    net, views = network_for(whole), inputs(2)
    grads = {}
    for name, options in {"all": {}, "no_worst": {"worst_weight": 0.0}, "no_pseudo": {"unlabeled_weight": 0.0}}.items():
        run(make(threshold=0.0, **options), net, views, labels, step=500)
        grads[name] = {n: p.grad.clone() for n, p in net.named_parameters()}
    for n in grads["all"]:
        assert torch.equal(grads["all"][n], grads["no_worst"][n]) == (n.startswith(("classifier", "heads.pseudo"))), n
        assert torch.equal(grads["all"][n], grads["no_pseudo"][n]) == (n.startswith(("classifier", "heads.worst"))), n


def test_the_features_are_moved_against_the_worst_case_head():
    method = make(threshold=2.0, reversal_low=0.1)
    net, views = network_for(method), inputs(3)
    labels = torch.tensor([0, 1, 3])
    run(method, net, views, labels)
    with_worst = net.backbone.weight.grad.clone()
    run(make(threshold=2.0, worst_weight=0.0), net, views, labels)
    push = with_worst - net.backbone.weight.grad
    before = float(run(method, net, views, labels).parts["worst_loss"])
    with torch.no_grad():
        net.backbone.weight -= 1e-3 * push / push.norm()
    assert float(run(method, net, views, labels).parts["worst_loss"]) > before


def test_the_coefficient_rises_from_low_to_high():
    method = make(reversal_low=0.02, reversal_high=0.12)
    got = [float(method.reversal(torch.tensor(k))) for k in (0, 1, 1000, 10**7)]
    assert got == pytest.approx([0.02, 0.02 + 0.1 * np.tanh(0.0005), 0.02 + 0.1 * np.tanh(0.5), 0.12])


def test_certain_rows_stay_finite():
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]], requires_grad=True)
    right, avoid = DST.worst_case(logits, torch.tensor([0, 1]), logits, torch.tensor([0, 0]))
    (grad,) = torch.autograd.grad(right + avoid, logits)
    assert avoid.item() == pytest.approx(-np.log(1e-6) / 2, rel=0.02) and torch.isfinite(grad).all()


def test_forwards_are_grouped_as_published():
    calls = []

    class Net(NetworkForward):
        def __call__(self, *views):
            calls.append([names[id(view)] for view in views])
            return super().__call__(*views)

        def head(self, name, *feats):
            calls.append((name, [len(feat) for feat in feats]))
            return super().head(name, *feats)

    heads = [("worst", [3, 5]), ("pseudo", [5])]
    for options, want in (
        ({}, [["x", "u_w", "u_s"]]),
        ({"strong_label_weight": 0.1}, [["x_s", "x", "u_w", "u_s"]]),
        ({"strong_label_weight": 0.1, "separate_forwards": True}, [["x_s"], ["x", "u_w"], ["u_s"]]),
        ({"separate_forwards": True}, [["x", "u_w"], ["u_s"]]),
    ):
        method, views = make(**options), inputs(0)
        names = {id(view): name for name, view in views.items()}
        calls.clear()
        given_views = Views({name: views[name] for name in method.views(method.config)})
        assert [name for group in want for name in group] == list(given_views)  # views that are forwarded together lie together
        method(given_views, make_batch(torch.tensor([0, 1, 2]), 5), Net(network_for(method)), None)
        assert calls == want + heads


def test_sixteen_bit_logits_are_read_as_float32():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([0, 1, 3])
    low, full = DST.worst_case(logits, labels, logits, labels), DST.worst_case(logits.float(), labels, logits.float(), labels)
    assert low[1].dtype == torch.float32 and torch.equal(low[0], full[0]) and torch.equal(low[1], full[1])


def test_heads_defaults_and_impossible_options():
    specs = DST.heads(DST.Config(), make_task(7, 1, 1))
    assert set(specs) == {"pseudo", "worst"} and all(spec.on_request for spec in specs.values())
    layers = build_head("mlp", 9, specs["worst"].options, "worst")
    assert [type(layer).__name__ for layer in layers] == ["Linear", "ReLU", "Dropout", "Linear"] and layers[0].out_features == 2048
    config = DST.Config()
    assert (config.threshold, config.labeled_target, config.strict_threshold, config.strong_label_weight) == (0.95, "label", False, 0.0)
    assert list(make().buffers()) == []
    for bad in ({"threshold": -1.0}, {"hidden": 0}, {"dropout": 1.5}, {"labeled_target": "truth"}, {"reversal_steps": 0}, {"worst_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DST.Config(**bad)
