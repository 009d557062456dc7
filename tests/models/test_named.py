"""Published networks by name: parameter counts, names, parameter groups, and the laws that their weights start from."""

from __future__ import annotations

import math

import pytest
import torch

from fastssl import methods
from fastssl.engine.optim import build_optimizer
from fastssl.errors import RecipeError
from fastssl.models.named import NAMED, published_network
from fastssl.models.zoo import build_network, list_models
from fastssl.recipe import load_recipe
from fastssl.recipe_proof import any_task
from fastssl.schema import ModelConfig
from fastssl.types import HeadSpec


def build(name, classes=10, heads=None, **options):
    torch.manual_seed(0)
    return build_network(ModelConfig(name, options), in_channels=3, num_classes=classes, heads=heads)


def skeleton(name, classes=10, heads=None, **options):
    """The network without numbers."""
    with torch.device("meta"):
        return build(name, classes, heads, **options)


def count(module):
    return sum(p.numel() for p in module.parameters())


def aux(hidden, classes=10):
    return {"aux": HeadSpec("mlp", {"hidden": [hidden, hidden], "out": classes, "bn": True, "activation": "leaky_relu"})}


@pytest.mark.parametrize(
    ("name", "classes", "heads", "total"),
    [
        ("wrn_28_2", 10, {}, 1_467_610),
        ("wrn_28_2_longtail", 10, {}, 1_467_610),
        ("wrn_28_2", 10, aux(32), 1_473_252),  # ShrinkMatch, CIFAR-10
        ("wrn_28_2_torchssl", 10, aux(32), 1_475_284),  # ShrinkMatch, SVHN
        ("wrn_var_37_2", 10, aux(64), 5_955_284),  # ShrinkMatch, STL-10
        ("resnet50_cifar", 127, {"fc1": HeadSpec("linear", {"out": 127}), "rot": HeadSpec("linear", {"out": 4})}, 24_028_994),
        ("simmatch_resnet50", 1000, {}, 23_508_032 + 2048 * 1000 + 1000),
        ("simmatchv2_resnet50", 1000, {}, 23_508_032 + 2 * 2048 + 2048 * 1000 + 1000),
        ("tllib_classifier", 100, {}, 23_508_032 + (2048 * 1024 + 1024) + 2 * 1024 + (1024 * 100 + 100)),
    ],
)
def test_parameter_counts(name, classes, heads, total):
    assert count(skeleton(name, classes, heads)) == total


def test_a_name_stands_for_builder_and_options_and_the_recipe_wins():
    assert published_network("wrn_28_2_torchssl", {"bn_eps": 0.5}) == ("wrn_28_2", {"conv_bias": True, "bn_eps": 0.5, "classifier_init": "xavier"})
    assert published_network("tllib_classifier", {"backbone": "timm/resnet18"})[0] == "timm/resnet18"
    assert published_network("small_cnn", {"width": 3}) == ("small_cnn", {"width": 3})
    assert skeleton("tllib_classifier", backbone="torchvision/resnet18").neck[0].in_features == 512
    with pytest.raises(RecipeError, match="backbone"):
        skeleton("wrn_28_2_longtail", backbone="timm/resnet18")
    assert set(NAMED) <= set(list_models()) and len(list_models()) == len(set(list_models()))
    with pytest.raises(RecipeError, match="did you mean 'tllib_classifier'"):
        skeleton("tllib_clasifier")


def test_three_networks_stand_behind_wrn_28_2():
    shrink, longtail, torchssl = (build(name) for name in ("wrn_28_2", "wrn_28_2_longtail", "wrn_28_2_torchssl"))
    assert [net.backbone.conv1.bias is not None for net in (shrink, longtail, torchssl)] == [False, False, True]
    assert [net.backbone.bn.eps for net in (shrink, longtail, torchssl)] == [1e-5, 1e-5, 1e-3]
    assert [bool(net.classifier.bias.any()) for net in (shrink, longtail, torchssl)] == [True, False, False]
    assert all(net.backbone.bn.momentum == 0.001 for net in (shrink, longtail, torchssl))
    assert all(block.entry == "neither" for net in (shrink, longtail, torchssl) for block in (net.backbone.stages[1][0], net.backbone.stages[2][0]))


def test_classifiers_start_as_published():
    default = build("wrn_28_8", 100).classifier  # PyTorch: uniform within 1 / sqrt(fan in), bias too
    assert default.weight.abs().max() <= 512**-0.5 and default.weight.std().item() == pytest.approx(512**-0.5 / math.sqrt(3), rel=0.02)
    xavier = build("wrn_28_8_torchssl", 100).classifier
    assert xavier.weight.std().item() == pytest.approx(math.sqrt(2 / 612), rel=0.02) and xavier.weight.abs().max() > 3 * math.sqrt(2 / 612)
    assert not xavier.bias.any()


