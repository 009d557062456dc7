"""Recorded updates: who is recorded and why not, every method equal to its eager run to the bit, drift that raises, checkpoints and evaluations in between."""

import pytest
import torch

from fastssl.augment import reference
from fastssl.engine import step as step_module
from fastssl.engine.capture import CapturedUpdate, ReplayedForward, decide_capture, standing
from fastssl.engine.launch import launch
from fastssl.engine.prepare import prepare_method
from fastssl.engine.state import collect, restore
from fastssl.engine.tape import Tape
from fastssl.engine.train import Trainer, train
from fastssl.errors import RecipeError, TrainingError
from tests.engine.method_worker import cases
from tests.engine.test_step import EVERYTHING, OpStream
from tests.helpers import metric_lines, tiny_recipe, without_times

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = ["data.labeled_batch=4", "data.unlabeled_batch=12", "optim.lr=0.01", "train.steps=8", *EVERYTHING]


@pytest.fixture(autouse=True)
def pixels_as_on_an_accelerator(monkeypatch):
    """The dense renderer, which does the same for every row: on the CPU the usual one groups rows by what was drawn for them."""

    def dense(policy, plan, pixels_BHWC, extent_B2, out, backend="auto"):
        return reference.render(policy, plan, pixels_BHWC, extent_B2, out, mode="dense")

    monkeypatch.setattr(step_module, "render", dense)


def make_trainer(data, tmp_path, *overrides, method="fixmatch"):
    recipe = tiny_recipe(data, tmp_path / "runs", *SMALL, *overrides, method=method)
    return Trainer(recipe, launch(recipe), "digest")


def captured(trainer, **options):
    return CapturedUpdate(trainer.updater, Tape(), **options)


