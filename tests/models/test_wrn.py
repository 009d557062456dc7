"""Wide residual networks: recorded outputs of the published networks, parameter counts, the quirks one by one."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.errors import RecipeError
from fastssl.models.zoo import build_network
from fastssl.schema import ModelConfig
from fastssl.types import HeadSpec

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_fill(named_parameters: list[tuple[str, torch.Tensor]]) -> None:
    """The deterministic numbers with which the recorded networks were filled (a 32-bit mixing hash of tensor number and position)."""
    for i, (name, parameter) in enumerate(named_parameters):
        h = (2654435761 * np.arange(parameter.numel(), dtype=np.uint64) + 40503 * (i + 1)) % 2**32
        for _ in range(2):
            h = (h ^ (h >> 16)) * 0x45D9F3B % 2**32
        g = ((h ^ (h >> 16)) / 2**32 - 0.5) * np.sqrt(12)
        if parameter.dim() >= 2:
            values = g / np.sqrt(parameter[0].numel())
        else:
            values = 0.1 * g + (1 if name.endswith("weight") else 0)
        parameter.data.copy_(torch.from_numpy(values).view(parameter.shape))


def net(name="wrn_28_2", classes=10, heads=None, in_channels=3, **options):
    torch.manual_seed(0)
    return build_network(ModelConfig(name, options), in_channels=in_channels, num_classes=classes, heads=heads)


def count(module):
    return sum(p.numel() for p in module.parameters())


def check_golden(network, first_norm, golden, named, tolerance=2e-4):
    assert [tuple(p.shape) for _, p in named] == [ast.literal_eval(str(shape)) for shape in golden["param_shapes"]]
    golden_fill(named)
    x = torch.from_numpy(golden["x"])
    with torch.no_grad():
        network.train()
        train = network(x).logits_NC
        network.eval()
        after = network(x).logits_NC
    got = [train, first_norm.running_mean, first_norm.running_var, after]
    want = [golden[key] for key in ("logits_train", "bn_first_mean", "bn_first_var", "logits_eval_after_one_train_forward")]
    for a, b in zip(got, want, strict=True):
        assert np.abs(a.numpy() - b).max() <= tolerance * np.abs(b).max()


def test_wrn_28_2_equals_the_recorded_network():
    golden = np.load(GOLDEN / "longtail_counts_net_wrn28_2.npz")
    network = net()
    assert count(network) == golden["n_params"] == 1_467_610
    check_golden(network, network.backbone.stages[0][0].bn1, golden, list(network.named_parameters()))


def test_resnet50_with_small_stem_equals_the_recorded_network():
    golden = np.load(GOLDEN / "longtail_counts_net_resnet50.npz")
    heads = {"second": HeadSpec("linear", {"out": 127}), "rotation": HeadSpec("linear", {"out": 4})}
    network = net("torchvision/resnet50", 127, heads, small_stem=True)
    assert count(network) == golden["n_params"] == 24_028_994
    check_golden(network, network.backbone.bn1, golden, list(network.named_parameters()))


AUX = {"hidden": [32, 32], "out": 10, "bn": True, "activation": "leaky_relu"}


@pytest.mark.parametrize(
    ("name", "options", "hidden", "total"),
    [
        ("wrn_28_2", {}, 32, 1_473_252),
        ("wrn_28_2", {"conv_bias": True, "bn_eps": 1e-3}, 32, 1_475_284),
        ("wrn_var_37_2", {}, 64, 5_955_284),
    ],
)
def test_published_parameter_counts_with_auxiliary_head(name, options, hidden, total):
    network = net(name, heads={"aux": HeadSpec("mlp", AUX | {"hidden": [hidden, hidden]})}, **options)
    assert count(network) == total


def test_feature_widths():
    assert net("wrn_28_2").feat_dim == 128
    assert net("wrn_28_8").feat_dim == 512
    assert net("wrn_var_37_2").feat_dim == 256


def test_transition_blocks_read_raw_input_and_their_first_norm_is_dead():
    network = net().train()
    block = network.backbone.stages[1][0]
    x = torch.randn(4, 32, 8, 8)
    with torch.no_grad():
        before = block(x)
        block.bn1.weight.fill_(7.0)
        assert torch.equal(before, block(x))
    assert not block.bn1.weight.requires_grad and not block.bn1.bias.requires_grad
    assert block.bn1.num_batches_tracked == 0
    network(torch.randn(2, 3, 32, 32)).logits_NC.sum().backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # distributed training refuses parameters that never get a gradient


def test_dead_norm_statistics_move_on_request_without_changing_the_output():
    plain, tracking = net().train(), net(track_dead_norm=True).train()
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(plain(x).logits_NC, tracking(x).logits_NC)
    assert tracking.backbone.stages[1][0].bn1.num_batches_tracked == 1


def test_preact_transition_uses_the_first_norm():
    network = net(transition="preact").train()
    block = network.backbone.stages[1][0]
    x = torch.randn(4, 32, 8, 8)
    with torch.no_grad():
        before = block(x)
        block.bn1.weight.fill_(7.0)
        assert not torch.allclose(before, block(x))
    assert all(p.requires_grad for p in network.parameters())


def test_the_first_block_normalises_both_paths():
    block = net().backbone.stages[0][0].eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        h = nn.functional.leaky_relu(block.bn1(x), 0.1)
        want = block.shortcut(h) + block.conv2(nn.functional.leaky_relu(block.bn2(block.conv1(h)), 0.1))
        assert torch.allclose(block(x), want, atol=1e-6)


def test_start_values():
    network = net("wrn_28_8", conv_bias=True)
    conv = network.backbone.stages[1][1].conv1
    fan_out = conv.out_channels * 9
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.01)
    assert conv.bias.abs().max() <= (conv.in_channels * 9) ** -0.5 and conv.bias.abs().max() > 0
    assert network.backbone.bn.momentum == 0.001 and network.backbone.bn.eps == 1e-5
    xavier = net("wrn_28_8", classes=100, classifier_init="xavier").classifier
    assert xavier.weight.std().item() == pytest.approx((2 / 612) ** 0.5, rel=0.02) and not xavier.bias.any()


def test_dropout_acts_only_in_training():
    network = net(dropout=0.5)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(network.train()(x).logits_NC, network(x).logits_NC)
        assert torch.equal(network.eval()(x).logits_NC, network(x).logits_NC)


@pytest.mark.parametrize("options", [{"transition": "none"}, {"dropout": 1.0}, {"blocks": 0}, {"widths": [16, "x"]}])
def test_impossible_options_are_recipe_errors(options):
    with pytest.raises(RecipeError, match="wrn_28_2"):
        net(**options)
