"""One update: views in one buffer, keyed by draw position; fixed addresses; no read-back to the host."""

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.engine.launch import launch
from fastssl.engine.train import Trainer
from tests.helpers import tiny_recipe


def make_trainer(data, tmp_path, *overrides, method="fixmatch"):
    recipe = tiny_recipe(data, tmp_path / "runs", *overrides, method=method)
    return Trainer(recipe, launch(recipe), "digest")


class NoReadBack(TorchDispatchMode):
    """Fails where a tensor's value would be read by the host or decide a shape."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"an update must not call {name}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["fixmatch", "erm"])
def test_an_update_reads_nothing_back(tiny_data, tmp_path, method):
    trainer = make_trainer(tiny_data, tmp_path, "optim.clip_norm=1.0", method=method)
    updater = trainer.updater
    with trainer._feed() as feed:
        updater(feed.next(), 0)  # lazy set-up may look at values
        raw = feed.next()
        views = updater.renderer(raw)  # pixels have a test of their own: on the CPU the reference groups rows by what was drawn
        updater.renderer = lambda raw: views
        with NoReadBack():
            updater(raw, 1)


def test_no_read_back_would_be_noticed():
    with NoReadBack(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(1).item()


class OpStream(TorchDispatchMode):
    """Writes down every operation with all its arguments that are not tensors, and the value of every tensor that the host makes."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = pytree.tree_leaves((args, kwargs or {}))
        from_host = [leaf.tolist() for leaf in leaves if isinstance(leaf, torch.Tensor)] if "lift_fresh" in str(func) else []
        self.ops.append((str(func), [str(leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor)], from_host))
        return func(*args, **(kwargs or {}))


def op_streams(trainer, steps, call):
    """The operations of ``call(updater, raw, step)`` at the last three of ``steps`` updates; the first may set things up."""
    streams, updater = [], trainer.updater
    with trainer._feed() as feed:
        for step in range(steps):
            raw = feed.next()
            with OpStream() as stream:
                call(updater, raw, step)
            streams.append(stream.ops)
    return streams[-3:]


# Laws that treat all rows alike: on the CPU the reference renderer groups rows by which law was drawn for them.
ALIKE = ("augment.weak=[{flip: {}}, {pad_crop: {pad: 1}}]", "augment.strong=[{flip: {}}, {cutout: {side: 4}}]")
EVERYTHING = ("optim.clip_norm=1.0", "train.steps_per_epoch=2", "schedule.name=cosine_7_16", "schedule.warmup_steps=3", "teacher.momentum_law=warmup")


@pytest.mark.parametrize("method", ["fixmatch", "erm"])
@pytest.mark.parametrize("optimizer", [(), ("optim.name=adamw",)])
def test_an_update_reads_nothing_that_changes_on_the_host(tiny_data, tmp_path, method, optimizer):
    """Real renderer, a rate that changes at every update, epochs that end: the same operations with the same scalars, so a graph may replay them."""
    trainer = make_trainer(tiny_data, tmp_path, *ALIKE, *EVERYTHING, *optimizer, method=method)

    def prepared(updater, raw, step):
        updater.update(raw)

    first, second, third = op_streams(trainer, 5, prepared)
    assert len(first) > 100 and first == second == third
    assert int(trainer.updater.clock.tensors.step) == 5 and int(trainer.updater.clock.tensors.epoch) == 2, "the clock ticks inside"


def test_a_rate_from_the_host_would_be_noticed(tiny_data, tmp_path):
    """The whole call does write the host's rate: outside of ``update``, and the recorder sees it."""
    streams = op_streams(make_trainer(tiny_data, tmp_path, *ALIKE, *EVERYTHING), 4, lambda updater, raw, step: updater(raw, step))
    differing = {a[0] for one, other in zip(streams, streams[1:], strict=False) for a, b in zip(one, other, strict=True) if a != b}
    assert differing == {"aten.fill_.Scalar"}


