"""Forwards that leave BatchNorm's running statistics alone: plain and grouped layers, student and teacher, and the gradients they give."""

import copy

import pytest
import torch
from torch import nn

from fastssl.models.ema import Teacher
from fastssl.models.joint import NetworkForward
from fastssl.models.network import Network
from fastssl.models.norm import convert_batchnorm, running_stats_kept
from fastssl.schema import BatchNormConfig, TeacherConfig


def network(groups=None):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4))
    net = Network(body, 4, nn.Linear(4, 3)).double()
    return net if groups is None else convert_batchnorm(net, BatchNormConfig(groups=groups))


def views():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 1, 5, 5, generator=generator, dtype=torch.float64) for n in (4, 6)]


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_same_answers_and_gradients_and_statistics_stay(groups):
    net, other = network(groups), network(groups)
    buffers = copy.deepcopy(dict(net.named_buffers()))
    got, want = NetworkForward(net).untracked(*views()), NetworkForward(other)(*views())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    assert not all(torch.equal(buffer, buffers[name]) for name, buffer in other.named_buffers())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.logits_NC, b.logits_NC)
    for outs in (got, want):
        sum(out.logits_NC.square().sum() for out in outs).backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("groups", [None, 2])
def test_tracking_comes_back_even_after_an_error(groups):
    net = network(groups)
    with pytest.raises(RuntimeError, match="no matter"), running_stats_kept(net):
        raise RuntimeError("no matter")
    before = copy.deepcopy(dict(net.named_buffers()))
    NetworkForward(net)(*views())
    assert not all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_evaluation_mode_still_uses_running_statistics():
    net = network(2).eval()
    a, b = NetworkForward(net).untracked(views()[0]), NetworkForward(net)(views()[0])
    assert torch.equal(a.logits_NC, b.logits_NC)


def test_layers_that_never_track_stay_so():
    layer = nn.BatchNorm1d(3, track_running_stats=False)
    with running_stats_kept(layer):
        pass
    assert layer.track_running_stats is False


def test_the_teacher_too():
    teacher = Teacher(network(), TeacherConfig(mode="train"), 10)
    before = copy.deepcopy(dict(teacher.network.named_buffers()))
    out = teacher.untracked(views()[0])
    assert all(torch.equal(buffer, before[name]) for name, buffer in teacher.network.named_buffers())
    assert not out.logits_NC.requires_grad and torch.equal(out.logits_NC, teacher(views()[0]).logits_NC)
