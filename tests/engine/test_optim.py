"""The optimiser against plain torch, its groups, its state by name, and that a step asks the device nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.engine.optim import build_optimizer, clip_grad, freeze, load_optimizer_tensors, optimizer_tensors, set_lr
from fastssl.errors import CheckpointError, RecipeError
from fastssl.schema import OptimConfig


def make_network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 6), nn.LayerNorm(6), nn.Linear(6, 2)
    ).to(dtype)  # fmt: skip


def build(network, lr=0.1, **options):
    dtype = next(network.parameters()).dtype
    return build_optimizer(network, OptimConfig(**options), torch.tensor(lr, dtype=dtype))


def backward(network, step):
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(step)).to(next(network.parameters()).dtype)
    for parameter in network.parameters():
        parameter.grad = None
    network(x).square().sum().backward()


def train(network, optimizer, rates, first=0):
    for step, lr in enumerate(rates, first):
        backward(network, step)
        set_lr(optimizer, lr)
        optimizer.step()


RATES = [0.1, 0.05, 0.2, 0.0, 0.01]
GROUPS = {"no_decay": ["bias", "norm"], "lr_factors": {r"^0\.": 0.1, r"weight$": 0.5}}


def plain_groups(network, lr, decay):
    """The groups of GROUPS written out by hand: (factor, decayed) -> parameters by position in the network."""
    conv, batch, linear, layer, head = network[0], network[1], network[4], network[5], network[6]
    return [
        {"params": [conv.weight], "lr": lr * 0.1, "weight_decay": decay},
        {"params": [conv.bias], "lr": lr * 0.1, "weight_decay": 0.0},
        {"params": [batch.weight, layer.weight], "lr": lr * 0.5, "weight_decay": 0.0},
        {"params": [linear.weight, head.weight], "lr": lr * 0.5, "weight_decay": decay},
        {"params": [batch.bias, linear.bias, layer.bias, head.bias], "lr": lr, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"name": "sgd", "momentum": 0.9, "nesterov": True},
        {"name": "sgd", "momentum": 0.7, "nesterov": False},
        {"name": "sgd", "momentum": 0.0, "nesterov": False},
        {"name": "adamw", "betas": [0.8, 0.95]},
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_plain_torch(options, layout):
    decay = 0.05
    ours, theirs = make_network(torch.float64).to(memory_format=layout), make_network(torch.float64)
    optimizer = build(ours, weight_decay=decay, **GROUPS, **options)
    groups = plain_groups(theirs, RATES[0], decay)
    if options["name"] == "sgd":
        plain = torch.optim.SGD(groups, lr=RATES[0], momentum=options["momentum"], nesterov=options["nesterov"], foreach=False)
    else:
        plain = torch.optim.AdamW(groups, lr=RATES[0], betas=tuple(options["betas"]), foreach=False)
    factors = [0.1, 0.1, 0.5, 0.5, 1.0]
    for step, lr in enumerate(RATES):
        backward(theirs, step)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.empty_like(mine).copy_(other.grad)  # the very same numbers: AdamW blows up rounding noise of gradients that should be 0
        set_lr(optimizer, lr)
        for group, factor in zip(plain.param_groups, factors, strict=True):
            group["lr"] = lr * factor
        optimizer.step()
        plain.step()
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13, msg=f"{name} at step {step}")


def test_a_zero_rate_moves_nothing():
    network = make_network()
    optimizer, before = build(network), copy.deepcopy(network.state_dict())
    train(network, optimizer, [0.0])
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_rates_are_tensors_of_their_own_that_keep_their_address():
    network = make_network()
    base = torch.tensor(0.1)
    optimizer = build_optimizer(network, OptimConfig(**GROUPS), base)
    tensors = [group["lr"] for group in optimizer.param_groups]
    assert len({t.data_ptr() for t in [*tensors, base]}) == len(tensors) + 1
    set_lr(optimizer, 0.4)
    assert [group["lr"] is t for group, t in zip(optimizer.param_groups, tensors, strict=True)] == [True] * len(tensors)
    assert {round(float(t), 6) for t in tensors} == {0.04, 0.2, 0.4}


def test_groups_name_their_parameters_and_first_factor_wins():
    network = make_network()
    optimizer = build(network, weight_decay=0.05, **GROUPS)
    found = {name: (group["lr_factor"], group["weight_decay"]) for group in optimizer.param_groups for name in group["param_names"]}
    assert list(sorted(found)) == sorted(name for name, _ in network.named_parameters())
    assert found["0.weight"] == (0.1, 0.05)
    assert found["0.bias"] == (0.1, 0.0)
    assert found["1.weight"] == (0.5, 0.0)
    assert found["6.weight"] == (0.5, 0.05)
    assert found["6.bias"] == (1.0, 0.0)


class RmsNorm(nn.Module):
    """A foreign normalisation, known by its class name."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm1d(3, affine=True), nn.RMSNorm(3), RmsNorm()])
def test_norms_are_known_by_type(norm):
    network = nn.ModuleDict({"a": norm, "b": nn.Linear(3, 3), "normal": nn.Linear(3, 3)})
    optimizer = build(network, weight_decay=0.05, no_decay=["norm"])
    exempt = {name for group in optimizer.param_groups if group["weight_decay"] == 0 for name in group["param_names"]}
    assert exempt == {f"a.{name}" for name, _ in norm.named_parameters()}


