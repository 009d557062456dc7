"""Who computes: the mode, what it asks of tensors and machines, and that choosing the reference needs no triton."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl.errors import RecipeError
from fastssl.kernels import choice, consistency, instance_matching, pseudo_label_ce, runs_triton, sgd_ema_, use
from tests.helpers import run_python


@pytest.fixture(autouse=True)
def _no_mode_from_outside(monkeypatch):
    monkeypatch.delenv("FASTSSL_KERNELS", raising=False)


def test_auto_is_the_reference_on_cpus():
    assert not runs_triton(torch.zeros(2)) and choice.mode() == "auto"


def test_use_nests_and_ends(device):
    with use("triton"):
        assert runs_triton(torch.zeros(2, device=device), None)
        with use("reference"):
            assert not runs_triton(torch.zeros(2, device=device))
        assert runs_triton(torch.zeros(2, dtype=torch.bfloat16, device=device))
        assert not runs_triton(torch.zeros(2, device=device), torch.zeros(2, dtype=torch.float64, device=device))
    with pytest.raises(KeyError), use("triton"):
        raise KeyError
    assert choice.mode() == "auto"


def test_an_unknown_mode_is_refused():
    with pytest.raises(RecipeError, match="unknown kernel mode 'tritn' .did you mean 'triton'"), use("tritn"):
        pass


def test_the_environment_sets_the_mode(monkeypatch, device):
    monkeypatch.setenv("FASTSSL_KERNELS", "triton")
    assert runs_triton(torch.zeros(2, device=device))
    with use("reference"):
        assert not runs_triton(torch.zeros(2, device=device))
    monkeypatch.setenv("FASTSSL_KERNELS", "fast")
    with pytest.raises(RecipeError, match="unknown kernel mode 'fast'"):
        choice.mode()


def test_a_machine_without_triton(monkeypatch):
    monkeypatch.setattr(choice, "_installed", lambda: False)
    assert not runs_triton(torch.zeros(2))
    with use("triton"), pytest.raises(RecipeError, match="need the triton package"):
        runs_triton(torch.zeros(2))


def test_nothing_reads_a_number_from_the_device():
    """Tensors without values, as a recorded step demands: every loss and every gradient has its shape, and nothing asked what is in them."""
    with FakeTensorMode(), use("triton"):
        student, teacher, bank = torch.empty(4, 16, requires_grad=True), torch.empty(4, 16), torch.empty(50, 16)
        label, prob = torch.empty(50, dtype=torch.int64), torch.empty(4, 3)
        out = pseudo_label_ce(teacher, [student, student], threshold=torch.empty(16), counted_U=torch.empty(4, dtype=torch.bool), soft=True)
        match, neighbours = instance_matching(student, teacher, bank, label, prob, student_temperature=0.1, teacher_temperature=0.1)
        (out.loss_VU.mean() + match.mean() + consistency(student, teacher, "squared").mean()).backward()
        assert out.target_UC is not None and out.target_UC.shape == (4, 16) and neighbours.shape == (4, 3)
        assert student.grad is not None and student.grad.shape == (4, 16)
        lists = [[torch.empty(5), torch.empty(2, 2)] for _ in range(4)]
        sgd_ema_(*lists, [torch.empty(())] * 2, [0.0, 0.1], momentum=0.9, nesterov=True, average_momentum=torch.empty(()))


def test_the_reference_imports_no_triton_and_the_kernels_say_what_they_need():
    code = (
        "import sys, torch\n"
        "from fastssl.kernels import SgdEma, consistency, instance_matching, pseudo_label_ce, use\n"
        "pseudo_label_ce(torch.zeros(2, 3), [torch.zeros(2, 3)])\n"
        "print('triton' in sys.modules, flush=True)\n"
        "with use('triton'): pseudo_label_ce(torch.zeros(2, 3))\n"
    )
    done = run_python("-c", code, env={"TRITON_INTERPRET": "0", "FASTSSL_KERNELS": "auto"})
    assert done.returncode == 1 and done.stdout.strip() == "False"
    assert "kernels in mode 'triton' need CUDA tensors, not ones on 'cpu'" in done.stderr
