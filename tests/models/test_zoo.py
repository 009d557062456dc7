"""Networks by name, their heads and necks, and what a wrong recipe says."""

import pytest
import torch

from fastssl.errors import RecipeError
from fastssl.models.norm import GroupedBatchNorm
from fastssl.models.zoo import build_network, list_models
from fastssl.schema import BatchNormConfig, ModelConfig
from fastssl.types import HeadSpec


def net(name, in_channels=3, heads=None, **options):
    torch.manual_seed(0)
    return build_network(ModelConfig(name, options), in_channels=in_channels, num_classes=7, heads=heads)


@pytest.mark.parametrize(
    ("name", "in_channels", "size", "options"),
    [
        ("small_resnet", 1, 28, {}),
        ("small_resnet", 3, 32, {"width": 8, "depth": 2, "stages": 2, "stem_stride": 2}),
        ("small_cnn", 1, 28, {"width": 8}),
        ("wrn_28_2", 1, 16, {}),
        ("timm/resnet18", 1, 32, {}),
        ("timm/mobilenetv3_small_050", 3, 32, {}),
        ("timm/tf_efficientnet_lite0", 3, 32, {"drop_path_rate": 0.1}),
        ("torchvision/resnet18", 3, 32, {}),
        ("torchvision/mobilenet_v2", 3, 32, {}),
        ("torchvision/convnext_tiny", 3, 32, {}),
    ],
)
def test_every_kind_gives_features_and_logits(name, in_channels, size, options):
    network = net(name, in_channels, **options)
    x = torch.randn(2, in_channels, size, size).to(memory_format=torch.channels_last)
    out = network.to(memory_format=torch.channels_last)(x)
    assert out.logits_NC.shape == (2, 7) and out.feat_ND.shape == (2, network.feat_dim) and out.heads == {}
    assert torch.equal(out.logits_NC, network.classifier(out.feat_ND))
    out.logits_NC.square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None] == []


def test_small_networks_have_the_stated_feature_width():
    assert net("small_resnet", width=8, stages=3).feat_dim == 32
    assert net("small_cnn", width=8, layers=4).feat_dim == 64


def test_listed_names_include_all_three_kinds():
    names = list_models()
    assert len(names) == len(set(names)) > 500
    assert {"wrn_28_2", "wrn_28_8", "wrn_var_37_2", "small_resnet", "small_cnn", "timm/resnet50", "torchvision/resnet50"} <= set(names)


@pytest.mark.parametrize(
    ("name", "in_channels", "options", "words"),
    [
        ("wrn_28_3", 3, {}, "did you mean 'wrn_28_"),
        ("resnet50", 3, {}, "timm/<name>"),
        ("timm/resnet5000", 3, {}, "did you mean 'resnet50"),
        ("torchvision/resnett18", 3, {}, "did you mean 'resnet18'"),
        ("torchvision/resnet18", 1, {}, "use a timm model"),
        ("torchvision/squeezenet1_0", 3, {}, "no linear classifier"),
        ("torchvision/resnet18", 3, {"widht": 3}, "widht"),
        ("torchvision/mobilenet_v2", 3, {"small_stem": True}, "small_stem is for ResNets"),
        ("timm/resnet18", 3, {"widht": 3}, "widht"),
        ("timm/resnet18", 3, {"num_classes": 3}, "set by the dataset"),
        ("small_resnet", 3, {"widht": 3}, "did you mean 'width'"),
        ("small_resnet", 3, {"width": 0}, "at least 1"),
        ("small_resnet", 4, {}, "1 or 3 channels"),
        ("small_cnn", 3, {"classifier_init": "zero"}, "default, xavier"),
        ("small_cnn", 3, {"neck": "bottleneck"}, "kind"),
        ("small_cnn", 3, {"neck": {"kind": "botleneck"}}, "did you mean 'bottleneck'"),
    ],
)
def test_wrong_recipes_say_what_to_change(name, in_channels, options, words):
    with pytest.raises(RecipeError) as error:
        net(name, in_channels, **options)
    assert words in str(error.value)


def test_embedding_and_auxiliary_heads_have_published_layouts():
    heads = {
        "embed": HeadSpec("mlp", {"hidden": 64, "out": 16}),
        "aux": HeadSpec("mlp", {"hidden": [32, 24], "out": 7, "bn": True, "activation": "leaky_relu", "bn_momentum": 0.001, "bn_eps": 1e-3}),
        "deep": HeadSpec("mlp", {"layers": 3, "out": 5, "dropout": 0.5}),
        "second": HeadSpec("linear", {"out": 7, "init": "xavier"}),
    }
    network = net("small_cnn", heads=heads)
    out = network(torch.randn(3, 3, 16, 16))
    assert {name: tuple(value.shape) for name, value in out.heads.items()} == {"embed": (3, 16), "aux": (3, 7), "deep": (3, 5), "second": (3, 7)}
    keys = set(network.state_dict())
    assert {"heads.embed.0.weight", "heads.embed.2.bias", "heads.aux.0.weight", "heads.aux.1.running_mean", "heads.aux.4.weight", "heads.aux.6.bias"} <= keys
    assert network.heads.aux[1].momentum == 0.001 and network.heads.aux[1].eps == 1e-3 and network.heads.aux[2].negative_slope == 0.1
    assert [type(m).__name__ for m in network.heads.deep] == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert network.heads.deep[0].out_features == network.feat_dim
    assert torch.equal(out.heads["second"], network.heads.second(out.feat_ND)) and not network.heads.second.bias.any()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (HeadSpec("mpl", {"out": 3}), "did you mean 'mlp'"),
        (HeadSpec("linear", {}), "'out' must be given"),
        (HeadSpec("mlp", {"out": 3, "activation": "rleu"}), "did you mean 'relu'"),
        (HeadSpec("mlp", {"out": 3, "hiden": 4}), "did you mean 'hidden'"),
    ],
)
def test_wrong_heads_are_named(spec, words):
    with pytest.raises(RecipeError) as error:
        net("small_cnn", heads={"extra": spec})
    assert words in str(error.value) and "'extra'" in str(error.value)


def test_bottleneck_neck_feeds_classifier_and_heads():
    network = net("small_cnn", heads={"h": HeadSpec("linear", {"out": 2})}, neck={"kind": "bottleneck", "out": 48, "dropout": 0.25})
    assert network.feat_dim == 48 == network.classifier.in_features == network.heads.h.in_features
    layer = network.neck[0]
    assert layer.weight.std().item() == pytest.approx(0.005, rel=0.05) and torch.all(layer.bias == 0.1)
    assert isinstance(network.neck[1], GroupedBatchNorm) and network.neck[3].p == 0.25
    assert (network.train()(torch.randn(4, 3, 16, 16)).feat_ND >= 0).all()


def test_layer_norm_neck_normalises_the_features():
    network = net("small_cnn", neck={"kind": "layer_norm"})
    feat = network(torch.randn(4, 3, 16, 16)).feat_ND
    assert torch.allclose(feat.mean(1), torch.zeros(4), atol=1e-5)


def test_the_same_seed_gives_the_same_weights():
    a, b = net("small_resnet").state_dict(), net("small_resnet").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_batchnorm_overrides_reach_every_layer():
    network = build_network(ModelConfig("small_cnn"), in_channels=3, num_classes=2, batchnorm=BatchNormConfig(momentum=0.25, eps=0.5))
    layers = [m for m in network.modules() if isinstance(m, GroupedBatchNorm)]
    assert len(layers) == 3 and all(m.groups == 1 and m.momentum == 0.25 and m.eps == 0.5 for m in layers)
