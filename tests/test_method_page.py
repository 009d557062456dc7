"""Facts about methods are found by running them; docs/methods.md is what they say."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastssl import cli, methods
from fastssl.errors import FastSSLError
from fastssl.method_facts import ROWS, Cost, _shape, _task, facts_of, forwards_of, options_of
from fastssl.method_page import COMMAND, write_page
from fastssl.methods.base import Method
from fastssl.published import load_published
from fastssl.recipe import load_recipe
from fastssl.recipe_list import recipe_paths
from fastssl.types import Loss, View

ROOT = Path(__file__).resolve().parent.parent


def cost_of(recipe: str) -> Cost:
    spec = load_recipe(recipe).method
    return facts_of(spec.name, spec.config).cost


def test_forwards_of_a_method_that_does_everything_once_or_twice():
    class Busy(Method):
        @staticmethod
        def views(config):
            weak = View("unlabeled", "weak")
            return {"x": View("labeled", "weak"), "u": weak, "u_2": weak, "early": View("unlabeled", "weak", each_step=False)}

        @staticmethod
        def needs_teacher(config):
            return True

        def forward(self, v, batch, student, teacher):
            x, u = student(v.x, v.u)
            assert u.logits_NC.requires_grad
            with torch.no_grad():
                student(v.u), student(v.u_2)
            assert not teacher(v.u_2).logits_NC.requires_grad
            student(torch.cat([v.x, v.x]))  # images of its own making, by their number
            return Loss(x.logits_NC.sum() + u.logits_NC.sum())

    assert forwards_of(Busy(None, _task())) == Cost(
        student_labeled=3, student_unlabeled=1, student_free_unlabeled=2, teacher_unlabeled=1, once=1,
    )  # fmt: skip
    assert ROWS["unlabeled"] % ROWS["labeled"], "else rows would not tell their stream"


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        # Counted from the specifications, views of one image each: forwards with gradient, without, by the teacher.
        ("tllib/erm@cifar10_supervised", Cost(2, 0)),
        ("tllib/pseudo_label@cifar10_supervised", Cost(2, 1)),
        ("tllib/pi_model@cifar10_supervised", Cost(2, 2)),
        ("tllib/mean_teacher@cifar10_supervised", Cost(2, 1, teacher_unlabeled=1)),
        ("tllib/fixmatch@cifar10_supervised", Cost(2, 1, student_free_unlabeled=1)),
        ("tllib/noisy_student@cifar100_supervised", Cost(2, 1, once=1)),
        ("tllib/self_tuning@cifar10_supervised", Cost(1, 1, student_free_unlabeled=1, teacher_labeled=1, teacher_unlabeled=1)),
        ("tllib/dst@cifar10_supervised", Cost(2, 2)),
        ("simmatch/imagenet@1p", Cost(1, 1, teacher_labeled=1, teacher_unlabeled=1)),
        ("simmatch/shrinkmatch_cifar@cifar10_40", Cost(1, 2)),
        ("simmatch/fixmatch_eman_imagenet@1p", Cost(1, 1, teacher_unlabeled=1)),
        ("simpro/cifar10@exp=0", Cost(2, 3)),
        ("acr/cifar10@exp=0", Cost(1, 3)),
    ],
)
def test_forwards_are_those_of_the_specifications(recipe, expected):
    assert cost_of(recipe) == expected


def test_five_crops_are_five_forwards():
    cost = cost_of("simmatch/simmatchv2_imagenet@1p")
    assert (cost.student_labeled, cost.student_unlabeled, cost.teacher_labeled, cost.teacher_unlabeled) == (1, 5, 1, 1)


def test_counting_leaves_the_generator_alone():
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    facts_of("fixmatch")
    assert torch.equal(want, torch.rand(1))


def test_shapes_in_letters():
    assert [_shape(torch.zeros(s)) for s in ((), (13, 128), (17,), (5,), (6,), (160, 4), (1792, 5))] == [
        "scalar", "[N_l, 128]", "[N_u]", "[K]", "[K + 1]", "[32 K, 4]", "[256 B_u, K]",
    ]  # fmt: skip


def test_meanings_come_from_comments_and_else_from_the_text():
    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.95  # tau
        reset: bool = False
        unknown: int = 3

    text = "Title.\n\nFields:\n  reset      starts anew\n             at every epoch   (Somebody)\n  other      nothing"
    found = {o.name: (o.type, o.default, o.meaning) for o in options_of(Config(), text)}
    assert found == {
        "threshold": ("number", "0.95", "tau"),
        "reset": ("true or false", "false", "starts anew at every epoch (Somebody)"),
        "unknown": ("whole number", "3", ""),
    }


def test_every_published_quirk_has_a_meaning():
    """A field that a recipe of a published table sets away from its default is explained somewhere."""
    for entry in recipe_paths(ROOT / "recipes"):
        spec = load_recipe(entry.runnables[0].name).method
        meaning = {o.name: o.meaning for o in facts_of(spec.name, spec.config).options}
        default = methods.get(spec.name).Config()
        quirks = [n for n in meaning if getattr(spec.config, n) != getattr(default, n) and isinstance(getattr(default, n), (bool, str))]
        text = facts_of(spec.name).text
        assert all(meaning[n] or n in text for n in quirks), (entry.short, quirks)


def test_the_page_in_docs_is_what_the_files_say():
    want = write_page(recipe_paths(ROOT / "recipes"), load_published(ROOT / "recipes"))
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == want, f"run: {COMMAND}"


def test_the_page_has_every_method_with_its_parts():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in methods.names():
        assert f"\n## {name}\n" in page and f"| [{name}](#{name}) |" in page
    section = page.split("\n## simpro\n")[1].split("\n## ")[0]
    assert "longtail_cifar10_gamma150, SimPro (top-1 accuracy, %): consistent 74.2 +- 0.90; uniform 93.6 +- 0.08" in section
    assert "| `unnormalized_prior` | true or false | `false` |" in section and "`simpro/cifar10` | 20 | 2 / 3 |" in section
    assert all(len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", head)) for head, line in _table_lines(page)), "tables keep their columns"


def _table_lines(page: str):
    head = ""
    for line in page.splitlines():
        head = (head or line) if line.startswith("| ") else head if line.startswith("|-") else ""
        if line.startswith("| "):
            yield head, line


def test_methods_for_machines(capsys):
    assert cli.main(["methods", "flexmatch", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["state"] == {"status": "[N_u]", "counts": "[K + 1]", "beta": "[K]"} and facts["cost"]["student_unlabeled"] == 2
    assert "tllib/flexmatch@cifar10_moco_v2" in facts["recipes"] and facts["options"][0]["name"] == "threshold" and "u_s" in facts["views"]
    assert cli.main(["methods", "flexmach", "--json"]) == 2 and "did you mean 'flexmatch'" in capsys.readouterr().err
    assert cli.main(["methods", "--json"]) == 0
    assert [f["name"] for f in json.loads(capsys.readouterr().out)] == methods.names()
    assert cli.main(["methods", "erm", "--markdown"]) == 2
    with pytest.raises(FastSSLError):
        facts_of("nothing")
