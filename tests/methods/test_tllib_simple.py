"""Oracle, head-only ERM, Pseudo-Label, Pi model, Mean Teacher, UDA and Noisy Student: those without a moving state of their own."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import methods
from fastssl.types import Out, View, Views
from tests.golden.identity import build_method, forward_backward, make_batch, make_task
from tests.methods import reference_tllib as reference
from tests.methods.reference import erm, softmax

LABELED = ("x", "x_s")
UNLABELED = {"pseudo_label": ["u"], "pi_model": ["u_1", "u_2"], "mean_teacher": ["u_w", "u_t"], "uda": ["u_w", "u_s"], "noisy_student": ["u_s"]}
COMMON = {
    "seed": st.integers(0, 10_000),
    "labeled": st.integers(1, 4),
    "unlabeled": st.integers(1, 6),
    "classes": st.integers(1, 5),
    "a_s": st.sampled_from([0.0, 0.1]),
    "separate": st.booleans(),
}
examples = settings(derandomize=True, max_examples=40, deadline=None)


def make_logits(name, seed=0, labeled=3, unlabeled=5, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = dict.fromkeys(LABELED, labeled) | dict.fromkeys(UNLABELED[name], unlabeled)
    return {view: (3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)).to(dtype) for view, n in rows.items()}


def make(name, logits, **options):
    (labeled, classes), unlabeled = logits["x"].shape, len(logits[UNLABELED[name][0]])
    sizes = options.pop("sizes", {})
    method = build_method(name, options, make_task(classes, labeled, unlabeled, **sizes))
    return method.double() if logits["x"].dtype == torch.float64 else method


def run(name, logits, step=0, epoch=0, **options):
    """(loss, gradients, labels) with labels 0, 1, ... in turn."""
    method = make(name, logits, **options)
    labels = torch.arange(len(logits["x"])) % logits["x"].shape[1]
    loss, grads = forward_backward(method, logits, make_batch(labels, len(logits[UNLABELED[name][0]]), step, epoch))
    return loss, grads, labels


def compare(name, logits, result, a_s, unsup, unsup_grads):
    """Total, parts and gradients against ERM's by hand and the given second term."""
    loss, grads, labels = result
    sup, want = erm(logits["x"].numpy(), logits["x_s"].numpy(), labels.numpy(), a_s)
    assert float(loss.parts["sup_loss"]) == pytest.approx(sup, rel=1e-10, abs=1e-13)
    assert float(loss.parts["unsup_loss"]) == pytest.approx(unsup, rel=1e-9, abs=1e-13)
    assert loss.total.item() == pytest.approx(sup + unsup, rel=1e-9, abs=1e-13)
    for view in logits:
        expected = (want | unsup_grads).get(view, np.zeros_like(logits[view].numpy()))
        np.testing.assert_allclose(grads[view].numpy(), expected, rtol=1e-8, atol=1e-12, err_msg=view)


# --- Pseudo-Label --------------------------------------------------------------------------------------------------------------------------------------


@examples
@given(**COMMON, threshold=st.sampled_from([0.0, 0.5, 0.9]), strict=st.booleans(), step=st.integers(0, 30))
def test_pseudo_label(seed, labeled, unlabeled, classes, a_s, separate, threshold, strict, step):
    logits = make_logits("pseudo_label", seed, labeled, unlabeled, classes)
    options = {"threshold": threshold, "strict_threshold": strict, "strong_label_weight": a_s, "separate_forwards": separate, "unlabeled_weight": 1.3}
    result = run("pseudo_label", logits, step, ramp_start=0.1, ramp_end=0.6, sizes={"total_steps": 30}, **options)
    weight = 1.3 * min(max((step / 30 - 0.1) / 0.5, 0), 1)
    u = logits["u"].numpy()
    unsup, grad, mask, pseudo, _ = reference.hard_rows(u, u, thresholds=[threshold] * classes, weight=weight, strict=strict)
    compare("pseudo_label", logits, result, a_s, unsup, {"u": grad})
    np.testing.assert_array_equal(result[0].pseudo.mask_B.numpy(), mask)
    np.testing.assert_array_equal(result[0].pseudo.label_B.numpy(), pseudo)


