"""``pseudo_label_ce`` in Triton against its reference in float64, values and gradients.  Without a GPU the kernels run in Triton's interpreter."""

import itertools
import math

import pytest
import torch

from fastssl.kernels import pseudo_label_ce, use
from fastssl.kernels.pseudo_label_ce import _forward, bytes_moved
from tests.bf16_shim import rounded_bf16

INF = math.inf


@pytest.fixture(autouse=True)
def _rounding():
    with rounded_bf16():
        yield


@pytest.fixture
def narrow(monkeypatch):
    """Tiles of 2 rows and 16 classes: several programs, several blocks of classes."""
    monkeypatch.setattr("fastssl.kernels.triton_pseudo_label_ce.tile", lambda rows, columns: (2, 16))


def logits(rows, classes, seed=0, dtype=torch.float32, scale=4.0):
    return (torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def both(weak, strong, device="cpu", **options):
    """(reference in float64, Triton) results and strong gradients, for an upstream that differs from row to row."""
    results = []
    for mode in ("reference", "triton"):

        def moved(value, mode=mode):
            if not isinstance(value, torch.Tensor):
                return value
            value = value.to(device)
            return value.double() if mode == "reference" and value.is_floating_point() else value

        leaves = [moved(x).detach().requires_grad_() for x in strong]
        with use(mode):
            out = pseudo_label_ce(moved(weak), leaves, **{name: moved(value) for name, value in options.items()})
        if strong:
            upstream = torch.linspace(-1.5, 2.0, out.loss_VU.numel(), device=device).view_as(out.loss_VU)
            torch.where(torch.isfinite(out.loss_VU), out.loss_VU * upstream, 0.0).sum().backward()
        results.append((out, [leaf.grad for leaf in leaves]))
    return results


def check(results, tolerance=2e-6):
    (want, want_grads), (got, got_grads) = results
    assert torch.equal(got.label_U, want.label_U)
    assert torch.equal(got.mask_U.double(), want.mask_U)
    for name in ("loss_VU", "confidence_U", "target_UC"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=max(tolerance, 2**-8 if a.dtype == torch.bfloat16 else 0), atol=tolerance)


OPTIONS = {
    "fixmatch": dict(threshold=0.5),
    "strict": dict(threshold=0.5, strict=True, temperature=0.7),
    "flexmatch": dict(threshold="per class"),
    "scalar tensor": dict(threshold=torch.tensor(0.4)),
    "debiasmatch": dict(threshold=0.4, weak_shift_C="shift", strong_shift_C="shift"),
    "simpro": dict(threshold=0.4, weak_shift_C="shift", strong_shift_C="shift", soft=True),
    "softmatch": dict(weight_U="weight"),
    "acr": dict(threshold=0.6, weak_shift_C="shift", counted_U="counted", temperature=1.5),
    "all": dict(threshold="per class", weak_shift_C="shift", strong_shift_C="shift", weight_U="weight", counted_U="counted", temperature=0.8, soft=True),
}


def filled(options, rows, classes):
    g = torch.Generator().manual_seed(99)
    values = {
        "per class": torch.rand(classes, generator=g),
        "shift": torch.randn(classes, generator=g),
        "weight": torch.rand(rows, generator=g) * 3 - 0.5,
        "counted": torch.rand(rows, generator=g) > 0.6,
    }
    return {name: values[value] if isinstance(value, str) else value for name, value in options.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_reference(name, device):
    for (rows, classes), views in zip([(1, 2), (5, 37), (1, 100)], (1, 2, 1), strict=True):
        strong = [logits(rows, classes, seed=1 + v) for v in range(views)]
        check(both(logits(rows, classes), strong, device, **filled(OPTIONS[name], rows, classes)))


@pytest.mark.parametrize("name", ["fixmatch", "all"])
def test_several_programs_and_blocks(name, narrow, device):
    check(both(logits(5, 50), [logits(5, 50, 1)], device, **filled(OPTIONS[name], 5, 50)))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_many_shapes(name, narrow, device):
    for rows, classes in itertools.product((1, 2, 7), (1, 2, 15, 16, 17, 47)):
        for dtype in (torch.float32, torch.bfloat16):
            strong = [logits(rows, classes, seed, dtype) for seed in (1, 2)]
            check(both(logits(rows, classes, 0, dtype), strong, device, **filled(OPTIONS[name], rows, classes)), 4e-6)


def test_more_classes_than_one_block(device):
    check(both(logits(2, 21841), [logits(2, 21841, 1)], device, threshold=0.0, soft=True), 5e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_bfloat16_logits_are_read_as_float32(soft, device):
    weak, strong = logits(6, 21, 0, torch.bfloat16), logits(6, 21, 1, torch.bfloat16)
    results = both(weak, [strong], device, threshold=0.3, soft=soft)
    check(results)
    assert results[1][1][0].dtype == torch.bfloat16 and results[1][0].loss_VU.dtype == torch.float32


def test_ties_go_to_the_lowest_class(narrow, device):
    weak = torch.zeros(4, 40)
    weak[1, [7, 30]] = 3.0
    weak[2, [16, 17]] = 3.0
    weak[3, 39] = 3.0
    results = both(weak, [logits(4, 40)], device)
    check(results)
    assert results[1][0].label_U.tolist() == [0, 7, 16, 39]


@pytest.mark.parametrize("soft", [False, True])
def test_rows_that_do_not_count_have_no_loss_and_no_gradient(soft, device):
    """Not even where their logits are infinite or no number."""
    weak, strong = logits(4, 9, scale=0.1), logits(4, 9, 1)
    strong[0], strong[1, 3], strong[2, 0] = INF, math.nan, -INF
    for mode in ("reference", "triton"):
        leaf = strong.to(device).clone().requires_grad_()
        with use(mode):
            out = pseudo_label_ce(weak.to(device), [leaf], threshold=0.95, soft=soft)
        assert not out.mask_U.any() and not out.loss_VU.any()
    out.loss_VU.sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("soft", [False, True])
def test_minus_infinity(soft, narrow, device):
    """Classes that are ruled out, on either side; a target on a class that the strong view rules out costs infinitely much."""
    weak, strong = logits(4, 20), logits(4, 20, 1)
    weak[0, :17] = -INF
    strong[1, [2, 5, 19]] = -INF
    weak[1, [2, 5, 19]] = -INF
    weak[2] = -INF
    results = both(weak, [strong], device, soft=soft)
    check(results)
    got = results[1][0]
    assert torch.isnan(got.confidence_U[2]) and got.mask_U[2] == 0 and got.loss_VU[0, 2] == 0
    strong[3, int(weak[3].argmax())] = -INF
    assert pseudo_loss(weak, strong, device, soft)[3] == INF


def pseudo_loss(weak, strong, device, soft):
    with use("triton"):
        return pseudo_label_ce(weak.to(device), [strong.to(device)], soft=soft).loss_VU[0]


def test_a_threshold_is_met_exactly(device):
    """Two classes with equal logits have confidence one half, which >= lets pass and > does not."""
    weak = torch.zeros(2, 2, device=device)
    for mode in ("reference", "triton"):
        with use(mode):
            assert pseudo_label_ce(weak, threshold=0.5).mask_U.tolist() == [1, 1]
            assert pseudo_label_ce(weak, threshold=0.5, strict=True).mask_U.tolist() == [0, 0]


def test_views_that_are_rows_or_columns_of_a_larger_tensor(device):
    joint = logits(12, 15).to(device)
    weak, strong = joint[2:6], joint[6:10]
    check(both(weak, [strong], device, threshold=0.3))
    check(both(joint.T[:5], [joint.T[5:10]], device, threshold=0.3))


def test_pseudo_labels_alone(device):
    results = both(logits(3, 11), [], device, threshold=0.3)
    check(results)
    assert results[1][0].loss_VU.shape == (0, 3)


def test_no_rows(device):
    with use("triton"):
        out = pseudo_label_ce(torch.zeros(0, 5, device=device), [torch.zeros(0, 5, device=device)])
    assert out.loss_VU.shape == (1, 0)


def test_weak_logits_shifts_and_weights_get_no_gradient(device):
    for mode in ("reference", "triton"):
        weak, shift, weight, strong = (t.to(device).requires_grad_() for t in (logits(3, 5), torch.zeros(5), torch.ones(3), logits(3, 5, 1)))
        with use(mode):
            pseudo_label_ce(weak, [strong], weak_shift_C=shift, strong_shift_C=shift, weight_U=weight, soft=True).loss_VU.sum().backward()
        assert weak.grad is None and shift.grad is None and weight.grad is None and strong.grad is not None


def test_float64_stays_with_the_reference(device):
    with use("triton"):
        assert pseudo_label_ce(logits(2, 3).double(), [logits(2, 3, 1).double()]).loss_VU.dtype == torch.float64


@pytest.mark.parametrize("soft", [False, True])
def test_the_operator_keeps_torchs_rules(soft, device):
    """Schema, fake tensors, autograd registration, tracing as torch.compile does it."""
    weak, strong = logits(3, 7).to(device), logits(3, 7, 1).to(device).requires_grad_()
    arguments = (weak, strong, None, torch.zeros(7, device=device), None, None, None, 0.5, 1.0, False, soft, soft)
    torch.library.opcheck(_forward, arguments)


def test_bytes():
    """FixMatch's 448 rows of 1000 classes in bfloat16: 0.9 MB of logits; three reads and a write against two reads and a write."""
    moved, floor = bytes_moved(448, 1000)
    assert floor == 3 * 448 * 1000 * 2
    assert 4 / 3 < moved / floor < 1.36
    assert bytes_moved(448, 1000, selected=0.1)[0] < moved * 0.6
