"""The recipes that ship: each one resolves, says where it comes from, and no schema key is decoration."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from fastssl.recipe import config_digest, dump_yaml, load_recipe, resolve, schema_keys
from fastssl.recipe_list import recipe_paths, runnables
from fastssl.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = recipe_paths(ROOT / "recipes")
# Knowing a key is not using it:
CHECKS_ONLY = {"recipe.py", "recipe_checks.py", "recipe_text.py", "recipe_values.py", "recipe_list.py", "recipe_notes.py", "schema.py", "cli.py"}


@functools.cache
def load(name: str) -> Recipe:
    return load_recipe(str(ROOT / "recipes" / name.replace("@", ".yaml@")) if "@" in name else ROOT / "recipes" / f"{name}.yaml")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.short)
def test_recipe_resolves_and_explains_itself(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # short names work from anywhere
    assert entry.title != ""
    for runnable in entry.runnables:
        recipe = load(runnable.name)
        assert recipe.method.name == runnable.method and recipe.title == runnable.title
    for runnable in {entry.runnables[0], entry.runnables[-1]}:
        recipe = load(runnable.name)
        assert recipe == load_recipe(runnable.name)
        (tmp_path / "config.yaml").write_text(dump_yaml(recipe))
        assert load_recipe(tmp_path / "config.yaml") == recipe


def without_numbers(text: str) -> str:
    return re.sub(r"\d+", "N", text)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.short)
def test_header_of_a_published_recipe(entry):
    text = entry.path.read_text(encoding="utf-8")
    names = [line.partition(":")[0] for line in text.splitlines() if re.match(r"# (Paper|Split|Command|Expected|Measured):", line)]
    assert names == ["# Paper", "# Split", "# Command", "# Expected", "# Measured"] and text.startswith("# Paper:")
    command = re.search(r"\n# Command:  fastssl train (\S+)( \S+=\S+)?\n", text)
    assert command and command[1] in {r.name for r in entry.runnables}, "the command trains this recipe, or one of its variants"
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert re.search(rf"--name {load(command[1]).data.split}( |$)", header, re.MULTILINE), "the header's split command makes the split that the recipe reads"
    assert entry.expected and entry.measured
    for runnable in entry.runnables:
        assert re.search(rf"\b{without_numbers(load(runnable.name).data.split)}\b", without_numbers(header)), f"the header makes no split for {runnable.name}"
        assert runnable.measured in ("", "none yet") or "runs/" in runnable.measured or "benchmarks/" in runnable.measured, "a result names its evidence"


def test_recipes_are_distinct():
    found = runnables(ENTRIES)
    assert len({config_digest(load(r.name)) for r in found}) == len({r.title for r in found}) == len({load(r.name).name for r in found}) == len(found) > 0
    assert all("=" not in load(r.name).name and "@" not in load(r.name).name for r in found), "names of run folders"


def test_hidden_layers_are_used():
    assert [(e.short, layer) for e in ENTRIES for layer, used in e.hidden.items() if not used] == []
    for base in sorted((ROOT / "recipes").rglob("_*.yaml")):
        text = base.read_text(encoding="utf-8")
        layers = set(re.findall(r"^  (_\w+):", text, re.MULTILINE))
        users = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "recipes").rglob("*.yaml") if f"{base.name}\n" in p.read_text(encoding="utf-8"))
        assert [layer for layer in layers if not re.search(rf"\b{layer}\b", users)] == [], base


def test_cifar10_recipes_carry_the_papers_settings():
    """FixMatch, arXiv:2001.07685, table 4 and section 4: B = 64, mu = 7, K = 2^20, eta = 0.03, beta = 0.9, L2 5e-4, tau = 0.95, 7/16 cosine."""
    for labels in (40, 250, 4000):
        r = resolve(f"cifar10/fixmatch_{labels}").recipe
        assert (r.method.config.threshold, r.data.labeled_batch, r.data.unlabeled_batch, r.data.include_labeled) == (0.95, 64, 448, True)
        assert (r.train.steps, r.train.steps_per_epoch, r.schedule.name, r.schedule.warmup_steps) == (2**20, 1024, "cosine_7_16", 0)
        assert (r.optim.name, r.optim.lr, r.optim.momentum, r.optim.nesterov, r.optim.weight_decay) == ("sgd", 0.03, 0.9, True, 5e-4)
        assert (r.model.name, r.augment.size, r.augment.weak, r.augment.strong) == ("wrn_28_2", 32, "fixmatch_weak", "fixmatch_strong")
        assert (r.teacher.enabled, r.teacher.momentum, r.eval.headline, r.batchnorm.momentum) == (True, 0.999, "ema", 0.001)
        assert r.data.split == f"fixmatch_{labels}_seed0"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # Copied by hand from the scripts' settings, one line per method and start: rate, then the method's own.
        ("tllib/erm@sun397_supervised", (0.001, {}, 10_000, 4e-4)),
        ("tllib/erm@cars_moco_v2", (0.03, {}, 10_000, None)),
        ("tllib/erm_10@cub200_moco_v2", (0.01, {}, 10_000, None)),
        ("tllib/oracle@food101_supervised", (0.01, {}, 40_000, 4e-4)),
        ("tllib/pseudo_label@cub200_supervised", (0.01, {"threshold": 0.8, "ramp_end": 0.0}, 20_000, 4e-4)),
        ("tllib/pseudo_label@pets_moco_v2", (0.001, {"threshold": 0.7}, 20_000, None)),
        ("tllib/pi_model@flowers102_supervised", (0.03, {"unlabeled_weight": 0.1, "ramp_epochs": 10}, 20_000, 4e-4)),
        ("tllib/pi_model@aircraft_moco_v2", (0.01, {}, 20_000, None)),
        ("tllib/mean_teacher@cifar10_supervised", (0.05, {"sum_rows": True, "sum_classes": True}, 20_000, 1e-4)),
        ("tllib/mean_teacher@dtd_moco_v2", (0.003, {}, 20_000, None)),
        ("tllib/uda@cifar10_supervised", (0.003, {"threshold": 0.95, "student_temperature": 0.85, "target_temperature": 1.0}, 30_000, 4e-4)),
        ("tllib/uda@flowers102_moco_v2", (0.001, {"threshold": 0.8, "mean_over": "selected"}, 30_000, None)),
        ("tllib/fixmatch@dtd_supervised", (0.001, {"threshold": 0.95}, 30_000, 4e-4)),
        ("tllib/fixmatch@cifar100_moco_v2", (0.001, {"threshold": 0.7}, 30_000, None)),
        ("tllib/self_tuning@flowers102_supervised", (0.01, {"queue_size": 32, "projection_dim": 1024, "temperature": 0.07}, 30_000, 0.1)),
        ("tllib/self_tuning@caltech101_moco_v2", (0.001, {"pseudo_label_forward": True}, 30_000, 0.1)),
        ("tllib/flexmatch@cub200_supervised", (0.001, {"threshold": 0.9, "warmup": False, "one_value": "zero"}, 45_000, 4e-4)),
        ("tllib/flexmatch@sun397_moco_v2", (0.001, {"threshold": 0.7}, 45_000, None)),
        ("tllib/debiasmatch@dtd_supervised", (0.001, {"threshold": 7.0, "debias": 3.0, "reset_each_epoch": True, "pseudo_prior": "updated"}, 45_000, 4e-4)),
        ("tllib/debiasmatch@cifar100_moco_v2", (0.001, {"threshold": 0.95, "debias": 1.0}, 45_000, None)),
        ("tllib/dst@caltech101_supervised", (0.001, {"threshold": 0.7, "unlabeled_weight": 1.0, "worst_label_weight": 4.0}, 45_000, 2e-4)),
        ("tllib/dst@dtd_moco_v2", (0.001, {"threshold": 0.95, "unlabeled_weight": 0.1, "worst_label_weight": 3.0}, 45_000, None)),
        ("tllib/noisy_student@cifar100_supervised", (0.01, {"temperature": 0.5}, 20_000, 4e-4)),
        ("tllib/noisy_student@cifar100_moco_v2", (0.001, {"temperature": 1.0}, 20_000, None)),
    ],
)
def test_transfer_settings_are_the_scripts(name, values):
    r = load(name)
    rate, options, steps, gamma = values
    assert (r.optim.lr, r.train.steps, r.train.steps_per_epoch) == (rate, steps, 500)
    assert {option: getattr(r.method.config, option) for option in options} == options
    assert (r.schedule.name == "cosine_7_16") == (gamma is None) and gamma in (None, r.schedule.gamma)
    assert (r.data.labeled_batch, r.data.unlabeled_batch, r.data.include_labeled, r.eval.headline) == (32, 32, False, "raw")
    assert r.optim.weight_decay == 5e-4 and r.optim.no_decay == [] and r.optim.lr_factors[r"^backbone\."] == 0.1
    assert ("moco" in r.model.weights) == name.endswith("moco_v2")
    strong = getattr(r.method.config, "strong_label_weight", None) or getattr(r.method.config, "strong_weight", None)
    assert strong == (None if r.schedule.name == "multistep" else 0.1)
    if r.schedule.name != "multistep":  # Self-Tuning has strict thresholds and forwards of its own
        assert getattr(r.method.config, "separate_forwards", True) and getattr(r.method.config, "strict_threshold", True)


def test_scratch_variants_need_no_weights():
    for entry in ENTRIES:
        for runnable in entry.runnables:
            if runnable.name.startswith("tllib/") and runnable.name.endswith("_scratch"):
                r = load(runnable.name)
                assert (r.model.weights, r.optim.lr_factors, r.schedule.name) == ("", {}, "cosine_7_16")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("simmatch/imagenet@1p", (400 * 3963, 3963, 64, 320, 1e-4, 8, "train", True, "leave")),
        ("simmatch/imagenet@10p_eman", (400 * 3603, 3603, 64, 320, 1e-4, 8, "eval", False, "average")),
        ("simmatch/shrinkmatch_imagenet@10p", (400 * 3603, 3603, 64, 320, 1e-4, 8, "train", True, "leave")),
        ("simmatch/simmatchv2_imagenet@1p", (300 * 3963, 3963, 64, 320, 1e-4, 8, "train", True, "leave")),
        ("simmatch/fixmatch_eman_imagenet@10p", (100 * 3603, 3603, 64, 320, 1e-4, 8, "eval", False, "average")),
        ("simmatch/shrinkmatch_cifar@cifar100_400", (2**20, 1024, 64, 448, 1e-3, 1, "eval", False, "copy")),
        ("simmatch/shrinkmatch_torchssl@svhn_40", (2**20, 1024, 64, 448, 5e-4, "global", "eval", False, "copy")),
        ("simpro/cifar10@exp=0", (43_000, 500, 64, 512, 5e-4, 1, "eval", False, "copy")),
        ("simpro/stl10@exp=1", (43_000, 500, 64, 1024, 5e-4, 1, "eval", False, "copy")),
        ("simpro/imagenet127@exp=1", (250_000, 500, 32, 64, 5e-4, 1, "eval", False, "copy")),
        ("acr_d/cifar100@exp=3", (250_000, 500, 64, 64, 5e-4, 1, "eval", False, "copy")),
        ("acr/cifar10@exp=19", (250_000, 500, 64, 64, 5e-4, 1, "eval", False, "copy")),
    ],
)
def test_settings_of_the_other_families(name, expected):
    r = load(name)
    t, d = r.teacher, r.data
    lengths = (r.train.steps, r.train.steps_per_epoch, d.labeled_batch, d.unlabeled_batch)
    assert (*lengths, r.optim.weight_decay, r.batchnorm.groups, t.mode, t.shuffle, t.buffers) == expected
    assert t.enabled and t.momentum == 0.999


def test_long_tailed_settings_differ_as_published():
    tau = {"cifar10": 2.0, "cifar100": 1.0, "stl10": 2.0, "imagenet127": 1.0, "imagenet1k": 1.0}
    threshold = {"cifar10": 0.95, "cifar100": 0.2, "stl10": 0.95, "imagenet127": 0.2, "imagenet1k": 0.2}
    counts = {"cifar10": 20, "cifar100": 11, "stl10": 2, "imagenet127": 2, "imagenet1k": 2}
    for dataset, count in counts.items():
        for family in ("simpro", "acr", "acr_d"):
            (entry,) = [e for e in ENTRIES if e.short == f"{family}/{dataset}"]
            assert entry.variants == tuple(f"exp={n}" for n in range(count))
        c = load(f"simpro/{dataset}@exp=0").method.config
        assert (c.prior_exponent, c.threshold, c.prior_momentum, c.unnormalized_prior) == (tau[dataset], threshold[dataset], 0.9, True)
    assert load("acr_d/cifar10@exp=0").data.labeled_law == "distributed(seed=0, fixed_epoch=True)" and load("simpro/cifar10@exp=0").optim.lr == 0.17
    assert load("acr_d/imagenet127@exp=0").data.include_labeled is False and load("acr_d/imagenet1k@exp=0").data.include_labeled is True
    assert load("acr/imagenet1k@exp=0").augment.extra == {"labeled_weak": "acr_imagenet_labeled"} and load("acr/imagenet1k@exp=1").augment.size == 64
    assert load("acr_d/cifar10@exp=18").data.split == "cifar10_lt_exp18_acr_d" and load("acr/cifar10@exp=18").data.split == "cifar10_lt_exp18"


@functools.cache
def _nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def reads(source: str, section: str, name: str) -> bool:
    """Whether the text reads ``<anything>.section.name``; in a file that names the section or its dataclass also ``variable.name``,
    ``self.config.name`` and ``getattr(variable, ...)`` beside the text "name".
    """
    nodes = _nodes(source)
    config = {"batchnorm": "BatchNormConfig"}.get(section, f"{section.capitalize()}Config")
    knows = any(isinstance(n, (ast.Name, ast.Attribute, ast.alias)) and (getattr(n, "id", None) or getattr(n, "attr", None) or getattr(n, "name", None)) in
                ({config} | ({section} if section else set())) for n in nodes)  # fmt: skip

    def is_config(owner: ast.AST) -> bool:
        return isinstance(owner, ast.Name) or isinstance(owner, ast.Attribute) and owner.attr in ("config", "cfg")

    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Load):
            owner = node.value
            if not section:
                if isinstance(owner, ast.Name) and owner.id == "recipe" or isinstance(owner, ast.Attribute) and owner.attr == "recipe":
                    return True
            elif isinstance(owner, ast.Attribute) and owner.attr == section or knows and is_config(owner):
                return True
    by_name = [n.args[0] for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "getattr" and n.args]
    listed = any(isinstance(n, ast.Constant) and n.value == name for n in nodes)
    return listed and any(isinstance(owner, ast.Attribute) and owner.attr == section or knows and isinstance(owner, ast.Name) for owner in by_name)


def test_reads_tells_use_from_mention():
    assert reads("x = recipe.data.ahead", "data", "ahead")
    assert reads("def f(cfg: DataConfig): return cfg.ahead", "data", "ahead")
    assert reads("d = recipe.data\nx = d.ahead", "data", "ahead")
    assert reads("s = self.recipe.seed", "", "seed")
    assert reads("for n in ('weak', 'strong'): getattr(recipe.augment, n)", "augment", "weak")
    assert not reads("getattr(recipe.augment, n)", "augment", "weak")
    assert not reads("x = recipe.train.every", "log", "every")
    assert reads("def f(self, cfg: DataConfig): self.config = cfg; return self.config.ahead", "data", "ahead")
    assert not reads("x = thing.ahead", "data", "ahead")
    assert not reads("x = self.config.ahead", "data", "ahead")
    assert not reads("'recipe.data.ahead'  # recipe.data.ahead", "data", "ahead")
    assert not reads("recipe.data.ahead = 3", "data", "ahead")


def name_of(key: str) -> str:
    return key.rpartition(".")[2]


def test_every_schema_key_is_read_somewhere():
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "fastssl").rglob("*.py") if p.name not in CHECKS_ONLY]
    dead = [key for key in schema_keys() if not any(name_of(key) in s and reads(s, key.rpartition(".")[0], name_of(key)) for s in sources)]
    assert not dead, f"schema keys that nothing reads: {dead}"