def walk(trainer, update, steps, start=0):
    """Updates as the trainer makes them, epoch hooks included; the losses."""
    method, length, losses = trainer.updater.train_module.method, trainer.recipe.train.steps_per_epoch, []
    trainer.step = start
    with trainer._feed() as feed:
        for step in range(start, start + steps):
            if step % length == 0:
                with torch.no_grad():
                    method.on_epoch_start(step // length)
            losses.append(float(update(feed.next(), step).total.detach()))
            if (step + 1) % length == 0:
                with torch.no_grad():
                    method.on_epoch_end(step // length)
    return losses


def state(trainer):
    return {f"{group}/{name}": tensor.clone() for group, tensors in collect(trainer.updater).items() for name, tensor in tensors.items()}


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


# --- who is recorded ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "why, arguments",
    [
        ("CUDA device, this is 'cpu'", {"device": CPU, "world": 1}),
        ("2 processes", {"device": CUDA, "world": 2}),
        ("fp16 loss scaler", {"device": CUDA, "world": 1, "scaled": True}),
        ("method cannot be recorded: it asks a friend", {"device": CUDA, "world": 1, "uncapturable": "it asks a friend"}),
    ],
)
def test_what_cannot_be_recorded_says_why(why, arguments):
    decided = decide_capture("auto", **arguments)
    assert not decided.graph and why in decided.reason and "eagerly" in decided.reason
    with pytest.raises(RecipeError, match="train.capture: on: .*use 'auto' or 'off'") as told:
        decide_capture("on", **arguments)
    assert why in str(told.value)


def test_one_cuda_device_is_recorded_unless_told_not_to():
    assert decide_capture("auto", CUDA, 1).graph and not decide_capture("auto", CUDA, 1).asked
    assert decide_capture("on", CUDA, 1).asked
    off = decide_capture("off", CUDA, 1)
    assert not off.graph and "train.capture: off" in off.reason


def test_a_run_says_once_how_its_updates_run(tiny_data, tmp_path):
    run = train(tiny_recipe(tiny_data, tmp_path / "runs", "train.steps=1"))
    assert (run / "train.log").read_text().count("updates run eagerly (CUDA graphs need a CUDA device, this is 'cpu')") == 1
    with pytest.raises(RecipeError, match="CUDA graphs need a CUDA device"):
        train(tiny_recipe(tiny_data, tmp_path / "other", "train.capture=on"))
    assert not (tmp_path / "other").exists()


# --- equality -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases())
def test_a_recorded_run_is_the_eager_run_to_the_bit(tiny_data, tmp_path, case):
    """Three eager updates, the recording, then replays that run no Python, over two epochs' ends and a warm-up of the rate."""
    method, overrides = cases()[case]
    runs = []
    for recorded in (False, True):
        trainer = make_trainer(tiny_data, tmp_path, "batchnorm.groups=4", *overrides, method=method)
        prepare_method(trainer.updater, trainer.streams, trainer.views)
        update = captured(trainer) if recorded else trainer.updater
        losses = walk(trainer, update, 6)
        assert trainer.updater.clock.step == 6
        runs.append((losses, state(trainer)))
    assert runs[0][0] == runs[1][0]
    assert differing(runs[0][1], runs[1][1]) == []
    assert update.recorded is not None and len(update.recorded.operations) > 100
    assert len(set(runs[0][0])) > 1, "equal losses of six updates would prove nothing"


@pytest.mark.parametrize("case", cases())
def test_the_same_operations_with_the_same_scalars_every_time(tiny_data, tmp_path, case):
    method, overrides = cases()[case]
    trainer = make_trainer(tiny_data, tmp_path, "batchnorm.groups=4", *overrides, method=method)
    prepare_method(trainer.updater, trainer.streams, trainer.views)
    streams = []

    def noted(raw, step):
        with OpStream() as stream:
            loss = trainer.updater.update(raw)
        streams.append(stream.ops)
        return loss

    walk(trainer, noted, 6)
    assert len(streams[3]) > 100
    for first, second in zip(streams[3:], streams[4:], strict=False):
        assert next(((a, b) for a, b in zip(first, second, strict=True) if a != b), None) is None


@pytest.mark.parametrize("extra", [("train.precision=bf16",), ("model.options={width: 4, layers: 2, dropout: 0.5}",), ("optim.name=adamw",)])
def test_precision_dropout_and_optimiser_do_not_matter(tiny_data, tmp_path, extra):
    if "dropout" in extra[0]:
        extra = ("model.name=wrn_28_2", "model.options={dropout: 0.5}", "augment.size=8")
    states = []
    for recorded in (False, True):
        trainer = make_trainer(tiny_data, tmp_path, *extra, "train.threads=1", method="mean_teacher" if "wrn" not in extra[0] else "erm")
        update = captured(trainer) if recorded else trainer.updater
        losses = walk(trainer, update, 6)
        states.append({**state(trainer), "losses": torch.tensor(losses)})
    assert differing(*states) == []


class Counting(torch.nn.Module):
    """A method around another one that multiplies its loss by what ``factor`` says of the number of calls."""

    def __init__(self, method, factor):
        super().__init__()
        self.inner, self.factor, self.calls = method, factor, 0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *given):
        self.calls += 1
        loss = self.inner(*given)
        loss.total = self.factor(self.calls, loss.total)
        return loss


def test_a_number_of_the_host_that_moves_would_be_noticed(tiny_data, tmp_path):
    losses = []
    for recorded in (False, True):
        trainer = make_trainer(tiny_data, tmp_path)
        trainer.updater.train_module.method = Counting(trainer.updater.train_module.method, lambda calls, total: total * (1 + calls))
        losses.append(walk(trainer, captured(trainer) if recorded else trainer.updater, 6))
    assert losses[0][:4] == losses[1][:4] and losses[0][4:] != losses[1][4:]


# --- what a recording refuses ---------------------------------------------------------------------------------------------------------


def reading(calls, total):
    return total * (2.0 if total.detach().item() > 0 else 1.0)


def test_a_value_read_by_the_host_ends_a_run_that_asked_for_a_recording(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path)
    trainer.updater.train_module.method = Counting(trainer.updater.train_module.method, reading)
    with pytest.raises(TrainingError, match="cannot be recorded as a graph.*_local_scalar_dense.*train.capture=off"):
        walk(trainer, captured(trainer), 5)


