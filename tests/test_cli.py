"""The command line at its door: what it prints, where, and with which exit status; and worlds smaller than asked for."""

from __future__ import annotations

import inspect
import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fastssl import cli, methods
from fastssl.engine.evaluate import evaluate_run  # real modules come in before the fixture below swaps the methods that they bind
from fastssl.engine.sheet import write_views
from fastssl.engine.stop import Interrupted
from fastssl.engine.train import train
from fastssl.errors import TrainingError
from fastssl.launch_check import LaunchError, Wish, asked_world, check_world, find_wish, started_world
from fastssl.report import write_report
from tests.helpers import make_dataset, run_python

ROOT = Path(__file__).resolve().parent.parent


class _Match:
    """MatchStandIn (Author et al., 2020): the first line.

    L = L_x + L_u
    """

    @dataclass(frozen=True)
    class Config:
        threshold: float = field(default=0.95, metadata={"help": "confidence that selects"})

        def __post_init__(self):
            if self.threshold < 0:
                raise ValueError(f"threshold = {self.threshold} must not be negative")

    needs_unlabeled = True

    @staticmethod
    def needs_teacher(config):
        return False


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(methods, "names", lambda: ["match"])
    monkeypatch.setattr(methods, "get", {"match": _Match}.__getitem__)
    for name in ("WORLD_SIZE", "RANK", "ACCELERATE_MIXED_PRECISION", "SLURM_STEP_NUM_TASKS", "FASTSSL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    Path("r.yaml").write_text("title: One line\nmethod: match\noptim: {lr: 0.5}\n")


@pytest.fixture
def stub(monkeypatch):
    """``stub("fastssl.engine.train", train=function)`` puts a module in the place of the real one."""

    def _stub(name, **attributes):
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    return _stub


def test_no_verb_prints_help_that_teaches(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for verb in ("train", "eval", "report", "views", "methods", "recipes", "config", "doctor"):
        assert f"\n    {verb} " in out
    assert "fastssl train cifar10/fixmatch_4000" in out and "torchrun" in out


@pytest.mark.parametrize(
    "argv", [["train"], ["fly"], ["eval", "x", "--split", "train"], ["views", "r.yaml", "--rows", "0"], ["recipes", "a", "b"], ["train", "r.yaml", "--fast"]]
)
def test_misuse_exits_2_with_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2 and "usage: fastssl" in capsys.readouterr().err


def test_every_verb_has_help_with_an_example(capsys):
    for verb in ("train", "eval", "report", "views", "methods", "recipes", "config", "doctor"):
        with pytest.raises(SystemExit) as caught:
            cli.main([verb, "--help"])
        assert caught.value.code == 0 and f"example:\n  fastssl {verb}" in capsys.readouterr().out
    assert cli.main(["config"]) == 0 and "show" in capsys.readouterr().out


def test_wrong_input_is_one_line_on_stderr(capsys, monkeypatch):
    assert cli.main(["config", "show", "r.yaml", "optim.lrr=1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: command line: unknown key 'optim.lrr'") and err.count("\n") == 1
    monkeypatch.setenv("FASTSSL_DEBUG", "1")
    with pytest.raises(Exception, match="optim.lrr"):
        cli.main(["config", "show", "r.yaml", "optim.lrr=1"])


def test_config_show_prints_value_origin_and_meaning(capsys):
    assert cli.main(["config", "show", "r.yaml", "seed=4", "--yaml"]) == 0
    Path("again.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["config", "show", "again.yaml"]) == 0
    assert cli.main(["config", "show", "r.yaml", "seed=4"]) == 0
    again, first = (text.splitlines() for text in capsys.readouterr().out.split("key ")[1:])
    lines = {line.split()[0]: line for line in first[1:]}
    assert "0.5 " in lines["optim.lr"] and "recipe r.yaml" in lines["optim.lr"] and "base learning rate" in lines["optim.lr"]
    assert "command line" in lines["seed"] and " 4 " in lines["seed"]
    assert " 0.95 " in lines["method.threshold"] and " default " in lines["method.threshold"]
    assert [line.split()[:2] for line in again[1:]] == [line.split()[:2] for line in first[1:]], "the printed recipe resolves to the same values"
    assert cli.main(["config", "show", "r.yaml", "--help-keys"]) == 0
    assert "one of sgd, adamw" in capsys.readouterr().out


def test_methods_list_and_detail(capsys):
    assert cli.main(["methods"]) == 0
    assert "match   MatchStandIn (Author et al., 2020): the first line." in capsys.readouterr().out
    assert cli.main(["methods", "match"]) == 0
    out = capsys.readouterr().out
    assert "L = L_x + L_u" in out and "method.threshold" in out and "0.95" in out and "confidence that selects" in out
    assert cli.main(["methods", "mach"]) == 2
    assert "did you mean 'match'" in capsys.readouterr().err


def test_recipes_lists_what_is_there(capsys):
    Path("recipes/s").mkdir(parents=True)
    Path("recipes/s/a.yaml").write_text("# Expected: published: 5 %\ntitle: A title\nmethod: match\n")
    assert cli.main(["recipes"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["recipe", "method", "title", "expected"]
    assert [cell.strip() for cell in row.split("  ") if cell] == ["s/a", "match", "A title", "published: 5 %"]
    assert cli.main(["recipes", "recipes/none"]) == 2


@pytest.mark.parametrize(
    ("words", "resume", "run_dir", "seed"),
    [
        ([], None, None, 0),
        (["--resume", "auto", "seed=2"], "auto", None, 2),
        (["seed=1", "--run-dir", "out", "optim.lr=0.1", "seed=3"], None, "out", 3),
        (["--resume", "runs/r/1", "seed=1"], "runs/r/1", None, 1),
        (["--resume", "none"], None, None, 0),
    ],
)
def test_train_hands_over_the_resolved_recipe(stub, capsys, words, resume, run_dir, seed):
    seen = {}

    def fake_train(recipe, *, resume=None, run_dir=None):
        seen.update(recipe=recipe, resume=resume, run_dir=run_dir)
        return Path("runs/r/1")

    stub("fastssl.engine.train", train=fake_train)
    assert cli.main(["train", "r.yaml", *words]) == 0
    assert capsys.readouterr().out == "runs/r/1\n"
    assert (seen["resume"], seen["run_dir"], seen["recipe"].seed) == (resume, run_dir, seed)


def test_how_training_ends_is_the_exit_status(stub, capsys):
    ends = {130: KeyboardInterrupt(), 2: TrainingError("loss is not finite"), 143: Interrupted(Path("runs/r/1"), 5, 15)}
    for status, end in ends.items():

        def ending(recipe, end=end, **options):
            raise end

        stub("fastssl.engine.train", train=ending)
        assert cli.main(["train", "r.yaml"]) == status
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "Traceback" not in err


def test_only_rank_0_prints_the_run_folder(stub, capsys, monkeypatch):
    stub("fastssl.engine.train", train=lambda recipe, **options: Path("runs/r/1"))
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "r.yaml"]) == 0 and capsys.readouterr().out == ""


def test_eval_prints_what_was_measured_where(stub, capsys, monkeypatch):
    seen = []

    def fake_evaluate(run, checkpoint_name, split):
        seen.append((run, checkpoint_name, split))
        return {
            "run": "run", "checkpoint": checkpoint_name, "step": 10, "split": split or "test",
            "eval/top1": 93.123456, "eval/raw/per_class": [1.0, None, 25.0, 3.0], "eval/ema/per_class": [2.0, 4.5, 0.0, 99.0],
        }  # fmt: skip

    stub("fastssl.engine.evaluate", evaluate_run=fake_evaluate)
    assert cli.main(["eval", "run"]) == 2 and "not a run folder" in capsys.readouterr().err
    Path("run").mkdir()
    Path("run/config.yaml").write_text(f"method: match\ndata: {{path: {make_dataset(Path('data').resolve())}}}\n")
    assert cli.main(["eval", "run", "--checkpoint", "last", "--split", "validation"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("run: checkpoint last (after update 10) on validation\n\n") and "note:" not in out
    assert "93.1235" in out and "per_class" not in out and seen == [(Path("run"), "last", "validation")]
    table = [line.split() for line in out.splitlines()[-5:]]
    assert table == [["class", "raw", "ema"], ["class0", "1.00", "2.00"], ["class1", "-", "4.50"], ["class2", "25.00", "0.00"], ["class3", "3.00", "99.00"]]
    assert cli.main(["eval", "run"]) == 0
    assert "note: best was chosen by its accuracy on test, the split measured here" in capsys.readouterr().out
    assert cli.main(["eval", "run", "--split", "validation"]) == 0
    assert "note:" not in capsys.readouterr().out, "training evaluated on test, so on validation rows the choice is no advantage"
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["eval", "run"]) == 0 and capsys.readouterr().out == "" and len(seen) == 4, "it takes part in the work and is silent"


@pytest.mark.parametrize(("key", "hint"), [("model.options={width:8}", "write width: 8"), ("augment.weak=[{flip:{p:2}}]", "write p: 2")])
def test_a_missing_blank_is_told(key, hint, capsys):
    assert cli.main(["config", "show", "r.yaml", key]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: command line: {key}: ") and "YAML needs a blank after ':'" in err and hint in err
    Path("s.yaml").write_text("method: match\nmodel: {options: {width:8}}\n")
    assert cli.main(["config", "show", "s.yaml"]) == 2 and "s.yaml, line 2: 'width:8' is a key without a value" in capsys.readouterr().err


def test_the_layer_that_gave_a_wrong_option_is_blamed(capsys):
    Path("m.yaml").write_text("title: t\nmethod:\n  name: match\n  threshold: 0.5\n")
    assert cli.main(["config", "show", "m.yaml", "method.threshold=-1"]) == 2
    assert capsys.readouterr().err == "error: command line: method = match: threshold = -1.0 must not be negative\n"
    Path("m.yaml").write_text(Path("m.yaml").read_text().replace("0.5", "-2"))
    assert cli.main(["config", "show", "m.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: m.yaml, line 4: method = match: threshold")


def test_a_missing_recipe_is_all_that_is_asked_for(capsys):
    for verb in (["train"], ["views"], ["config", "show"]):
        with pytest.raises(SystemExit):
            cli.main(verb)
        assert capsys.readouterr().err.endswith("required: RECIPE\n")


def test_out_makes_one_folder_at_most(stub, capsys):
    stub("fastssl.report", write_report=lambda runs, out, **extras: out)
    stub("fastssl.engine.sheet", write_views=lambda recipe, out, rows=8, **sizes: out)
    for words, suffix in ((["report", "a"], "html"), (["views", "r.yaml"], "png")):
        assert cli.main([*words, "--out", f"none/deep/x.{suffix}"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: --out none/deep/x.{suffix}: there is no folder none") and err.count("\n") == 1 and not Path("none").exists()
        assert cli.main([*words, "--out", f"{suffix}/x.{suffix}"]) == 0 and Path(suffix).is_dir()
        assert cli.main([*words, "--out", f"r.yaml/x.{suffix}"]) == 2
        assert "r.yaml is a file" in capsys.readouterr().err


def test_report_and_views_call_their_doors(stub, capsys):
    seen = []
    stub("fastssl.report", write_report=lambda runs, out, **extras: seen.append((runs, out, extras)) or out)
    stub("fastssl.engine.sheet", write_views=lambda recipe, out, rows=8, **sizes: seen.append((recipe.optim.lr, out, rows, sizes)) or out)
    assert cli.main(["report", "a", "b"]) == cli.main(["report", "a", "--out", "x.html", "--title", "t", "--views", "p.png"]) == 0
    assert cli.main(["views", "r.yaml", "--rows", "3", "optim.lr=0.25", "--out", "v.png"]) == 0
    assert seen == [
        ([Path("a"), Path("b")], None, {"title": None, "views": []}),
        ([Path("a")], Path("x.html"), {"title": "t", "views": [Path("p.png")]}),
        (0.25, Path("v.png"), 3, {"draws": 3, "tile": 128}),
    ]
    assert capsys.readouterr().out.splitlines()[-1] == "v.png"


def test_report_of_no_run_is_wrong_input(capsys):
    assert cli.main(["report", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_doors_take_what_the_verbs_hand_over():
    """The stubs above stand for the real functions: their signatures must accept the same calls."""
    inspect.signature(train).bind("recipe", resume=None, run_dir=None)
    inspect.signature(evaluate_run).bind("run", "best", None)
    inspect.signature(write_views).bind("recipe", "v.png", 8, draws=3, tile=128)
    inspect.signature(write_report).bind(["run"], None, title="t", views=[Path("p.png")])


def test_help_and_recipes_do_not_import_torch():
    code = (
        "import sys; from fastssl import cli\n"
        f"cli.main([]); cli.main(['recipes', {str(ROOT / 'recipes')!r}])\n"
        "assert not {'torch', 'numpy', 'accelerate'} & set(sys.modules), 'heavy import'"
    )
    child = run_python("-c", code)
    assert child.returncode == 0, child.stderr


# --- worlds smaller than asked for -------------------------------------------------------------------------------------------------------------

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
OWN = ["/v/bin/python", "-m", "fastssl", "train", "r.yaml", "model.options={}"]
TAIL = OWN[1:]


@pytest.mark.parametrize(
    ("environ", "ancestors", "asked"),
    [
        ({}, [["bash"]], None),
        ({}, [["accelerate", "launch", "--num_processes", "2", *TAIL]], None),  # an accelerate further up that did not launch this process
        ({"WORLD_SIZE": "4"}, [], 4),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, [], 3),
        ({"SLURM_STEP_NUM_TASKS": "2"}, [], 2),
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "8"}, [], 8),
        (ACCELERATE, [["/v/bin/python", "/v/bin/accelerate", "launch", "--cpu", "--num_processes", "2", *TAIL]], 2),
        (ACCELERATE, [["/v/bin/python", "/v/bin/accelerate-launch", "--cpu", "--num-processes=5", *TAIL]], 5),
        (ACCELERATE, [["python", "-m", "accelerate.commands.launch", "--num_processes=2", "--cpu", *TAIL]], 2),
        (ACCELERATE, [["sh", "-c", "x"], ["python", "/v/bin/accelerate", "launch", "--cpu", "--num_processes", "2", *TAIL]], 2),
        (ACCELERATE, [["accelerate", "launch", "--cpu", *TAIL]], None),
        (ACCELERATE, [], None),
    ],
)
def test_asked_world(environ, ancestors, asked):
    assert asked_world(environ, ancestors=ancestors, own=OWN) == asked


def test_the_scripts_own_arguments_are_not_the_launchers():
    own = ["python", "tool.py", "--num_processes", "7"]
    assert asked_world(ACCELERATE, ancestors=[["accelerate", "launch", "--cpu", "tool.py", "--num_processes", "7"]], own=own) is None
    assert asked_world(ACCELERATE, ancestors=[["accelerate", "launch", "--cpu", "--num_processes", "2", "tool.py", "--num_processes", "7"]], own=own) == 2


def test_accelerate_config_files_are_wishes_too():
    Path("c.yaml").write_text("num_processes: 6\n")
    line = ["accelerate", "launch", "--config_file", "c.yaml", *TAIL]
    wish = find_wish(ACCELERATE, ancestors=[line], own=OWN)
    assert wish == Wish(6, "the accelerate config c.yaml")
    assert asked_world(ACCELERATE, ancestors=[[*line[:4], "--num_processes", "1", *TAIL]], own=OWN) == 1
    Path("c.yaml").write_text("[")
    assert asked_world(ACCELERATE, ancestors=[line], own=OWN) is None


def test_check_world_names_the_line_to_run():
    with pytest.raises(LaunchError) as caught:
        check_world(1, Wish(2, "accelerate launch"), arguments=["train", "r.yaml", "seed=1"])
    assert "asked for 2 processes, but this run has 1" in str(caught.value)
    assert str(caught.value).endswith("torchrun --standalone --nproc_per_node 2 -m fastssl train r.yaml seed=1")
    with pytest.raises(LaunchError, match="asked for 4 processes, but this run has 2"):
        check_world(2, Wish(4, "accelerate launch"))
    check_world(2, Wish(2, "accelerate launch"))
    check_world(4, Wish(2, "accelerate launch"))


def test_started_world():
    assert started_world({}) == 1 and started_world({"WORLD_SIZE": "3"}) == 3 and started_world({"PMI_SIZE": "2"}) == 2


def test_train_refuses_an_accelerate_launch_that_started_one_of_two():
    """The real launcher: it starts one process, silently; the train verb says so before anything heavy happens."""
    Path("probe.py").write_text(
        "import json, sys\n"
        "from fastssl import launch_check\n"
        "print(json.dumps([launch_check.asked_world(), launch_check.started_world()]), flush=True)\n"
        "sys.argv = ['fastssl', 'train', 'r.yaml']\n"
        "try:\n"
        "    launch_check.check_world(launch_check.started_world())\n"
        "except launch_check.LaunchError as error:\n"
        "    print(error)\n"
    )
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    child = run_python(*launcher, str(Path("probe.py").resolve()))
    assert child.returncode == 0, child.stderr
    first, message = child.stdout.splitlines()
    assert json.loads(first) == [2, 1]
    assert "torchrun --standalone --nproc_per_node 2 -m fastssl train r.yaml" in message
