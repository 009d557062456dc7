"""The shuffled teacher: who meets whom, answers in the callers' order, the same on any number of processes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastssl.errors import RecipeError
from fastssl.models.ema import Teacher
from fastssl.models.joint import joint_forward, joint_head, regroup
from fastssl.models.shuffle import shuffled_forward, shuffled_head, spread
from fastssl.recipe import recipe_from_dict
from fastssl.schema import TeacherConfig
from fastssl.types import Out
from tests.models.shuffle_worker import GROUPS, SIZES, answers, make_network, make_views, worker


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """World size -> what each rank got."""
    folder, worlds = tmp_path_factory.mktemp("worlds"), (4, 2)
    torch.multiprocessing.spawn(worker, (worlds, str(folder)), max(worlds))
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in worlds}


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_gives_the_same_answers(parts, world):
    rows, buffers = answers()
    for name, whole in rows.items():
        torch.testing.assert_close(torch.cat([part[0][name] for part in parts[world]]), whole, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for part in parts[world]:
        for name, buffer in buffers.items():
            torch.testing.assert_close(part[1][name], buffer, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 12))
def test_spreading_is_a_permutation_that_parts_neighbours(groups, rows):
    order, inverse = spread(groups, rows)
    everyone = torch.arange(groups * rows)
    assert torch.equal(order.sort().values, everyone) and torch.equal(order[inverse], everyone)
    met = (order // rows).view(groups, rows)  # new group -> the old groups of its rows
    for group in met:
        assert torch.bincount(group, minlength=groups).max() <= math.ceil(rows / groups)
    assert all(len(set(met[:, place].tolist())) == groups for place in range(rows))  # each place comes from every group once: shares of views stay equal
    assert torch.equal(order % rows, torch.arange(rows).repeat(groups))


class Neighbours(nn.Module):
    """Answers with the sum over a row's BatchNorm group."""

    def __init__(self, groups):
        super().__init__()
        self.bn_groups = groups
        self.heads = nn.ModuleDict({"sum": _GroupSum(groups)})

    def forward(self, x):
        rows = self.heads["sum"](x.flatten(1))
        return Out(rows, 2 * rows, {"h": 3 * rows})


class _GroupSum(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, rows):
        return rows.unflatten(0, (self.groups, -1)).sum(1, keepdim=True).expand(-1, len(rows) // self.groups, -1).flatten(0, 1)


@pytest.mark.parametrize("sizes", [(6,), (3, 9), (3, 3, 12)])
def test_every_row_meets_exactly_the_rows_of_the_spread_groups(sizes):
    """Rows are one-hot, so a group's sum names its members; the groups are made by hand from the definition."""
    groups, total = 3, sum(sizes)
    views = torch.eye(total)[:, :, None, None].split(list(sizes))
    by_student, _ = regroup(sizes, groups)
    members = [[] for _ in range(groups)]
    for g, group in enumerate(by_student.view(groups, -1).tolist()):
        for place, row in enumerate(group):
            members[(g + place) % groups].append(row)
    got = shuffled_forward(Neighbours(groups), *views)
    outs = [got] if len(sizes) == 1 else got
    seen = torch.cat([out.logits_NC for out in outs])
    for group in members:
        for row in group:
            assert seen[row].nonzero().flatten().tolist() == sorted(group)
    heads = shuffled_head(Neighbours(groups), "sum", *(view.flatten(1) for view in views))
    assert torch.equal(torch.cat([heads] if len(sizes) == 1 else heads), seen)
    assert all(torch.equal(out.feat_ND, 2 * out.logits_NC) and torch.equal(out.heads["h"], 3 * out.logits_NC) for out in outs)


def test_rows_that_do_not_depend_on_others_are_as_without_shuffling():
    network, views = make_network(GROUPS).eval(), make_views()
    with torch.no_grad():
        for one, two in zip(shuffled_forward(network, *views), joint_forward(network, *views), strict=True):
            torch.testing.assert_close(one.logits_NC, two.logits_NC)
        feats = [out.feat_ND for out in joint_forward(network, *views)]
        for one, two in zip(shuffled_head(network, "aux", *feats), joint_head(network, "aux", *feats), strict=True):
            torch.testing.assert_close(one, two)


def test_memory_format_is_kept():
    class Looks(Neighbours):
        def forward(self, x):
            self.format_kept = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            return super().forward(x)

    network = Looks(2)
    shuffled_forward(network, *make_views((2, 4)))
    assert network.format_kept


def test_the_teacher_shuffles_in_train_mode_only():
    views = make_views()
    plain, shuffled = (Teacher(make_network(GROUPS), TeacherConfig(mode="train", shuffle=shuffle), 1) for shuffle in (False, True))
    assert not torch.allclose(plain(*views)[1].logits_NC, shuffled(*views)[1].logits_NC)
    feats = [torch.randn(size, plain.network.feat_dim, dtype=torch.float64) for size in SIZES]
    assert not torch.allclose(plain.head("aux", *feats)[1], shuffled.head("aux", *feats)[1])
    assert not shuffled(*views)[0].logits_NC.requires_grad
    shuffled.network.load_state_dict(plain.network.state_dict())  # statistics too
    assert torch.equal(plain.eval()(*views)[0].logits_NC, shuffled.eval()(*views)[0].logits_NC)


def test_views_that_groups_cannot_share_are_refused():
    with pytest.raises(RecipeError, match="evenly"):
        shuffled_forward(make_network(GROUPS), *make_views((4, 6)))


@pytest.mark.parametrize(
    ("options", "why"),
    [({"mode": "eval"}, "teacher.mode=train"), ({"mode": "train"}, "batchnorm.groups"), ({"mode": "train", "groups": "global"}, "batchnorm")],
)
def test_recipes_that_have_nothing_to_shuffle_are_refused(options, why):
    groups = options.pop("groups", 1)
    with pytest.raises(RecipeError, match="teacher.shuffle.*" + why):
        recipe_from_dict({"method": "fixmatch", "batchnorm": {"groups": groups}, "teacher": {"shuffle": True, **options}}, [])
    good = {"batchnorm": {"groups": 2}, "data": {"labeled_batch": 4, "unlabeled_batch": 4}, "teacher": {"shuffle": True, "mode": "train"}}
    assert recipe_from_dict({"method": "fixmatch", **good}, []).teacher.shuffle