def test_or_lets_it_go_on_eagerly_with_one_warning(tiny_data, tmp_path):
    notes, runs = [], []
    for recorded in (False, True):
        trainer = make_trainer(tiny_data, tmp_path)
        trainer.updater.train_module.method = Counting(trainer.updater.train_module.method, reading)
        update = captured(trainer, asked=False, note=notes.append) if recorded else trainer.updater
        runs.append(walk(trainer, update, 6))
    assert runs[0] == runs[1] and update.gave_up
    assert len(notes) == 1 and "_local_scalar_dense" in notes[0] and "eagerly" in notes[0]


def test_a_batch_of_another_shape_raises_with_both_values(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path)
    update = captured(trainer)
    walk(trainer, update, 5)
    other = make_trainer(tiny_data, tmp_path, "data.unlabeled_batch=16")
    with other._feed() as feed, pytest.raises(TrainingError, match=r"unlabeled.pixels_BHWC is uint8 \[16, 8, 8, 3\].* reads uint8 \[12, 8, 8, 3\]"):
        update(feed.next(), 5)
    with trainer._feed() as feed:
        raw = feed.next()
        with pytest.raises(TrainingError, match="streams \\['labeled'\\] arrived, the recorded update reads \\['labeled', 'unlabeled'\\]"):
            update({"labeled": raw["labeled"]}, 5)
        raw["labeled"].label_B = raw["labeled"].label_B.int()
        with pytest.raises(TrainingError, match="labeled.label_B is int32 .* reads int64"):
            update(raw, 5)


def moved(updater):
    method = updater.train_module.method
    method.register_buffer("extra", torch.zeros(3))


DRIFTS = {
    "a tensor elsewhere": (lambda u: setattr(u.train_module.network.classifier.weight, "data", u.train_module.network.classifier.weight.data.clone()),
                           "network: classifier.weight changed .*float32 .* at 0x.*now float32"),
    "a frozen weight": (lambda u: u.train_module.network.classifier.weight.requires_grad_(False), "classifier.weight changed"),
    "a mode": (lambda u: u.train_module.network.eval(), "mode of network: .* recorded with training, now evaluation"),
    "a decay": (lambda u: u.optimizer.param_groups[0].__setitem__("weight_decay", 0.25), "weight_decay of group 0 changed .* now 0.25"),
    "a clip": (lambda u: setattr(u, "clip_norm", 3.0), "optim.clip_norm changed .* recorded with 1.0, now 3.0"),
    "a new buffer": (moved, "method: extra changed .* recorded with not there"),
    "loaded meters": (lambda u: u.meters.load_tensors(u.meters.tensors()), "meter: .* changed"),
}  # fmt: skip


@pytest.mark.parametrize("what", DRIFTS)
def test_a_recipe_that_drifts_raises_with_both_values(tiny_data, tmp_path, what):
    change, told = DRIFTS[what]
    trainer = make_trainer(tiny_data, tmp_path)
    update = captured(trainer)
    walk(trainer, update, 6)
    update.check()
    change(trainer.updater)
    with pytest.raises(TrainingError, match=told):
        walk(trainer, update, 1, start=6)  # an epoch begins here


def test_what_comes_into_being_in_the_recording_is_refused(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path)

    def late(calls, total):
        if calls == 4:
            moved(trainer.updater)
        return total

    trainer.updater.train_module.method = Counting(trainer.updater.train_module.method, late)
    with pytest.raises(TrainingError, match="method: .*extra changed under the recorded update"):
        walk(trainer, captured(trainer), 5)


# --- between replays ------------------------------------------------------------------------------------------------------------------


