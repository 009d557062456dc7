"""The update in one pass against torch.optim.SGD followed by timm's ModelEmaV3, in Triton and in the reference."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from fastssl.kernels import SgdEma, sgd_ema_, triton_sgd_ema, use
from fastssl.kernels.sgd_ema import _tables, _update, bytes_moved

MODES = ("reference", "triton")


def network(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1, bias=False), nn.Flatten(), nn.Linear(64, 7))
    return layers.to(device, dtype, memory_format=torch.channels_last)


def groups(net, rates):
    decayed = [p for p in net.parameters() if p.dim() > 1]
    plain = [p for p in net.parameters() if p.dim() == 1]
    return [{"params": decayed, "lr": rates[0], "weight_decay": 0.05}, {"params": plain, "lr": rates[1], "weight_decay": 0.0}]


def train(net, optimizer, rates, after, steps=4):
    """A few updates with rates that change; ``after`` moves the average."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in range(2):
            rates[group].fill_((0.3, 0.05)[group] * (1 + step))
        x = torch.randn(6, 3, 6, 6, generator=generator)
        first = next(net.parameters())
        net(x.to(first)).square().mean().backward()
        after(optimizer)
        optimizer.zero_grad()


def theirs(momentum, nesterov, decay, device):
    net = network(device, torch.float64)
    ema = ModelEmaV3(net, decay=decay)
    rates = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)]
    optimizer = torch.optim.SGD(groups(net, rates), lr=rates[0], momentum=momentum, nesterov=nesterov)

    def after(optimizer):
        optimizer.step()
        ema.update(net)

    train(net, optimizer, rates, after)
    return net, ema.module, optimizer


def ours(mode, momentum, nesterov, decay, device):
    net = network(device)
    average = copy.deepcopy(net).requires_grad_(False)
    rates = [torch.zeros((), device=device) for _ in range(2)]
    optimizer = SgdEma(groups(net, rates), lr=rates[0], momentum=momentum, nesterov=nesterov)
    optimizer.average_into(zip(average.parameters(), net.parameters(), strict=True))
    with use(mode):
        train(net, optimizer, rates, lambda o: o.step(average_momentum=torch.tensor(decay, dtype=torch.float64, device=device)))
    return net, average, optimizer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_equals_sgd_and_model_ema_v3(mode, momentum, nesterov, device):
    wants, gots = theirs(momentum, nesterov, 0.9, device), ours(mode, momentum, nesterov, 0.9, device)
    for want, got in zip(wants[:2], gots[:2], strict=True):
        for (name, w), g in zip(want.named_parameters(), got.parameters(), strict=True):
            torch.testing.assert_close(g.double(), w, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    if momentum:
        for w, g in zip(wants[0].parameters(), gots[0].parameters(), strict=True):
            want, got = wants[2].state[w]["momentum_buffer"], gots[2].state[g]["momentum_buffer"]
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)


