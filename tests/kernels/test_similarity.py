"""The instance branch in Triton against its reference in float64, values and gradients.  Without a GPU the kernels run in Triton's interpreter."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl import functional
from fastssl.functional import unit_rows
from fastssl.kernels import instance_matching, similarity, use
from fastssl.kernels.similarity import TORCH_READS, TORCH_WRITES, _forward, work

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.07}


def inputs(rows, entries, classes, width, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    student, teacher, bank = (unit_rows(torch.randn(n, width, generator=g)).to(device) for n in (rows, rows, entries))
    label = torch.randint(0, classes, (entries,), generator=g).to(device)
    prob = torch.softmax(3 * torch.randn(rows, classes, generator=g), dim=1).to(device)
    return student, teacher, bank, label, prob


def both(given, **temperatures):
    """(reference in float64, Triton): loss, neighbours, student gradient, for an upstream that differs from row to row."""
    results = []
    for mode in ("reference", "triton"):
        tensors = [t.double() if mode == "reference" and t.is_floating_point() else t for t in given]
        student = tensors[0].detach().requires_grad_()
        with use(mode):
            loss, neighbours = instance_matching(student, *tensors[1:], **(temperatures or TEMPERATURES))
        (loss * torch.linspace(-1, 2, len(loss), dtype=loss.dtype, device=loss.device)).sum().backward()
        results.append((loss, neighbours, student.grad))
    return results


def check(results, tolerance=5e-6):
    for name, want, got in zip(("loss", "neighbours", "gradient"), *results, strict=True):
        assert got.dtype == torch.float32 and want.dtype == torch.float64
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several row blocks, several shares of the bank, several tiles in each, the last ones partly or wholly empty."""

    def shares(rows, entries):
        tiles = -(-entries // 16)
        each = -(-tiles // 2)
        return 16, 16, each, -(-tiles // each)

    monkeypatch.setattr("fastssl.kernels.triton_instance.shares_of", shares)


@pytest.mark.parametrize("shape", [(1, 1, 2, 4), (5, 37, 7, 24), (3, 300, 10, 128)])
def test_equals_the_reference(shape, device):
    check(both(inputs(*shape, device)))


def test_many_tiles(small_tiles, device):
    check(both(inputs(19, 75, 5, 40, device)))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(17, 33, 3, 17), (2, 129, 100, 128), (33, 16, 2, 8), (16, 64, 11, 33)])
def test_many_shapes(shape, small_tiles, device):
    for seed in range(3):
        check(both(inputs(*shape, device, seed), student_temperature=0.1 * (1 + seed), teacher_temperature=0.05 + 0.3 * seed))


def test_low_temperatures_stay_finite(device):
    """Logits up to 1000: running maxima, not plain exponentials."""
    student, teacher, bank, label, prob = inputs(4, 20, 3, 16, device)
    student[0] = bank[3]
    check(both((student, teacher, bank, label, prob), student_temperature=1e-2, teacher_temperature=1e-3), 2e-4)


def test_equal_embeddings_share_evenly(device):
    """Ties everywhere: W and S are uniform."""
    student, teacher, bank, label, prob = inputs(2, 12, 3, 16, device)
    bank[:] = bank[0]
    results = both((student, teacher, bank, label, prob))
    check(results)
    torch.testing.assert_close(results[1][1].sum(1), torch.ones(2, device=device))


def test_rows_that_no_class_of_the_bank_suits(device):
    student, teacher, bank, label, prob = inputs(3, 20, 6, 16, device)
    label = label % 3
    prob[1, :3] = 0
    results = both((student, teacher, bank, label, prob))
    check(results)
    assert results[1][0][1] == 0 and not results[1][2][1].any()


def test_only_the_student_gets_a_gradient(device):
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in inputs(2, 9, 3, 8, device)]
    with use("triton"):
        loss, neighbours = instance_matching(*tensors, **TEMPERATURES)
    assert not neighbours.requires_grad
    loss.sum().backward()
    assert tensors[0].grad is not None and all(t.grad is None for t in tensors[1:])


def test_no_rows(device):
    with use("triton"):
        loss, neighbours = instance_matching(*inputs(0, 9, 3, 8, device), **TEMPERATURES)
    assert loss.shape == (0,) and neighbours.shape == (0, 3)


def test_bfloat16_embeddings_are_read_as_float32(device):
    student, teacher, bank, label, prob = inputs(3, 20, 4, 16, device)
    check(both((student.bfloat16().float(), teacher, bank.bfloat16().float(), label, prob)))
    with use("triton"):
        low = instance_matching(student.bfloat16(), teacher, bank.bfloat16(), label, prob, **TEMPERATURES)
        high = instance_matching(student.bfloat16().float(), teacher, bank.bfloat16().float(), label, prob, **TEMPERATURES)
    torch.testing.assert_close(low, high, rtol=0, atol=0)


def test_small_banks_and_wide_embeddings_stay_with_the_reference(monkeypatch, device):
    given = inputs(3, 20, 4, 136, device)
    with use("triton"):
        got = instance_matching(*given, **TEMPERATURES)
    assert all(torch.equal(a, b) for a, b in zip(got, functional.instance_matching(*given, **TEMPERATURES), strict=True))
    called = []
    monkeypatch.setattr(similarity, "runs_triton", lambda *_: called.append(1) or False)
    instance_matching(*inputs(3, 20, 4, 16, device), **TEMPERATURES)
    assert not called
    monkeypatch.setattr(similarity, "CROSSOVER", 60)
    instance_matching(*inputs(3, 20, 4, 16, device), **TEMPERATURES)
    assert called


def test_the_operator_keeps_torchs_rules(device):
    student, *rest = inputs(3, 20, 4, 16, device)
    torch.library.opcheck(_forward, (student.requires_grad_(), *rest, 0.1, 0.1))


def test_work():
    """Twice the products of torch, a fraction of its bytes and of its memory."""
    for entries, least in ((13_000, 12), (128_000, 23), (1_281_167, 25)):
        w = work(320, entries, 128, 1000)
        assert w["flop"] == 2 * w["flop_torch"]
        assert w["bytes_torch"] / w["bytes"] > least and w["bytes"] < 2 * w["bytes_floor"]
    assert w["held"] < 7e6 and w["held_torch"] > 8e9


class Matrices(TorchDispatchMode):
    """Counts reads and writes of tensors of so many numbers; views are neither."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.reads, self.writes = numbers, 0, 0

    def counts(self, value):
        """Tensors of that size whose numbers stand in memory: one row expanded to many is no matrix."""
        return isinstance(value, torch.Tensor) and value.numel() == self.numbers and value.untyped_storage().nbytes() >= self.numbers * value.element_size()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        read, made = ([t for t in tree_leaves(values) if self.counts(t)] for values in ((arguments, options), out))
        written = [t for t in made if all(t.data_ptr() != r.data_ptr() for r in read)]
        if written or not made:
            self.reads, self.writes = self.reads + len(read), self.writes + len(written)
        return out


def test_what_torch_reads_and_writes():
    student, teacher, bank, label, prob = inputs(5, 37, 3, 4, "cpu")
    with Matrices(5 * 37) as seen:
        functional.instance_matching(student.requires_grad_(), teacher, bank, label, prob, **TEMPERATURES)[0].sum().backward()
    assert (seen.reads, seen.writes) == (TORCH_READS, TORCH_WRITES)
