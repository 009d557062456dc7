"""Joint forwards: one batch, no copy where possible, equal shares of every view in each group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastssl.errors import RecipeError
from fastssl.models.joint import concatenate, joint_forward, regroup
from fastssl.models.zoo import build_network
from fastssl.schema import BatchNormConfig, ModelConfig
from fastssl.types import HeadSpec, Out


class Recorder(nn.Module):
    """Returns its input rows, so that what reached the network can be compared row by row."""

    def __init__(self, groups=1):
        super().__init__()
        self.bn_groups = groups

    def forward(self, x):
        self.seen = x
        rows = x.flatten(1)
        return Out(rows, rows * 2, {"h": rows * 3})


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_every_group_holds_an_equal_share_of_every_view(groups, shares):
    sizes = [share * groups for share in shares]
    order, inverse = regroup(sizes, groups)
    view_of_row = torch.cat([torch.full((size,), v) for v, size in enumerate(sizes)])
    for group in view_of_row[order].chunk(groups):
        assert torch.bincount(group, minlength=len(sizes)).tolist() == shares
    assert torch.equal(order[inverse], torch.arange(sum(sizes)))
    views = [torch.randn(size, 2, 1, 1) for size in sizes]
    network = Recorder(groups)
    outs = joint_forward(network, *views)
    outs = (outs,) if len(views) == 1 else outs
    if len(views) > 1:
        assert torch.equal(network.seen, torch.cat(views)[order])
    for view, out in zip(views, outs, strict=True):
        assert torch.equal(out.logits_NC, view.flatten(1))
        assert torch.equal(out.feat_ND, view.flatten(1) * 2) and torch.equal(out.heads["h"], view.flatten(1) * 3)


def test_one_view_gives_one_out_and_two_give_a_tuple():
    x = torch.randn(4, 1, 2, 2)
    assert isinstance(joint_forward(Recorder(), x), Out)
    assert isinstance(joint_forward(Recorder(), x, x), tuple)


def test_adjacent_rows_of_one_buffer_are_not_copied():
    buffer = torch.randn(12, 3, 4, 4).to(memory_format=torch.channels_last)
    a, b, c = buffer[2:5], buffer[5:6], buffer[6:12]
    joined = concatenate([a, b, c])
    assert joined.data_ptr() == a.data_ptr() and joined.stride() == buffer.stride() and torch.equal(joined, buffer[2:12])


@pytest.mark.parametrize("case", ["gap", "order", "overlap", "other buffer", "gradient", "columns"])
def test_other_views_are_copied_right(case):
    buffer = torch.randn(8, 3, 4, 4)
    other = torch.randn(8, 3, 4, 4)
    views = {
        "gap": [buffer[:2], buffer[3:5]],
        "order": [buffer[4:8], buffer[:4]],
        "overlap": [buffer[:4], buffer[2:6]],
        "other buffer": [buffer[:4], other[4:]],
        "gradient": [buffer[:4], buffer[4:].requires_grad_()],
        "columns": [buffer[:4, :, :, :2], buffer[4:, :, :, 2:]],
    }[case]
    joined = concatenate(views)
    assert torch.equal(joined, torch.cat(views)) and joined.data_ptr() != views[0].data_ptr()
    if case == "gradient":
        joined.sum().backward()
        assert torch.all(views[1].grad == 1)


def test_joint_statistics_differ_from_separate_ones_but_groups_of_a_view_alone_do_not():
    torch.manual_seed(0)
    network = build_network(ModelConfig("small_cnn", {"width": 4}), in_channels=3, num_classes=3, heads={"h": HeadSpec("linear", {"out": 2})}).double()
    a, b = torch.randn(4, 3, 8, 8).double(), torch.randn(6, 3, 8, 8).double() + 1
    joint, alone = joint_forward(network, a, b)[0].logits_NC, network(a).logits_NC
    assert not torch.allclose(joint, alone)
    assert torch.allclose(joint, network(torch.cat([a, b])).logits_NC[:4], atol=1e-12)


def test_two_groups_equal_two_forwards_on_the_halves_of_every_view():
    torch.manual_seed(0)

    def make(groups):
        torch.manual_seed(1)
        cfg = BatchNormConfig(groups=groups)
        return build_network(ModelConfig("small_cnn", {"width": 4}), in_channels=3, num_classes=3, batchnorm=cfg).double()

    a, b = torch.randn(4, 3, 8, 8).double(), torch.randn(6, 3, 8, 8).double()
    outs = joint_forward(make(2), a, b)
    for half in range(2):
        want = make(1)(torch.cat([a.chunk(2)[half], b.chunk(2)[half]])).logits_NC
        got = torch.cat([outs[0].logits_NC.chunk(2)[half], outs[1].logits_NC.chunk(2)[half]])
        assert torch.allclose(got, want, atol=1e-12)


def test_uneven_views_are_refused_in_training_and_free_in_evaluation():
    x, y = torch.randn(4, 1, 1, 1), torch.randn(3, 1, 1, 1)
    with pytest.raises(RecipeError, match="3 rows"):
        joint_forward(Recorder(2), x, y)
    with pytest.raises(RecipeError, match="3 rows"):
        joint_forward(Recorder(2), y)
    assert torch.equal(joint_forward(Recorder(2).eval(), x, y)[1].logits_NC, y.flatten(1))


def test_grouped_joint_forward_keeps_channels_last():
    network = Recorder(2)
    views = [torch.randn(4, 3, 4, 4).to(memory_format=torch.channels_last) for _ in range(2)]
    joint_forward(network, *views)
    assert network.seen.is_contiguous(memory_format=torch.channels_last)