def random_lists(sizes, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(size, generator=g).to(device) for size in sizes] for _ in range(4)]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("block", [64, triton_sgd_ema.BLOCK])
def test_one_step_to_the_last_bit(nesterov, block, monkeypatch, device):
    """Products and sums are rounded one by one in both, odd lengths, an address that is no multiple of 16 bytes, one parameter without an average."""
    monkeypatch.setattr(triton_sgd_ema, "BLOCK", block)
    _tables.clear()
    results = []
    for mode in MODES:
        parameters, gradients, buffers, averages = random_lists([1, 17, 300, 128, 5], device)
        parameters[1] = torch.cat([parameters[1], parameters[1]])[1:18]
        rates = [torch.tensor(0.1, device=device), torch.tensor(0.7, device=device)]
        with use(mode):
            sgd_ema_(
                parameters, gradients, buffers, [*averages[:4], None], [rates[n % 2] for n in range(5)], [0.0, 0.1, 5e-4, 0.3, 1.0],
                momentum=0.9, nesterov=nesterov, average_momentum=torch.tensor(0.999, dtype=torch.float64, device=device),
            )  # fmt: skip
        results.append([*parameters, *buffers, *averages])
    for want, got in zip(*results, strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("mode", MODES)
def test_momentum_zero_copies_and_one_keeps(mode, device):
    for m in (0.0, 1.0):
        parameters, gradients, buffers, averages = random_lists([33], device)
        before = averages[0].clone()
        with use(mode):
            sgd_ema_(parameters, gradients, buffers, averages, [torch.tensor(0.1, device=device)], [0.0], momentum=0.9,
                     average_momentum=torch.tensor(m, device=device))  # fmt: skip
        assert torch.equal(averages[0], before if m else parameters[0])


@pytest.mark.parametrize("mode", MODES)
def test_without_average_momentum_averages_stay(mode, device):
    parameters, gradients, buffers, averages = random_lists([8, 9], device)
    before = [a.clone() for a in averages]
    with use(mode):
        sgd_ema_(parameters, gradients, buffers, averages, [torch.tensor(0.1, device=device)] * 2, [0.0, 0.0], momentum=0.9)
    assert all(torch.equal(a, b) for a, b in zip(averages, before, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_lie_otherwise_in_memory(mode, device):
    """A contiguous gradient of a channels-last parameter counts by position, not by address."""
    g = torch.Generator().manual_seed(0)
    p, grad = torch.randn(2, 3, 2, 2, generator=g).to(device), torch.randn(2, 3, 2, 2, generator=g).to(device)
    want = p - 0.5 * grad
    last = p.to(memory_format=torch.channels_last)
    with use(mode):
        sgd_ema_([last], [grad], [], [None], [torch.tensor(0.5, device=device)], [0.0], momentum=0.0)
    assert torch.equal(last, want)


def test_averages_that_lie_otherwise_are_refused(device):
    p = torch.randn(2, 3, 2, 2, device=device).to(memory_format=torch.channels_last)
    with use("triton"), pytest.raises(ValueError, match="must lie in memory alike"):
        sgd_ema_([p], [p.clone()], [], [p.contiguous()], [torch.tensor(0.5, device=device)], [0.0], momentum=0.0,
                 average_momentum=torch.tensor(0.9, device=device))  # fmt: skip


def test_no_parameters_and_no_gradients(device):
    sgd_ema_([], [], [], [], [], [], momentum=0.9)
    p = nn.Parameter(torch.ones(3, device=device))
    optimizer = SgdEma([p], lr=torch.tensor(1.0, device=device), momentum=0.9)
    average = torch.zeros(3, device=device)
    optimizer.average_into([(average, p)])
    with use("triton"):
        optimizer.step(average_momentum=torch.tensor(0.5, device=device))
    assert not average.any() and p.tolist() == [1, 1, 1]


def test_float64_stays_with_the_reference(device):
    parameters, gradients, buffers, averages = ([t.double() for t in tensors] for tensors in random_lists([4], device))
    with use("triton"):
        sgd_ema_(parameters, gradients, buffers, averages, [torch.tensor(0.1, device=device)], [0.0], momentum=0.9)
    assert not torch.equal(parameters[0], random_lists([4], device)[0][0].double())


def test_rates_must_be_tensors():
    with pytest.raises(TypeError, match="lr as a tensor"):
        SgdEma([nn.Parameter(torch.ones(1))], lr=0.1)  # type: ignore[arg-type]


def test_tables_are_made_once_per_set_of_addresses(device):
    parameters, gradients, buffers, averages = random_lists([5, 6], device)
    rate = torch.tensor(0.1, device=device)
    _tables.clear()
    with use("triton"):
        for _ in range(3):
            sgd_ema_(parameters, gradients, buffers, averages, [rate] * 2, [0.0, 0.0], momentum=0.9)
        assert len(_tables) == 1
        for _ in range(20):
            held = [g.clone() for g in gradients]
            sgd_ema_(parameters, held, buffers, averages, [rate] * 2, [0.0, 0.0], momentum=0.9)
            gradients = [*held]
    assert len(_tables) <= 8


def test_the_operator_keeps_torchs_rules(device):
    parameters, gradients, buffers, averages = random_lists([5, 6], device)
    arguments = (parameters, gradients, buffers, averages, [torch.tensor(0.1, device=device)], [0, 0], [True, True], [0.0, 0.1], 0.9, True,
                 torch.tensor(0.9, device=device))  # fmt: skip
    torch.library.opcheck(_update, arguments, test_utils=("test_schema", "test_faketensor"))


def test_bytes():
    assert bytes_moved(1) == (28, 48)
    assert bytes_moved(10, average=False) == (200, 200)
