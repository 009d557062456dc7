"""Grouped and global BatchNorm against torch's BatchNorm on the rows of each group, on one process and on two."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fastssl.errors import RecipeError
from fastssl.models.ema import Teacher
from fastssl.models.joint import joint_forward
from fastssl.models.norm import GroupedBatchNorm, convert_batchnorm, is_norm_parameter, local_groups, named_norm_parameters, sync_running_stats
from fastssl.models.zoo import build_network
from fastssl.schema import BatchNormConfig, ModelConfig, TeacherConfig
from fastssl.types import HeadSpec


def filled(layer):
    """The layer in float64 with non-trivial affine parameters and running statistics."""
    generator = torch.Generator().manual_seed(3)
    layer = layer.double()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer


def pair(make, groups):
    plain = filled(make())
    return plain, GroupedBatchNorm.like(filled(make()), groups=groups, over_ranks=False)


SHAPES = [(nn.BatchNorm1d, (6, 5)), (nn.BatchNorm1d, (6, 5, 3)), (nn.BatchNorm2d, (6, 5, 4, 3))]


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_group_equals_torch(kind, shape, momentum):
    plain, grouped = pair(lambda: kind(5, momentum=momentum), 1)
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        assert torch.allclose(plain(x), grouped(x), rtol=0, atol=1e-14)
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, grouped.state_dict()[name], rtol=0, atol=1e-14), name
    assert torch.allclose(plain.eval()(x), grouped.eval()(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("groups", [2, 3])
def test_groups_equal_separate_layers_on_the_pieces(kind, shape, groups):
    plain, grouped = pair(lambda: kind(5), groups)
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    weight = torch.randn(shape, dtype=torch.float64)
    wanted, stats = [], []
    for piece in x.chunk(groups):
        layer = copy.copy(plain)  # the same parameters, its own running statistics
        layer._buffers = {name: value.clone() for name, value in plain.named_buffers()}
        wanted.append(layer(piece))
        stats.append((layer.running_mean, layer.running_var))
    want = torch.cat(wanted)
    got = grouped(x)
    assert torch.allclose(got, want, rtol=0, atol=1e-13)
    assert torch.allclose(grouped.running_mean, torch.stack([m for m, _ in stats]).mean(0), rtol=0, atol=1e-13)
    assert torch.allclose(grouped.running_var, torch.stack([v for _, v in stats]).mean(0), rtol=0, atol=1e-13)
    assert grouped.num_batches_tracked == plain.num_batches_tracked + 1
    for a, b in zip(torch.autograd.grad((got * weight).sum(), [x, grouped.weight, grouped.bias]),
                    torch.autograd.grad((want * weight).sum(), [x, plain.weight, plain.bias]), strict=True):  # fmt: skip
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_gradients_by_finite_differences():
    layer = GroupedBatchNorm.like(filled(nn.BatchNorm1d(2)), groups=2, over_ranks=False)
    layer.running_mean = layer.running_var = None  # statistics of the batch only, so that the function is pure
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,)), (x, layer.weight, layer.bias))


def test_gradients_of_channels_last_rows_by_finite_differences():
    layer = GroupedBatchNorm.like(filled(nn.BatchNorm2d(2)), groups=2, over_ranks=False)
    layer.running_mean = layer.running_var = None
    x = torch.randn(4, 2, 3, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,)), (x, layer.weight, layer.bias))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_is_as_exact_as_float32_can_be_on_plain_backgrounds(groups, layout):
    """Two thirds of every image one grey: sums that are taken term by term in float32 lose four digits here, and one process would not equal two."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, 28, 28, generator=generator)
    x[:, :, :20] = 0.3371
    upstream = torch.randn(x.shape, generator=generator) * 0.01 + 0.003

    def results(dtype):
        layer = GroupedBatchNorm(4, groups=groups).to(dtype)
        rows = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
        y = layer(rows)
        assert y.is_contiguous(memory_format=layout)
        gradients = torch.autograd.grad(y, [rows, layer.weight, layer.bias], upstream.to(dtype).contiguous(memory_format=layout))
        return [y.detach(), layer.running_mean, layer.running_var, *gradients]

    for got, want in zip(results(torch.float32), results(torch.float64), strict=True):
        assert float((got.double() - want).norm() / want.norm()) < 3e-6