def test_the_weight_of_pseudo_labels_rises_or_stays():
    logits = make_logits("pseudo_label")

    def weights(**options):
        method = make("pseudo_label", logits, sizes={"total_steps": 100}, **options)
        return [float(method.ramp(torch.tensor(k), torch.float64)) for k in (0, 20, 40, 100)]

    assert weights() == [0.0, 0.5, 1.0, 1.0]
    assert weights(ramp_end=0.0) == [1.0] * 4
    assert weights(ramp_start=0.2, ramp_end=0.2) == [0.0, 0.0, 1.0, 1.0]


# --- Pi model, Mean Teacher ----------------------------------------------------------------------------------------------------------------------------


def ramp(epoch, length):
    return np.exp(-5 * (1 - min(epoch, length) / length) ** 2) if length else 1.0


@examples
@given(**COMMON, epoch=st.integers(0, 12), length=st.sampled_from([0, 1, 7]), sum_classes=st.booleans())
def test_pi_model(seed, labeled, unlabeled, classes, a_s, separate, epoch, length, sum_classes):
    logits = make_logits("pi_model", seed, labeled, unlabeled, classes)
    options = {"unlabeled_weight": 2.5, "ramp_epochs": length, "sum_classes": sum_classes, "strong_label_weight": a_s, "separate_forwards": separate}
    weight = 2.5 * ramp(epoch, length)
    unsup, grad_1, grad_2 = reference.squares(logits["u_1"].numpy(), logits["u_2"].numpy(), weight=weight, sum_classes=sum_classes)
    result = run("pi_model", logits, epoch=epoch, **options)
    compare("pi_model", logits, result, a_s, unsup, {"u_1": grad_1, "u_2": grad_2})
    assert result[0].pseudo is None


@examples
@given(**COMMON, epoch=st.integers(0, 12), length=st.sampled_from([0, 1, 7]), sum_classes=st.booleans(), sum_rows=st.booleans())
def test_mean_teacher(seed, labeled, unlabeled, classes, a_s, separate, epoch, length, sum_classes, sum_rows):
    logits = make_logits("mean_teacher", seed, labeled, unlabeled, classes)
    options = {"unlabeled_weight": 2.5, "ramp_epochs": length, "sum_classes": sum_classes, "sum_rows": sum_rows, "strong_label_weight": a_s}
    weight = 2.5 * ramp(epoch, length)
    unsup, grad, _ = reference.squares(logits["u_w"].numpy(), logits["u_t"].numpy(), weight=weight, sum_classes=sum_classes, sum_rows=sum_rows)
    result = run("mean_teacher", logits, epoch=epoch, separate_forwards=separate, **options)
    compare("mean_teacher", logits, result, a_s, unsup, {"u_w": grad})  # none for the teacher's view


def test_mean_teacher_asks_the_teacher_for_its_own_view():
    method = methods.get("mean_teacher")
    assert method.needs_teacher(method.Config()) and not method.moves_teacher
    assert calls_of("mean_teacher") == [("student", ["x", "u_w"], True), ("teacher", ["u_t"], False)]
    with pytest.raises(RuntimeError, match="teacher"):
        logits = make_logits("mean_teacher")
        make("mean_teacher", logits)(Views(logits), make_batch(torch.tensor([0, 1, 2]), 5), lambda *v: None, None)


# --- UDA -----------------------------------------------------------------------------------------------------------------------------------------------