def test_resnets_start_as_published():
    net = build("resnet50_cifar", 127)
    assert net.backbone.conv1.weight.shape == (64, 3, 3, 3) and net.backbone.conv1.stride == (1, 1)
    assert (
        isinstance(net.backbone.maxpool, torch.nn.Identity) and net.backbone.layer2[0].conv2.stride == (2, 2) and net.backbone.layer2[0].conv1.stride == (1, 1)
    )
    conv = net.backbone.layer3[1].conv2
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02)
    assert net.classifier.weight.std().item() == pytest.approx(math.sqrt(2 / (2048 + 127)), rel=0.02) and not net.classifier.bias.any()
    assert bool((net.backbone.layer1[0].bn3.weight == 1).all()), "the last BatchNorm of a block does not start at zero"
    assert net.backbone.bn1.momentum == 0.1 and net.backbone.bn1.eps == 1e-5


def test_the_transfer_classifier_starts_as_published():
    net = build("tllib_classifier", 5, backbone="torchvision/resnet18")
    linear, norm, relu, dropout = net.neck
    assert linear.weight.std().item() == pytest.approx(0.005, rel=0.01) and bool((linear.bias == 0.1).all())
    assert isinstance(relu, torch.nn.ReLU) and dropout.p == 0.5 and norm.num_features == 1024 and net.classifier.in_features == 1024


def recipe_groups(name):
    """(network, {(lr factor, decayed): parameter names}) of a recipe, as it trains."""
    recipe = load_recipe(name)
    method = methods.get(recipe.method.name)
    config, task = recipe.method.config, any_task(recipe)
    with torch.device("meta"):
        net = build_network(ModelConfig(recipe.model.name, recipe.model.options), in_channels=3, num_classes=10, heads=method.heads(config, task))
    optimizer = build_optimizer(net.to_empty(device="cpu"), recipe.optim, torch.tensor(1.0))
    return net, {(g["lr_factor"], g["weight_decay"] > 0): set(g["param_names"]) for g in optimizer.param_groups}


def test_transfer_recipes_train_the_backbone_at_a_tenth_and_decay_everything():
    _, groups = recipe_groups("tllib/self_tuning@cifar10_supervised")
    assert set(groups) == {(0.1, True), (1.0, True)}
    assert {name.partition(".")[0] for name in groups[0.1, True]} == {"backbone", "heads"}
    assert groups[1.0, True] == {"neck.0.weight", "neck.0.bias", "neck.1.weight", "neck.1.bias", "classifier.weight", "classifier.bias"}
    _, groups = recipe_groups("tllib/dst@cifar10_moco_v2")
    assert all(name.startswith("backbone.") for name in groups[0.1, True])
    assert {name for name in groups[1.0, True] if name.startswith("heads.")} == {
        f"heads.{head}.{layer}.{kind}" for head in ("pseudo", "worst") for layer in (0, 3) for kind in ("weight", "bias")
    }


def test_long_tailed_recipes_decay_by_name():
    _, groups = recipe_groups("acr/imagenet127@exp=0")
    free, decayed = groups[1.0, False], groups[1.0, True]
    shortcuts = {f"backbone.layer{n}.0.downsample.1.weight" for n in (1, 2, 3, 4)}
    assert shortcuts <= decayed, "the BatchNorm of a shortcut has no bn in its name"
    assert {name for name in decayed if name.endswith("weight") and "downsample.1" not in name} == {
        name
        for name in free | decayed
        if name.endswith("weight") and ("conv" in name or "downsample.0" in name or name in ("classifier.weight", "heads.balanced.weight"))
    }
    assert all(name.endswith("bias") or ".bn" in name for name in free)


def test_auxiliary_heads_batchnorm_is_decayed_as_published():
    _, groups = recipe_groups("simmatch/shrinkmatch_torchssl@svhn_40")
    assert {"heads.aux.1.weight", "heads.aux.4.weight"} <= groups[1.0, True] and "heads.aux.1.bias" in groups[1.0, False]
    assert {"backbone.bn.weight", "backbone.stages.0.0.bn1.weight", "backbone.stages.0.0.conv1.bias"} <= groups[1.0, False]


def test_imagenet_recipes_decay_everything_and_have_the_published_heads():
    net, groups = recipe_groups("simmatch/simmatchv2_imagenet@1p")
    assert set(groups) == {(1.0, True)} and isinstance(net.neck, torch.nn.LayerNorm) and net.neck.eps == 1e-5
    projection = {name: tuple(p.shape) for name, p in net.heads.projection.named_parameters()}
    assert projection == {"0.weight": (2048, 2048), "0.bias": (2048,), "2.weight": (128, 2048), "2.bias": (128,)}
    net, _ = recipe_groups("simmatch/shrinkmatch_imagenet@1p")
    shapes = {name: tuple(p.shape) for name, p in net.heads.aux.named_parameters() if name.endswith("weight")}
    assert shapes == {"0.weight": (512, 2048), "1.weight": (512,), "3.weight": (512, 512), "4.weight": (512,), "6.weight": (10, 512)}