def test_patterns_exempt_too_and_an_empty_list_decays_everything():
    network = make_network()
    exempt = {n for g in build(network, no_decay=[r"^6\."]).param_groups if g["weight_decay"] == 0 for n in g["param_names"]}
    assert exempt == {"6.weight", "6.bias"}
    assert len(build(network, no_decay=[]).param_groups) == 1


def test_frozen_parameters_get_no_gradient_and_no_group():
    network = make_network()
    before = copy.deepcopy(network.state_dict())
    optimizer = build(network, freeze=[r"^0\.", r"^1\.weight"])
    train(network, optimizer, RATES)
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {"0.weight", "0.bias", "1.weight"}
    assert all(torch.equal(network.get_parameter(name), before[name]) for name in frozen)
    assert frozen.isdisjoint(name for group in optimizer.param_groups for name in group["param_names"])
    assert freeze(network, [r"^0\.bias"]) == ["0.bias"]


@pytest.mark.parametrize("options", [{"freeze": ["bakcbone"]}, {"lr_factors": {"bakcbone": 0.1}}, {"no_decay": ["bakcbone"]}])
def test_a_pattern_without_a_match_is_an_error(options):
    with pytest.raises(RecipeError, match=rf"optim\.{next(iter(options))}.*bakcbone.*0\.bias"):
        build(make_network(), **options)


def test_nothing_left_to_train_is_an_error():
    with pytest.raises(RecipeError, match="no parameter is left"):
        build(make_network(), freeze=["."])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_round_trip_goes_by_name_and_continues_exactly(name):
    network = make_network()
    optimizer = build(network, name=name, **GROUPS)
    train(network, optimizer, RATES[:3])
    weights, state = copy.deepcopy(network.state_dict()), {k: v.clone() for k, v in optimizer_tensors(optimizer).items()}
    train(network, optimizer, RATES[3:], first=3)

    other = make_network(seed=5)
    other.load_state_dict(weights)
    # Another grouping, so another order of parameters, on the way.
    resumed = build(other, name=name, **(GROUPS | {"lr_factors": {r"weight$": 0.5, r"^0\.bias": 0.1}}))
    load_optimizer_tensors(resumed, dict(reversed(state.items())))
    assert {k: v.tolist() for k, v in optimizer_tensors(resumed).items()} == {k: v.tolist() for k, v in state.items()}
    again = build(other, name=name, **GROUPS)
    load_optimizer_tensors(again, optimizer_tensors(resumed))
    train(other, again, RATES[3:], first=3)
    for mine, theirs in zip(other.parameters(), network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_exists_before_the_first_step_and_keeps_its_addresses():
    network = make_network().to(memory_format=torch.channels_last)
    for name in ("sgd", "adamw"):
        optimizer = build(network, name=name)
        before = {key: tensor.data_ptr() for key, tensor in optimizer_tensors(optimizer).items()}
        train(network, optimizer, RATES)
        assert {key: tensor.data_ptr() for key, tensor in optimizer_tensors(optimizer).items()} == before
    buffers = optimizer_tensors(optimizer)
    assert set(buffers) == {f"{slot}/{name}" for slot in ("exp_avg", "exp_avg_sq", "step") for name, _ in network.named_parameters()}
    assert buffers["exp_avg/0.weight"].is_contiguous(memory_format=torch.channels_last)


def test_a_foreign_state_is_refused_and_nothing_is_written():
    optimizer = build(make_network())
    state = {key: torch.ones_like(tensor) for key, tensor in optimizer_tensors(optimizer).items()}
    missing = {k: v for k, v in state.items() if k != "momentum_buffer/6.bias"}
    for wrong, what in (
        (missing, "lacks momentum_buffer/6.bias"),
        (state | {"momentum_buffer/7.bias": torch.ones(1)}, "unknown momentum_buffer/7.bias"),
        (state | {"momentum_buffer/6.bias": torch.ones(3)}, r"shape \(3,\)"),
    ):
        with pytest.raises(CheckpointError, match=what):
            load_optimizer_tensors(optimizer, wrong)
    assert all(not tensor.any() for tensor in optimizer_tensors(optimizer).values())


def test_clip_grad_scales_to_the_norm_and_returns_the_old_one():
    network = make_network()
    optimizer = build(network)
    backward(network, 0)
    grads = [p.grad.clone() for p in network.parameters()]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    assert torch.allclose(clip_grad(optimizer, float(norm) / 4), norm)
    for parameter, grad in zip(network.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad / 4, rtol=1e-4, atol=1e-7)
    clip_grad(optimizer, 1e9)
    torch.testing.assert_close(network[6].bias.grad, grads[-1] / 4, rtol=1e-4, atol=1e-7)


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise AssertionError(f"the host waits for the device: {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_update_reads_nothing_back(name):
    network = make_network()
    optimizer = build(network, name=name)
    for step in range(2):
        backward(network, step)
        with NoHostReads():
            set_lr(optimizer, 0.1)
            clip_grad(optimizer, 1.0)
            optimizer.step()


def test_the_watch_for_host_reads_sees_one():
    network = make_network()
    backward(network, 0)
    plain = torch.optim.SGD(network.parameters(), lr=torch.tensor(0.1), foreach=False)
    with pytest.raises(AssertionError, match="waits"), NoHostReads():
        plain.step()