def test_checkpoints_and_evaluations_between_replays_change_nothing(tiny_data, tmp_path):
    recipes = [tiny_recipe(tiny_data, tmp_path / name, *SMALL, "eval.every=1", "checkpoint.every=1", "log.every=1", "train.steps=7") for name in ("a", "b")]
    lines = []
    for number, recipe in enumerate(recipes):
        trainer = Trainer(recipe, launch(recipe), "digest")
        if number:
            trainer.update = captured(trainer)
            trainer.evaluator.replayed = ReplayedForward(Tape())
        lines.append(metric_lines(run_to_the_end(trainer, tmp_path / f"run{number}")))
    assert trainer.update.recorded is not None and len(trainer.evaluator.replayed._known) == 2
    assert without_times(lines[0]) == without_times(lines[1]) and len(lines[0]) == 14


def run_to_the_end(trainer, path):
    from fastssl.engine.runlock import RunLock
    from fastssl.engine.train import _train

    with RunLock() as lock:
        trainer.open(path, None, lock, notes=[])
        _train(trainer, None)
    return path


def test_a_resumed_run_records_again_and_ends_where_the_whole_one_does(tiny_data, tmp_path):
    from fastssl.engine.checkpoint import Snapshot

    whole = make_trainer(tiny_data, tmp_path)
    walk(whole, captured(whole), 12 - 4)
    first = make_trainer(tiny_data, tmp_path)
    walk(first, captured(first), 5)
    snapshot = Snapshot(collect(first.updater), {"step": 5})
    second = make_trainer(tiny_data, tmp_path)
    restore(second.updater, snapshot)
    update = captured(second, warm=1)
    walk(second, update, 3, start=5)
    assert update.recorded is not None and differing(state(whole), state(second)) == []


def test_what_is_taken_for_granted_names_every_tensor_of_the_state(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path)
    walk(trainer, trainer.updater, 1)
    places = " ".join(map(str, standing(trainer.updater).values()))
    for tensors in (trainer.updater.train_module.state_dict(), trainer.updater.teacher.state_dict()):
        for name, tensor in tensors.items():
            assert f"{tensor.data_ptr():#x}" in places, name


# --- torch.compile --------------------------------------------------------------------------------------------------------------------


def test_a_compiled_student_keeps_names_and_sees_every_call(tiny_data, tmp_path, monkeypatch):
    calls = []

    def compiled(network, **options):
        calls.append(options)
        return lambda *views: (calls.append(len(views[0])), network(*views))[1]

    plain = make_trainer(tiny_data, tmp_path)
    assert list(plain.updater.train_module.state_dict()) and not calls
    monkeypatch.setattr(torch, "compile", lambda network, **options: Wrapped(network, compiled(network, **options)))
    other = make_trainer(tiny_data, tmp_path, "train.compile=student")
    assert list(other.updater.train_module.state_dict()) == list(plain.updater.train_module.state_dict())
    assert walk(plain, plain.updater, 2) == walk(other, other.updater, 2)
    assert calls[0] == {"dynamic": False} and len(calls) > 2


class Wrapped(torch.nn.Module):
    """Stands where torch.compile's module stands: what it does not have it asks of the network."""

    def __init__(self, network, call):
        super().__init__()
        self.__dict__["network"], self.__dict__["call"] = network, call

    def __getattr__(self, name):
        return getattr(self.__dict__["network"], name)

    def forward(self, *views):
        return self.__dict__["call"](*views)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fixmatch", "simmatch"])
def test_compiled_and_recorded_together(tiny_data, tmp_path, method):
    """torch.compile for real. It steps aside where a tape listens, so recorded updates are the plain network's and differ by rounding."""
    losses = {}
    for name, overrides in {"plain": [], "eager": ["train.compile=student"], "recorded": ["train.compile=student"]}.items():
        trainer = make_trainer(tiny_data, tmp_path, *overrides, method=method)
        losses[name] = walk(trainer, captured(trainer) if name == "recorded" else trainer.updater, 6)
    assert losses["eager"] == pytest.approx(losses["recorded"], rel=1e-5)
    assert losses["eager"] == pytest.approx(losses["plain"], rel=1e-5)