def test_one_value_per_channel_is_refused_in_every_layout():
    for groups in (1, 2):
        x = torch.randn(groups, 3, 1, 1)
        for rows in (x, x.expand(groups, 3, 1, 1)[:, :, :1], torch.randn(groups, 1, 1, 3).permute(0, 3, 1, 2)):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                GroupedBatchNorm(3, groups=groups)(rows)


def test_uneven_rows_are_a_recipe_error_in_training_only():
    layer = GroupedBatchNorm(3, groups=2)
    with pytest.raises(RecipeError, match="5 rows"):
        layer(torch.randn(5, 3))
    assert layer.eval()(torch.randn(5, 3)).shape == (5, 3)


@pytest.mark.parametrize(("groups", "world", "want"), [(1, 1, (1, False)), ("global", 1, (1, False)), ("global", 4, (1, True)), (1, 2, (1, True)),
                                                       (8, 1, (8, False)), (8, 2, (4, False)), (8, 8, (1, False))])  # fmt: skip
def test_how_groups_fall_on_ranks(groups, world, want):
    assert local_groups(groups, world) == want


@pytest.mark.parametrize(("groups", "world", "words"), [(2, 4, "4, 8, 12"), (3, 2, "2, 4, 6"), (0, 1, "whole number"), ("two", 1, "'two'"), (True, 1, "True")])
def test_groups_that_cannot_be_shared_are_refused(groups, world, words):
    with pytest.raises(RecipeError) as error:
        local_groups(groups, world)
    assert words in str(error.value)


@pytest.mark.parametrize("cfg", [BatchNormConfig(momentum=1.5), BatchNormConfig(eps=0.0)])
def test_impossible_momentum_and_eps_are_refused(cfg):
    with pytest.raises(RecipeError, match="batchnorm"):
        convert_batchnorm(nn.BatchNorm1d(2), cfg)


@pytest.mark.parametrize("name", ["small_resnet", "timm/tf_efficientnet_lite0"])
def test_conversion_keeps_keys_parameters_and_what_the_network_computes(name):
    def make(groups):
        torch.manual_seed(0)
        return build_network(ModelConfig(name), in_channels=3, num_classes=4, batchnorm=BatchNormConfig(groups=groups))

    plain, grouped = make(1), make(2)
    assert list(plain.state_dict()) == list(grouped.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in grouped.named_parameters()]
    for network, groups in ((plain, 1), (grouped, 2)):
        assert {m.groups for m in network.modules() if isinstance(m, GroupedBatchNorm)} == {groups}
        assert not any(type(m).__name__.startswith("BatchNorm") for m in network.modules())
    x = torch.randn(4, 3, 32, 32)
    for a, b in zip(grouped(x).feat_ND.chunk(2), (plain(part).feat_ND for part in x.chunk(2)), strict=True):
        assert torch.allclose(a, b, atol=2e-4)
    plain.load_state_dict(grouped.state_dict())
    assert torch.allclose(plain.eval()(x).feat_ND, grouped.eval()(x).feat_ND, atol=1e-5)


def test_conversion_keeps_frozen_and_shared_layers():
    shared = nn.BatchNorm2d(3).requires_grad_(False)
    network = nn.Sequential(shared, nn.Sequential(shared), nn.BatchNorm2d(3))
    convert_batchnorm(network, BatchNormConfig(groups=2))
    assert network[0] is network[1][0] and network[0] is not network[2]
    assert not network[0].weight.requires_grad and network[2].weight.requires_grad


def test_unknown_kinds_of_batchnorm_are_refused_rather_than_left_behind():
    with pytest.raises(RecipeError, match="BatchNorm3d"):
        convert_batchnorm(nn.Sequential(nn.BatchNorm3d(3)), BatchNormConfig(groups=2))
    assert type(convert_batchnorm(nn.Sequential(nn.BatchNorm3d(3)), BatchNormConfig())[0]) is nn.BatchNorm3d


