"""``consistency`` in Triton against its reference in float64, values and gradients.  Without a GPU the kernels run in Triton's interpreter."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastssl.kernels import consistency, use
from fastssl.kernels.soft_ce import KINDS, _forward, bytes_moved
from tests.bf16_shim import rounded_bf16

INF = math.inf


@pytest.fixture(autouse=True)
def _rounding():
    with rounded_bf16():
        yield


@pytest.fixture
def narrow(monkeypatch):
    """Tiles of 2 rows and 16 classes: several programs, several blocks of classes."""
    monkeypatch.setattr("fastssl.kernels.triton_soft_ce.tile", lambda rows, columns: (2, 16))


def logits(rows, classes, seed, dtype=torch.float32):
    return (torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def both(student, teacher, kind, device, **options):
    """(reference in float64, Triton): loss and student gradient, for an upstream that differs from row to row."""
    results = []
    for mode in ("reference", "triton"):

        def moved(value, mode=mode):
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(device).double() if mode == "reference" else value.to(device)

        leaf = moved(student).detach().requires_grad_()
        with use(mode):
            loss = consistency(leaf, moved(teacher), kind, **{name: moved(value) for name, value in options.items()})
        (loss * torch.linspace(-1.5, 2, len(loss), device=device)).sum().backward()
        results.append((loss, leaf.grad))
    return results


def check(results, tolerance=3e-6):
    (want, want_grad), (got, grad) = results
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), want_grad, rtol=2**-8 if grad.dtype == torch.bfloat16 else tolerance, atol=tolerance)


def options(rows, classes):
    g = torch.Generator().manual_seed(9)
    shift = torch.randn(classes, generator=g)
    weight = (torch.rand(rows, generator=g) * 2 - 0.5).masked_fill(torch.arange(rows) == 1, 0.0)
    return {"student_temperature": 0.7, "teacher_temperature": 0.4, "student_shift_C": shift, "teacher_shift_C": -shift, "weight_B": weight}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind, device):
    for rows, classes in ((1, 2), (5, 37)):
        check(both(logits(rows, classes, 0), logits(rows, classes, 1), kind, device))
        check(both(logits(rows, classes, 0), logits(rows, classes, 1), kind, device, **options(rows, classes)), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_several_programs_and_blocks(kind, narrow, device):
    check(both(logits(5, 50, 0), logits(5, 50, 1), kind, device, **options(5, 50)), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_given_targets(kind, narrow, device):
    """Probabilities, also ones that hold zeros, and ones that do not sum to 1."""
    target = torch.softmax(logits(4, 20, 1), 1)
    target[0] = F.one_hot(torch.tensor(3), 20)
    target[1, 5:] = 0
    check(both(logits(4, 20, 0), target, kind, device, target_given=True))


@pytest.mark.parametrize("kind", KINDS)
def test_minus_infinity_and_rows_that_do_not_count(kind, device):
    student, teacher = logits(3, 12, 0), logits(3, 12, 1)
    student[0, [1, 7]] = teacher[0, [1, 7]] = -INF
    check(both(student, teacher, kind, device))
    student[1], teacher[2] = math.nan, INF
    for mode in ("reference", "triton"):
        leaf = student.to(device).requires_grad_()
        with use(mode):
            loss = consistency(leaf, teacher.to(device), kind, weight_B=torch.tensor([1.0, 0.0, 0.0], device=device))
        assert torch.isfinite(loss).all() and not loss[1:].any()
    loss.sum().backward()
    assert torch.isfinite(leaf.grad).all() and not leaf.grad[1:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind, device):
    results = both(logits(3, 21, 0, torch.bfloat16), logits(3, 21, 1, torch.bfloat16), kind, device)
    check(results)
    assert results[1][1].dtype == torch.bfloat16 and results[1][0].dtype == torch.float32


def test_equal_distributions_have_no_divergence(device):
    student = logits(4, 9, 0).to(device)
    for kind in ("kl", "squared"):
        with use("triton"):
            assert consistency(student, student.clone(), kind).abs().max() < 1e-6


def test_against_torch(device):
    student, teacher = logits(4, 9, 0).to(device), logits(4, 9, 1).to(device)
    p = torch.softmax(teacher, 1)
    with use("triton"):
        torch.testing.assert_close(consistency(student, teacher), F.cross_entropy(student, p, reduction="none"))
        torch.testing.assert_close(consistency(student, teacher, "kl"), F.kl_div(F.log_softmax(student, 1), p, reduction="none").sum(1))
        torch.testing.assert_close(consistency(student, teacher, "squared"), F.mse_loss(torch.softmax(student, 1), p, reduction="none").sum(1))


def test_what_cannot_be(device):
    with pytest.raises(ValueError, match="'hinge'; it must be one of ce, kl, squared"):
        consistency(torch.zeros(1, 2), torch.zeros(1, 2), "hinge")
    with use("triton"):
        assert consistency(torch.zeros(0, 3, device=device), torch.zeros(0, 3, device=device)).shape == (0,)


def test_the_operator_keeps_torchs_rules(device):
    arguments = (logits(3, 7, 0).to(device).requires_grad_(), logits(3, 7, 1).to(device), None, None, None, "squared", False, 1.0, 0.5)
    torch.library.opcheck(_forward, arguments)


def test_bytes():
    moved, least = bytes_moved(448, 1000)
    assert least == 3 * 896_000 and 5 / 3 < moved / least < 1.68
