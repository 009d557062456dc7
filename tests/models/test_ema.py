"""The teacher: recorded updates of published code, laws, buffers, modes, frozen starts."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from fastssl.errors import CheckpointError, RecipeError
from fastssl.models.checkpoints import save_weights
from fastssl.models.ema import Teacher, teacher_momentum
from fastssl.models.zoo import build_network
from fastssl.schema import ModelConfig, TeacherConfig

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "simmatch_ema_a.npz")


def student(seed=0):
    torch.manual_seed(seed)
    return build_network(ModelConfig("small_cnn", {"width": 4, "layers": 2}), in_channels=3, num_classes=3)


def randomise(network, seed):
    """New random values in every floating entry; the counters get ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
        else:
            value.fill_(seed)
    return network


def recorded_network(mode):
    def trunk():
        return nn.ModuleDict({"l1": nn.Linear(6, 8, bias=False), "bn1": nn.BatchNorm1d(8)})

    if mode != "cifar":
        return nn.ModuleDict({"backbone": trunk(), "fc": nn.Linear(8, 4), "head": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))})
    shapes = {k.removeprefix("cifar.main0."): GOLDEN[k].shape for k in GOLDEN if k.startswith("cifar.main0.")}
    (h1, d), (h2, _), (k, _) = (shapes[f"head_aux.{i}.weight"] for i in (0, 3, 6))
    aux = nn.Sequential(nn.Linear(d, h1), nn.BatchNorm1d(h1), nn.ReLU(), nn.Linear(h1, h2), nn.BatchNorm1d(h2), nn.ReLU(), nn.Linear(h2, k))
    return nn.ModuleDict({"net": trunk(), "fc": nn.Linear(*reversed(shapes["fc.weight"])), "head_aux": aux})


def recorded_state(prefix):
    return {k.removeprefix(prefix): torch.from_numpy(np.array(GOLDEN[k])) for k in GOLDEN if k.startswith(prefix)}


@pytest.mark.parametrize(("mode", "buffers"), [("params", "leave"), ("eman", "average"), ("cifar", "copy")])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-7)])
def test_updates_equal_the_recorded_ones(mode, buffers, dtype, tolerance):
    network = recorded_network(mode).to(dtype)
    network.load_state_dict(recorded_state(f"{mode}.main0."))
    teacher = Teacher(network, TeacherConfig(momentum=float(GOLDEN["hp.momentum"]), buffers=buffers), 3)
    teacher.network.load_state_dict(recorded_state(f"{mode}.ema0."))
    for step in range(3):
        network.load_state_dict(recorded_state(f"{mode}.s{step}.main."))
        teacher.update(network)
        for name, want in recorded_state(f"{mode}.s{step}.ema.").items():
            got = teacher.network.state_dict()[name]
            assert torch.allclose(got.double(), want.double(), rtol=0, atol=tolerance), (step, name)


