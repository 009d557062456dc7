"""Weights from files: by name, under published prefixes, by order, and what is said when they do not fit."""

import logging

import pytest
import timm
import torch
from safetensors.torch import load_file

from fastssl.errors import CheckpointError
from fastssl.models.checkpoints import load_backbone, load_network, match_by_order, read_weights, save_weights
from fastssl.models.zoo import build_network
from fastssl.schema import ModelConfig


def network(name="small_cnn", weights="", classes=3, seed=0, **options):
    torch.manual_seed(seed)
    return build_network(ModelConfig(name, options or ({"width": 4} if name == "small_cnn" else {}), weights), in_channels=3, num_classes=classes)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "network.backbone.", "module.main.backbone."])
def test_backbones_load_from_every_known_place(tmp_path, suffix, prefix):
    source = network(seed=1).backbone
    tensors = {prefix + name: value for name, value in source.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    save_weights(path, tensors) if suffix == ".safetensors" else torch.save({"epoch": 3, "state_dict": tensors}, path)
    assert same(network(weights=str(path)).backbone, source)


def test_moco_files_give_the_query_encoder_only(tmp_path):
    query, key_encoder = network("torchvision/resnet18", seed=1).backbone, network("torchvision/resnet18", seed=2).backbone
    tensors = {f"module.encoder_k.{n}": v for n, v in key_encoder.state_dict().items()}
    tensors |= {f"module.encoder_q.{n}": v for n, v in query.state_dict().items()}
    tensors |= {"module.encoder_q.fc.0.weight": torch.zeros(4, 4), "module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    torch.save({"arch": "resnet18", "state_dict": tensors}, tmp_path / "moco.pth.tar")
    target = network("torchvision/resnet18").backbone
    report = load_backbone(target, tmp_path / "moco.pth.tar")
    assert same(target, query)
    assert report.prefix == "module.encoder_q." and report.unexpected == ("fc.0.weight",) and report.missing == ()


def test_files_with_other_names_load_by_order(tmp_path):
    source = timm.create_model("tf_efficientnet_lite0")
    tensors = {f"_layer{i}": v for i, (n, v) in enumerate(source.state_dict().items()) if not n.endswith("num_batches_tracked")}
    assert len(tensors) == 247  # as in the PyPI efficientnet-lite0 file, whose last two are the classifier
    torch.save(tensors, tmp_path / "lite0.pth")
    target = network("timm/tf_efficientnet_lite0").backbone
    report = load_backbone(target, tmp_path / "lite0.pth")
    assert report.matched_by == "order" and len(report.loaded) == 245
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(target.eval()(x), source.eval().forward_head(source.forward_features(x), pre_logits=True))


def test_order_demands_the_same_shapes():
    target = {"a": torch.zeros(3, 2), "b": torch.zeros(3), "n.num_batches_tracked": torch.zeros(())}
    good = {"x": torch.ones(3, 2), "y": torch.ones(3)}
    assert list(match_by_order(target, good)) == ["a", "b"]
    assert match_by_order(target, good | {"fc.weight": torch.ones(5, 3), "fc.bias": torch.ones(5)}) is not None
    assert match_by_order(target, good | {"more": torch.ones(5)}) is None
    assert match_by_order(target, {"x": torch.ones(3, 2)}) is None
    assert match_by_order(target, {"y": torch.ones(3), "x": torch.ones(3, 2)}) is None


def test_partial_files_load_and_say_what_is_missing(tmp_path, caplog):
    tensors = dict(network(seed=1).backbone.state_dict())
    del tensors["layers.0.weight"]
    save_weights(tmp_path / "part.safetensors", tensors | {"extra": torch.zeros(2)})
    with caplog.at_level(logging.WARNING, "fastssl"):
        report = load_backbone(network().backbone, tmp_path / "part.safetensors")
    assert report.missing == ("layers.0.weight",) and report.unexpected == ("extra",)
    assert "1 missing (layers.0.weight)" in caplog.text


def test_networks_need_every_entry(tmp_path):
    source = network(seed=1)
    save_weights(tmp_path / "all.safetensors", source.state_dict())
    target = network()
    load_network(target, tmp_path / "all.safetensors")
    assert same(target, source)
    save_weights(tmp_path / "backbone.safetensors", source.backbone.state_dict())
    with pytest.raises(CheckpointError, match="lacks 17 of"):
        load_network(target, tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match="classifier.weight has shape"):
        load_network(network(classes=4), tmp_path / "all.safetensors")


def test_checkpoint_folders_give_student_to_backbones_and_teacher_to_networks(tmp_path):
    student, teacher = network(seed=1), network(seed=2)
    save_weights(tmp_path / "student.safetensors", student.state_dict())
    save_weights(tmp_path / "teacher.safetensors", {f"network.{n}": v for n, v in teacher.state_dict().items()} | {"updates": torch.tensor(3)})
    assert same(network(weights=str(tmp_path)).backbone, student.backbone)
    target = network()
    load_network(target, tmp_path)
    assert same(target, teacher)


@pytest.mark.parametrize("content", ["missing", "garbage", "no tensors", "empty folder", "other model", "pickled code"])
def test_unusable_files_are_checkpoint_errors(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "garbage":
        path.write_bytes(b"not a checkpoint")
        (tmp_path / "weights.safetensors").write_bytes(b"not a checkpoint")
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_weights(tmp_path / "weights.safetensors")
    elif content == "no tensors":
        torch.save({"epoch": 3}, path)
    elif content == "empty folder":
        path = tmp_path
    elif content == "other model":
        torch.save({"a": torch.zeros(3)}, path)
    elif content == "pickled code":
        torch.save({"a": logging.Formatter()}, path)
    with pytest.raises(CheckpointError, match=str(path)):
        load_backbone(network().backbone, path)


def test_a_shape_that_differs_is_an_error_not_a_gap(tmp_path):
    save_weights(tmp_path / "w.safetensors", network(width=8).backbone.state_dict())
    with pytest.raises(CheckpointError, match="layers.0.weight has shape"):
        load_backbone(network().backbone, tmp_path / "w.safetensors")


def test_saving_is_complete_or_absent(tmp_path):
    path = tmp_path / "w.safetensors"
    shared = torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last)
    save_weights(path, {"a": shared, "b": shared})
    assert torch.equal(load_file(path)["b"], shared)
    with pytest.raises(Exception):  # noqa: B017 - whatever the writer says, the old file must stay
        save_weights(path, {"a": object()})  # type: ignore[dict-item]
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"] and torch.equal(load_file(path)["a"], shared)