def test_the_rate_of_an_update_is_on_the_device_before_it(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, *EVERYTHING)
    updater, seen = trainer.updater, []
    real = updater.update
    updater.update = lambda raw: seen.append([float(group["lr"]) for group in updater.optimizer.param_groups]) or real(raw)
    with trainer._feed() as feed:
        for step in range(4):
            updater(feed.next(), step)
    assert seen == [[pytest.approx(updater.learning_rate(step))] * len(updater.optimizer.param_groups) for step in range(4)]
    assert len({rates[0] for rates in seen}) == 4 and updater.clock.step == 4


def test_views_are_row_ranges_of_one_buffer_and_never_move(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path)
    renderer = trainer.updater.renderer
    with trainer._feed() as feed:
        views = renderer(feed.next())
        at = [view.data_ptr() for view in views.values()]
        first = {name: view.clone() for name, view in views.items()}
        again = renderer(feed.next())
    tensors = list(views.values())
    assert [t.data_ptr() for t in again.values()] == at
    for left, right in zip(tensors, tensors[1:], strict=False):
        assert left.data_ptr() + left.numel() * left.element_size() == right.data_ptr()
    for tensor in tensors:
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert all(not torch.equal(first[name], again[name]) for name in first)
    assert all(float(row.std()) > 0 for view in first.values() for row in view), "a view without content would prove nothing"


def test_views_depend_on_the_draw_and_not_on_the_batch_they_are_in(tiny_data, tmp_path):
    """The same draw in a batch of another size gives the same pixels: what makes world size and resume invisible."""
    whole = make_trainer(tiny_data, tmp_path)
    half = make_trainer(tiny_data, tmp_path, "data.labeled_batch=2", "data.unlabeled_batch=4")
    with whole._feed() as a, half._feed() as b:
        views = {name: view.clone() for name, view in whole.updater.renderer(a.next()).items()}
        for part in range(2):
            for name, view in half.updater.renderer(b.next()).items():
                n = view.shape[0]
                assert torch.equal(view, views[name][part * n : (part + 1) * n]), name


def test_an_update_is_reproducible_and_moves_everything_it_should(tiny_data, tmp_path):
    states = []
    for _ in range(2):
        trainer = make_trainer(tiny_data, tmp_path)
        before = {name: p.detach().clone() for name, p in trainer.updater.train_module.network.named_parameters()}
        with trainer._feed() as feed:
            for step in range(3):
                trainer.updater(feed.next(), step)
        after = dict(trainer.updater.train_module.network.named_parameters())
        assert all(not torch.equal(before[name], after[name]) for name in before)
        assert int(trainer.updater.clock.tensors.step) == 3
        states.append({**trainer.updater.train_module.state_dict(), **{f"t.{k}": v for k, v in trainer.updater.teacher.state_dict().items()}})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_teacher_follows_by_its_momentum(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, "teacher.momentum=0.25")
    network, teacher = trainer.updater.train_module.network, trainer.updater.teacher
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    with trainer._feed() as feed:
        trainer.updater(feed.next(), 0)
    for name, p in network.named_parameters():
        torch.testing.assert_close(teacher.network.get_parameter(name), 0.25 * start[name] + 0.75 * p.detach())


def test_gradients_are_clipped(tiny_data, tmp_path):
    """With plain SGD and a tiny clip the weights move exactly lr * clip."""
    plain_sgd = ("optim.lr=1.0", "optim.momentum=0.0", "optim.nesterov=false", "optim.weight_decay=0.0", "schedule.name=constant")
    trainer = make_trainer(tiny_data, tmp_path, "optim.clip_norm=0.001", *plain_sgd)
    network = trainer.updater.train_module.network
    before = torch.cat([p.detach().flatten().double() for p in network.parameters()])
    with trainer._feed() as feed:
        trainer.updater(feed.next(), 0)
    after = torch.cat([p.detach().flatten().double() for p in network.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.001, rel=1e-2)