@examples
@given(
    **COMMON,
    threshold=st.sampled_from([0.0, 0.6, 0.9, 1.5]),
    strict=st.booleans(),
    target=st.sampled_from([0.4, 1.0]),
    student=st.sampled_from([0.85, 1.0]),
    over=st.sampled_from(["all", "selected"]),
)
def test_uda(seed, labeled, unlabeled, classes, a_s, separate, threshold, strict, target, student, over):
    logits = make_logits("uda", seed, labeled, unlabeled, classes)
    options = {"threshold": threshold, "strict_threshold": strict, "target_temperature": target, "student_temperature": student, "mean_over": over}
    terms = {"target_temperature": target, "student_temperature": student, "over": over}
    unsup, grad, mask = reference.kl_rows(logits["u_w"].numpy(), logits["u_s"].numpy(), threshold=threshold, strict=strict, weight=0.7, **terms)
    result = run("uda", logits, unlabeled_weight=0.7, strong_label_weight=a_s, separate_forwards=separate, **options)
    compare("uda", logits, result, a_s, unsup, {"u_s": grad})
    np.testing.assert_array_equal(result[0].pseudo.mask_B.numpy(), mask)


@pytest.mark.parametrize("over", ["all", "selected"])
def test_uda_divides_by_all_rows_or_by_the_selected_ones(over):
    weak = torch.tensor([[9.0, 0, 0, 0], [0.1, 0, 0, 0], [0, 0, 9.0, 0], [0, 0, 0, 0.2], [0, 0, 0, 0]], dtype=torch.float64)
    logits = make_logits("uda") | {"u_w": weak}
    terms = {"threshold": 0.9, "strict": False, "weight": 1.0, "target_temperature": 0.4, "student_temperature": 1.0}
    unsup, grad, mask = reference.kl_rows(weak.numpy(), logits["u_s"].numpy(), over=over, **terms)
    assert mask.tolist() == [1, 0, 1, 0, 0]
    compare("uda", logits, run("uda", logits, threshold=0.9, mean_over=over), 0.0, unsup, {"u_s": grad})


def test_uda_without_a_selected_row_has_no_second_term():
    loss, grads, _ = run("uda", make_logits("uda"), threshold=1.01, mean_over="selected")
    assert float(loss.parts["unsup_loss"]) == 0.0 and not grads["u_s"].any() and torch.isfinite(loss.total)


def test_a_certain_target_has_entropy_zero():
    logits = make_logits("uda") | {"u_w": 1e4 * torch.eye(5, 4, dtype=torch.float64)}
    loss, grads, _ = run("uda", logits, threshold=0.0)
    assert torch.isfinite(loss.total) and torch.isfinite(grads["u_s"]).all()


@pytest.mark.parametrize(("law", "a"), [("linear", 0.3), ("log", 1 - np.exp(-1.5)), ("exp", np.exp(-3.5))])
def test_signal_annealing_leaves_out_known_rows(law, a):
    logits = make_logits("uda") | {"x": torch.tensor([[0.1, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 0.5, 0]], dtype=torch.float64)}
    eta = a * 0.75 + 0.25
    known = [softmax(row)[i] for i, row in enumerate(logits["x"].numpy())]
    kept = [p for p in known if p < eta]
    loss, grads, _ = run("uda", logits, step=3, signal_annealing=law, sizes={"total_steps": 10})
    assert 0 < len(kept) < 3 and float(loss.parts["sup_loss"]) == pytest.approx(-np.log(kept).sum() / len(kept))
    assert [bool(row.any()) for row in grads["x"]] == [p < eta for p in known]


def test_signal_annealing_with_every_row_known_gives_zero():
    logits = make_logits("uda") | {"x": 20 * torch.eye(3, 4, dtype=torch.float64)}
    loss, grads, _ = run("uda", logits, step=0, signal_annealing="linear", sizes={"total_steps": 10})
    assert float(loss.parts["sup_loss"]) == 0.0 and not grads["x"].any()


# --- Noisy Student -------------------------------------------------------------------------------------------------------------------------------------