def test_equals_timms_moving_average():
    network = student()
    teacher, reference = Teacher(network, TeacherConfig(momentum=0.9, buffers="average"), 5), ModelEmaV3(network, decay=0.9)
    for step in range(5):
        randomise(network, step)
        teacher.update(network)
        reference.update(network)
    for name, value in reference.module.state_dict().items():
        assert torch.allclose(teacher.network.state_dict()[name], value, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize(("law", "momentum"), [("constant", 0.99), ("warmup", 0.7), ("cosine", 0.9), ("cosine", 0.999)])
def test_the_device_momentum_equals_the_pure_law(law, momentum):
    teacher = Teacher(student(), TeacherConfig(momentum=momentum, momentum_law=law), 20)
    for k in range(1, 21):
        teacher.updates.fill_(k)
        assert teacher.momentum().item() == pytest.approx(teacher_momentum(law, momentum, k, 20), abs=1e-15)


def test_momentum_laws_at_known_points():
    assert [teacher_momentum("warmup", 0.7, k, 9) for k in (1, 2, 3, 4, 5)] == [0, 1 / 2, 1 - 1 / 3, 0.7, 0.7]
    assert teacher_momentum("cosine", 0.99, 50, 100) == pytest.approx(0.995)
    assert teacher_momentum("cosine", 0.99, 100, 100) == pytest.approx(1.0)
    assert teacher_momentum("cosine", 0.996, 1, 100) == pytest.approx(1 - 0.004 * (math.cos(math.pi / 100) + 1) / 2)
    assert teacher_momentum("cosine", 0.9961, 70, 100) == 0.9961
    with pytest.raises(RecipeError, match="lineer"):
        teacher_momentum("lineer", 0.9, 1, 10)


def test_the_first_warmup_update_copies_the_student_exactly():
    network = student()
    teacher = Teacher(network, TeacherConfig(momentum_law="warmup"), 10)
    randomise(network, 5)
    teacher.update(network)
    assert all(torch.equal(a, b) for a, b in zip(teacher.network.parameters(), network.parameters(), strict=True))


@pytest.mark.parametrize("buffers", ["leave", "copy", "average", "copy_matching"])
def test_buffer_policies(buffers):
    network = randomise(student(), 1)
    pattern = r"layers\.1\."
    teacher = Teacher(network, TeacherConfig(momentum=0.75, buffers=buffers, buffers_matching=pattern), 10)
    old = {name: value.clone() for name, value in network.named_buffers()}
    randomise(network, 2)
    teacher.update(network)
    for name, value in teacher.network.named_buffers():
        new = dict(network.named_buffers())[name]
        if buffers == "average" and value.is_floating_point():
            assert torch.allclose(value, 0.75 * old[name] + 0.25 * new)
        else:
            copied = buffers in ("copy", "average") or (buffers == "copy_matching" and "layers.1." in name)
            assert torch.equal(value, new if copied else old[name]), name
    assert any("layers.1." in name for name in old) and any("layers.1." not in name for name in old)


def test_modes_do_not_follow_the_student():
    for mode in ("train", "eval"):
        teacher = Teacher(student(), TeacherConfig(mode=mode), 1)
        assert teacher.network.training == (mode == "train")
        assert not teacher.eval().network.training
        assert teacher.train().network.training == (mode == "train")


def test_teacher_forward_has_no_gradient_and_takes_joint_views():
    teacher = Teacher(student(), TeacherConfig(), 1)
    x = torch.randn(2, 3, 8, 8)
    a, b = teacher(x, x + 1)
    assert not a.logits_NC.requires_grad and torch.allclose(b.logits_NC, teacher(x + 1).logits_NC, atol=1e-6)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_teacher_is_a_copy_and_its_state_resumes():
    network = student()
    cfg = TeacherConfig(momentum=0.5, momentum_law="warmup")
    teacher = Teacher(network, cfg, 10)
    for seed in range(3):
        teacher.update(randomise(network, seed))
    resumed = Teacher(student(9), cfg, 10)
    resumed.load_state_dict(teacher.state_dict())
    randomise(network, 7)
    for one in (teacher, resumed):
        one.update(network)
    assert resumed.updates == 4
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert not torch.equal(next(teacher.network.parameters()), next(network.parameters()))


@pytest.mark.parametrize("buffers", ["leave", "copy", "average"])
@pytest.mark.parametrize("law", ["constant", "warmup", "cosine"])
def test_an_update_never_reads_a_tensor_on_the_host(law, buffers):
    with torch.device("meta"):  # meta tensors have no values: any read raises
        network = student()
        teacher = Teacher(network, TeacherConfig(momentum=0.9, momentum_law=law, buffers=buffers), 10)
    teacher.update(network)
    with pytest.raises((RuntimeError, NotImplementedError)):
        teacher.momentum().item()


def test_a_frozen_teacher_comes_from_a_file_and_stays(tmp_path):
    source = randomise(student(), 4)
    save_weights(tmp_path / "weights.safetensors", source.state_dict())
    network = student()
    teacher = Teacher(network, TeacherConfig(start=str(tmp_path / "weights.safetensors")), 1)
    teacher.update(network)
    assert all(torch.equal(a, b) for a, b in zip(teacher.network.state_dict().values(), source.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match="no weights file"):
        Teacher(network, TeacherConfig(start=str(tmp_path / "none.pth")), 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.2}, "teacher.momentum is 1.2"),
        ({"momentum_law": "linear"}, "momentum_law"),
        ({"buffers": "keep"}, "teacher.buffers"),
        ({"mode": "test"}, "teacher.mode"),
        ({"buffers": "copy_matching"}, "matches none"),
        ({"buffers": "copy_matching", "buffers_matching": "nothing"}, "matches none"),
        ({"buffers": "copy_matching", "buffers_matching": "("}, "regular expression"),
    ],
)
def test_impossible_policies_are_refused(options, words):
    with pytest.raises(RecipeError) as error:
        Teacher(student(), TeacherConfig(**options), 1)
    assert words in str(error.value)