def test_norm_parameters_are_found_by_layer_not_by_name():
    heads = {"aux": HeadSpec("mlp", {"out": 3, "bn": True})}
    network = build_network(ModelConfig("small_resnet", {"neck": {"kind": "layer_norm"}}), in_channels=3, num_classes=4, heads=heads)
    found = set(named_norm_parameters(network))
    want = {n for n, p in network.named_parameters() if p.dim() == 1 and n not in ("classifier.bias", "heads.aux.0.bias", "heads.aux.3.bias")}
    assert found == want == {n for n, _ in network.named_parameters() if is_norm_parameter(network, n)}
    assert {"neck.weight", "heads.aux.1.bias", "backbone.bn.weight"} <= found
    resnet = build_network(ModelConfig("timm/resnet18"), in_channels=3, num_classes=4)
    assert is_norm_parameter(resnet, "backbone.layer2.0.downsample.1.weight") and not is_norm_parameter(resnet, "backbone.layer2.0.downsample.0.weight")


# Two processes against one.

VIEWS = (4, 8)  # rows of two views over all processes
CASES = {"global": BatchNormConfig(groups="global"), "groups": BatchNormConfig(groups=2), "more groups": BatchNormConfig(groups=4)}


def three_steps(cfg, rank, world):
    """Joint forwards and input gradients of three batches, then the synchronised states of student and teacher; this rank's rows of every view."""
    torch.manual_seed(0)
    heads = {"aux": HeadSpec("mlp", {"out": 3, "bn": True})}
    network = build_network(ModelConfig("small_cnn", {"width": 4, "layers": 2}), in_channels=3, num_classes=4, heads=heads, batchnorm=cfg, world=world).double()
    teacher = Teacher(network, TeacherConfig(mode="train", buffers="leave"), 3)
    results = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        views, weights = [], []
        for rows in VIEWS:
            x, w = (torch.randn(rows, *shape, dtype=torch.float64, generator=generator) for shape in ((3, 8, 8), (4,)))
            views.append((x * (1 + torch.arange(rows).view(-1, 1, 1, 1)) + step).chunk(world)[rank].clone().requires_grad_())
            weights.append(w.chunk(world)[rank])
        outs = joint_forward(network, *views)
        loss = sum((o.logits_NC * w).sum() + o.heads["aux"].square().sum() for o, w in zip(outs, weights, strict=True))
        loss.backward()
        outs += teacher(*views)
        teacher.update(network)
        results.append([o.logits_NC.detach() for o in outs] + [v.grad for v in views])
    gradients = {name: p.grad for name, p in network.named_parameters()}
    for grad in gradients.values():
        if world > 1:
            dist.all_reduce(grad)
    sync_running_stats(network)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    sync_running_stats(network)
    assert all(torch.allclose(state[name], value, rtol=0, atol=1e-12) for name, value in network.state_dict().items())
    return {"rows": results, "gradients": gradients, "state": state, "teacher": dict(teacher.state_dict())}


def _process(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save({name: three_steps(cfg, rank, world) for name, cfg in CASES.items()}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (2, folder), nprocs=2)
        yield [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, two_processes):
    want = three_steps(CASES[case], 0, 1)
    parts = [results[case] for results in two_processes]
    for step in range(3):
        for i, whole in enumerate(want["rows"][step]):
            assert torch.allclose(torch.cat([part["rows"][step][i] for part in parts]), whole, rtol=0, atol=1e-10)
    for part in parts:
        for kind in ("gradients", "state", "teacher"):
            for name, value in want[kind].items():
                assert torch.allclose(part[kind][name], value, rtol=1e-10, atol=1e-10), (kind, name)


def test_the_cases_of_two_processes_are_different_computations(two_processes):
    logits = [two_processes[0][case]["rows"][0][0] for case in CASES]
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])