def fill(method, table, order, batch=4):
    """``prepare`` as the engine calls it: batches in any order, the last one padded with index -1."""
    asked = []

    def predict(view):
        asked.append(view)
        for start in range(0, len(order), batch):
            index = torch.tensor((order[start : start + batch] + [-1] * batch)[:batch])
            logits = torch.where(index[:, None] >= 0, table[index], torch.full_like(table[index], torch.nan))
            yield index, Out(logits, logits)

    method.prepare(predict)
    return asked


@examples
@given(**COMMON, temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_noisy_student(seed, labeled, unlabeled, classes, a_s, separate, temperature):
    logits = make_logits("noisy_student", seed, labeled, unlabeled, classes)
    rng = np.random.default_rng(seed)
    table, index = torch.from_numpy(rng.normal(0, 3, (9, classes))), torch.from_numpy(rng.integers(0, 9, unlabeled))
    options = {"unlabeled_weight": 0.7, "temperature": temperature, "strong_label_weight": a_s, "separate_forwards": separate}
    method = make("noisy_student", logits, sizes={"num_unlabeled": 9}, **options)
    assert fill(method, table, rng.permutation(9).tolist()) == ["u_w"]
    assert torch.equal(method.table, table)
    batch = make_batch(torch.arange(labeled) % classes, unlabeled)
    batch.unlabeled = dataclasses.replace(batch.unlabeled, index_B=index)
    loss, grads = forward_backward(method, logits, batch)
    unsup, grad = 0.0, np.zeros((unlabeled, classes))
    for i, row in enumerate(logits["u_s"].numpy()):
        q, p = softmax(table[index[i]].numpy() / temperature), softmax(row / temperature)
        unsup -= 0.7 / unlabeled * (q * np.log(p)).sum()
        grad[i] = 0.7 / unlabeled * (p - q) / temperature
    compare("noisy_student", logits, (loss, grads, torch.arange(labeled) % classes), a_s, unsup, {"u_s": grad})
    assert torch.equal(loss.pseudo.label_B, table[index].argmax(1)) and loss.pseudo.mask_B.all()


def test_noisy_students_table_is_state_and_its_weak_view_is_rendered_once():
    method = make("noisy_student", make_logits("noisy_student"), sizes={"num_unlabeled": 3})
    assert {name: value.shape for name, value in method.state_dict().items()} == {"table": (3, 4)}
    views = method.views(method.config)
    assert views["u_w"] == View("unlabeled", "weak", each_step=False) and [n for n, v in views.items() if v.each_step] == ["x", "u_s"]
    assert not method.needs_teacher(method.config)


# --- oracle, head only ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a_s", [0.0, 0.3])
def test_the_oracle_is_erm_on_all_rows(a_s):
    oracle, erm_class = methods.get("oracle"), methods.get("erm")
    assert (oracle.labeled_rows, erm_class.labeled_rows, oracle.needs_unlabeled) == ("all", "split", False)
    logits = {name: value for name, value in make_logits("uda").items() if name in LABELED}
    results = [forward_backward(build_method(n, {"strong_weight": a_s}, make_task(4, 3, 0)), logits, make_batch(torch.tensor([0, 1, 2]), 0)) for n in
               ("oracle", "erm")]  # fmt: skip
    assert torch.equal(results[0][0].total, results[1][0].total) and all(torch.equal(results[0][1][n], results[1][1][n]) for n in logits)
    with pytest.raises(ValueError, match="strong_weight"):
        oracle.Config(strong_weight=-1.0)


def test_head_only_freezes_the_backbone():
    erm_class = methods.get("erm")
    assert erm_class.frozen(erm_class.Config()) == () and erm_class.frozen(erm_class.Config(head_only=True)) == (r"^backbone\.",)


# --- all of them ---------------------------------------------------------------------------------------------------------------------------------------


def calls_of(name, **options):
    """What the networks are asked: (who, views by name, with gradient) in order."""
    logits = make_logits(name)
    method = make(name, logits, **options)
    views = Views({view: logits[view] for view, wish in method.views(method.config).items() if wish.each_step})
    names = {id(tensor): view for view, tensor in views.items()}
    calls = []

    def network(who):
        def forward(*given_views):
            calls.append((who, [names[id(view)] for view in given_views], torch.is_grad_enabled()))
            outs = tuple(Out(view, view) for view in given_views)
            return outs[0] if len(outs) == 1 else outs

        return forward

    method(views, make_batch(torch.tensor([0, 1, 2]), 5), network("student"), network("teacher") if method.needs_teacher(method.config) else None)
    return calls


@pytest.mark.parametrize("name", UNLABELED)
def test_forwards_are_grouped_as_published(name):
    own = [view for view in UNLABELED[name] if view != "u_t"]
    joint = [call for call in calls_of(name, strong_label_weight=0.1) if call[0] == "student"]
    assert joint == [("student", ["x", "x_s", *own], True)]
    separate = [call for call in calls_of(name, strong_label_weight=0.1, separate_forwards=True) if call[0] == "student"]
    assert separate == [("student", [view], not (name == "uda" and view == "u_w")) for view in ("x", "x_s", *own)]


@pytest.mark.parametrize("name", UNLABELED)
def test_gradcheck(name):
    logits = make_logits(name, 7)
    options = {"pseudo_label": {"threshold": 0.5, "ramp_end": 0.0}, "uda": {"threshold": 0.5}, "noisy_student": {"temperature": 2.0}}.get(name, {})
    method = make(name, logits, strong_label_weight=0.3, **options)
    learned = [view for view in logits if view != "u_t" and not (name == "uda" and view == "u_w")]
    batch = make_batch(torch.tensor([0, 1, 2]), 5, epoch=3)

    def network(*views):
        outs = tuple(Out(view, view) for view in views)
        return outs[0] if len(outs) == 1 else outs

    def total(*tensors):
        return method(Views(logits | dict(zip(learned, tensors, strict=True))), batch, network, network).total

    assert torch.autograd.gradcheck(total, tuple(logits[view].requires_grad_() for view in learned))


@pytest.mark.parametrize("name", UNLABELED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_read_as_float32(name, dtype):
    low = make_logits(name, 3, dtype=dtype)
    losses = [run(name, logits, step=1, epoch=5)[0].total for logits in (low, {view: x.float() for view, x in low.items()})]
    assert losses[0].dtype == torch.float32 and torch.equal(*losses)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("pseudo_label", {"threshold": -1.0}),
        ("pseudo_label", {"ramp_end": 0.1, "ramp_start": 0.5}),
        ("pi_model", {"ramp_epochs": -1}),
        ("mean_teacher", {"unlabeled_weight": -1.0}),
        ("uda", {"target_temperature": 0.0}),
        ("uda", {"student_temperature": -1.0}),
        ("uda", {"mean_over": "some"}),
        ("uda", {"signal_annealing": "cosine"}),
        ("noisy_student", {"temperature": 0.0}),
    ],
)
def test_impossible_options_are_refused(name, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        methods.get(name).Config(**bad)


def test_the_defaults():
    got = {name: dataclasses.asdict(methods.get(name).Config()) for name in UNLABELED}
    assert all(config["strong_label_weight"] == 0.0 and config["separate_forwards"] is False for config in got.values())
    assert (got["pseudo_label"]["threshold"], got["pseudo_label"]["ramp_end"]) == (0.0, 0.4)
    assert (got["uda"]["threshold"], got["uda"]["target_temperature"], got["uda"]["student_temperature"], got["uda"]["mean_over"]) == (0.8, 0.4, 1.0, "all")
    assert got["uda"]["signal_annealing"] == "none" and got["noisy_student"]["temperature"] == 1.0
    assert not got["pi_model"]["sum_classes"] and not got["mean_teacher"]["sum_rows"] and got["mean_teacher"]["ramp_epochs"] == 80
