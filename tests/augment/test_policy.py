"""Policies: names, lists, defaults, and errors that name the nearest valid word."""

import pytest

from fastssl.augment import POLICIES, build_policy, check_backend
from fastssl.errors import RecipeError
from fastssl.recipe import load_recipe

STATS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def build(spec, **changes):
    return build_policy(spec, **{"size": 32, "channels": 3, **STATS, **changes})


@pytest.mark.parametrize("name", POLICIES)
def test_named_policies_survive_a_round_trip(name):
    policy = build(name)
    assert hash(policy) == hash(build(name)) and policy == build(name)
    data = policy.to_dict()
    again = build(data["laws"])
    assert again.laws == policy.laws and again.to_dict() == {**data, "name": "custom"}


def test_the_fixmatch_policies_say_what_the_paper_says():
    weak = [{"flip": {"p": 0.5}}, {"pad_crop": {"pad": 4, "mode": "reflect", "fill": 0, "size": None}}]
    assert build("fixmatch_weak").to_dict()["laws"] == weak
    strong = [{"randaugment": {"space": "mc", "n": 2, "p": 0.5}}, {"cutout": {"side": 16, "fill": 127}}]
    assert build("fixmatch_strong").to_dict()["laws"] == weak + strong
    assert "flip" not in str(build("digits_strong").to_dict()["laws"])


def test_lists_take_names_and_defaults():
    assert build(["flip", {"pad_crop": None}]).laws == build("fixmatch_weak").laws
    assert build(["flip", "pad_crop"]).laws == build([{"flip": {}}, {"pad_crop": {}}]).laws == build("fixmatch_weak").laws
    assert [law.name for law in build(["flip"]).laws] == ["center", "flip"], "a policy without a crop is fitted first"
    assert [law.name for law in build(["resize", "flip"]).laws] == ["resize", "center", "flip"], "but not before it is resized"


def test_bare_names_in_a_recipe_mean_the_defaults(tmp_path):
    text = "method: fixmatch\naugment:\n  weak: [flip, pad_crop]\n  strong: [flip, {pad_crop: {pad: 2}}, randaugment]\n  eval: [resize]\n"
    (tmp_path / "r.yaml").write_text(text)
    augment = load_recipe(tmp_path / "r.yaml", []).augment
    assert build(augment.weak).laws == build("fixmatch_weak").laws
    assert [law.name for law in build(augment.strong).laws] == ["flip", "pad_crop", "randaugment"] and build(augment.strong).laws[1]["pad"] == 2
    assert build(augment.eval).laws == build("tllib_cifar_eval").laws


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fixmatch_stong", r"unknown augmentation policy 'fixmatch_stong' \(did you mean 'fixmatch_strong'\?\)"),
        ([{"flipp": {}}], r"law 1: unknown law 'flipp' \(did you mean 'flip'\?\)"),
        (["flip", {"pad_crop": {"pads": 4}}], r"law 2: law 'pad_crop' has no option 'pads' \(did you mean 'pad'\?\)"),
        ([{"flip": {"p": 1.5}}], r"flip.p takes a probability 0..1, got 1.5"),
        ([{"flip": {"p": True}}], "flip.p takes a probability"),
        ([{"cutout": {"side": 15}}], "even number"),
        ([{"randaugment": {"space": "cm"}}], "one of mc, imagenet, torchssl, timm"),
        ([{"flip": {}, "cutout": {}}], "each law is"),
        ([{"flip": 0.5}], "must be a mapping"),
        (["center", "pad_crop"], "crops 2 times"),
        (["center", "resize"], "resizes after center.*put resize before it"),
        (["resized_crop", "resize"], "resizes after resized_crop"),
        (["resized_crop", "pad_crop"], "crops 2 times"),
        ([{"pad_crop": {"size": 16}}], "ends with images of 16x16 pixels, but the view has 32x32; a crop of another size needs a resize after it"),
        ([{"pad_crop": {"size": 16}}, {"resize": {"size": 20}}], "ends with images of 20x20 pixels"),
        ([{"resize": {"short": 40}}, "flip", "center"], "center or pad_crop must come next"),
        ([{"resize": {"short": 40}}, "resized_crop"], "center or pad_crop must come next"),
        ([{"resize": {"short": 40, "size": 40}}], "one of size, short, or height and width"),
        ([{"resized_crop": {"scale": [0.5, 0.2]}}], "resized_crop.scale takes two shares"),
        ([{"resized_crop": {"scale": [0, 1]}}], "resized_crop.scale takes two shares"),
        ([{"color_jitter": {"hue": 0.6}}], "color_jitter.hue takes a share of a turn"),
        ([{"blur": {"sigma_low": 3}}], "blur.sigma_low 3 exceeds blur.sigma_high 2.0"),
        ([{"solarize": {"threshold": 300}}], "solarize.threshold takes a level"),
        ([{"resize": {"size": 8, "height": 8, "width": 8}}], "not both"),
        ([{"resize": {"height": 8}}], "height and width together"),
        ([{"resize": {"size": 0}}], "resize.size takes a whole number of pixels 1..4096"),
        ([{"resize": {"mode": "nearest"}}], "resize.mode takes bilinear or bicubic"),
        (5, "is a name"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(RecipeError, match=message):
        build(spec)


@pytest.mark.parametrize(
    "changes",
    [{"channels": 4, "mean": (0.5,) * 4, "std": (0.5,) * 4}, {"std": (0.0, 1, 1)}, {"mean": (0.5,)}, {"size": 0}, {"size": 2.5}],
)
def test_impossible_views_are_refused(changes):
    with pytest.raises(RecipeError):
        build("plain", **changes)


def test_a_misspelt_backend_is_refused():
    assert check_backend(build("plain"), "auto", "cpu") == check_backend(build("plain"), "reference", "cpu") == "reference"
    with pytest.raises(RecipeError, match="did you mean 'triton'"):
        check_backend(build("plain"), "trition")
