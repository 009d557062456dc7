"""The published augmentations by name: what a recipe may write instead of a list of laws."""

from __future__ import annotations

from typing import Any

Laws = list[dict[str, Any]]

_FLIP: Laws = [{"flip": {"p": 0.5}}]
_SHIFT: Laws = [{"pad_crop": {"pad": 4, "mode": "reflect"}}]
_EIGHTH: Laws = [{"pad_crop": {"pad": 0.125, "mode": "reflect"}}]
_ZERO_EIGHTH: Laws = [{"pad_crop": {"pad": 0.125, "mode": "constant"}}]
_CUTOUT: Laws = [{"cutout": {"side": 16, "fill": 127}}]
_MC: Laws = [{"randaugment": {"space": "mc", "n": 2, "p": 0.5}}, *_CUTOUT]
_TORCHSSL: Laws = [{"randaugment": {"space": "torchssl", "n": 3, "p": 1.0}}, {"cutout_fraction": {"most": 0.5}}]
_IMAGENET: Laws = [{"randaugment": {"space": "imagenet", "n": 2, "p": 1.0}}]
_TIMM: Laws = [{"randaugment": {"space": "timm", "n": 2, "p": 0.5}}]
_STL_TO_32: Laws = [{"resize": {"size": 32, "mode": "bilinear"}}]
_CIFAR_ENLARGED: Laws = [{"pad_crop": {"pad": 4, "mode": "reflect", "size": 32}}, {"resize": {"mode": "bicubic"}}, *_FLIP]


def _crop(low: float, high: float = 1.0) -> Laws:
    return [{"resized_crop": {"scale": [low, high], "ratio": [3 / 4, 4 / 3], "mode": "bilinear"}}, *_FLIP]


def _colours(brightness: float, contrast: float, saturation: float, hue: float, blur: float = 0.5) -> Laws:
    jitter = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue, "p": 0.8}
    return [{"color_jitter": jitter}, {"grayscale": {"p": 0.2}}, {"blur": {"p": blur, "sigma_low": 0.1, "sigma_high": 2.0}}]


def _view_of_five(low: float, high: float) -> Laws:
    return [*_crop(low, high), *_colours(0.4, 0.4, 0.2, 0.1), {"solarize": {"threshold": 128, "p": 0.1}}]


_MOCO: Laws = _crop(0.2) + _colours(0.4, 0.4, 0.4, 0.1)
_SIMCLR: Laws = _crop(0.08) + _colours(0.8, 0.8, 0.8, 0.2)

NAMED: dict[str, tuple[str, Laws]] = {
    "plain": ("the image in the middle of the view, nothing drawn", [{"center": {}}]),
    "flip": ("mirror only", [{"center": {}}, *_FLIP]),
    "fixmatch_weak": ("FixMatch (arXiv:2001.07685): mirror, crop after reflect padding of 4", _FLIP + _SHIFT),
    "fixmatch_strong": ("FixMatch: weak, 2 of 14 RandAugment ops at levels 1..9 with p 0.5, cutout 17x17", _FLIP + _SHIFT + _MC),
    "digits_weak": ("FixMatch's weak view without mirror, for digits and letters", _SHIFT),
    "digits_strong": ("FixMatch's strong view without mirror", _SHIFT + _MC),
    "torchssl_weak": ("TorchSSL (CIFAR 32, SVHN 32, STL-10 96): mirror, crop after reflect padding of 4", _FLIP + _SHIFT),
    "torchssl_strong": ("TorchSSL: 3 RandAugment ops of continuous magnitude and cutout first, then mirror and crop", _TORCHSSL + _FLIP + _SHIFT),
    "tllib_default_weak": ("transfer-learning library, size 224: resized crop of 20-100 % of the area, mirror", _crop(0.2)),
    "tllib_default_strong": ("the same, then timm's rand-m10-n2-mstd2 with p 0.5, no cutout", _crop(0.2) + _TIMM),
    "tllib_cifar_weak": ("the library's CIFAR views: crop 32 after reflect padding of 4, enlarge to the view, mirror", _CIFAR_ENLARGED),
    "tllib_cifar_strong": ("the same, then timm's rand-m10-n2-mstd2 with p 0.5", _CIFAR_ENLARGED + _TIMM),
    "tllib_eval": ("the library's evaluation, size 224: squash to 256 x 256, keep the middle", [{"resize": {"size": 256, "mode": "bicubic"}}, {"center": {}}]),
    "tllib_cifar_eval": ("the library's CIFAR evaluation: enlarge to the view", [{"resize": {"mode": "bicubic"}}]),
    "imagenet_weak": ("SimMatch, ShrinkMatch, SimMatchV2: resized crop of 20-100 % of the area, mirror", _crop(0.2)),
    "imagenet_strong": ("the same with color jitter, grey and blur: MoCo v2's view", _MOCO),
    "imagenet_randaugment": ("SimMatch's option: resized crop of 20-100 %, mirror, 2 of 16 RandAugment ops", _crop(0.2) + _IMAGENET),
    "imagenet_eval": ("shorter side to 256, middle 224", [{"resize": {"short": 256, "mode": "bilinear"}}, {"center": {}}]),
    "eman_weak": ("FixMatch-EMAN (arXiv:2101.08482): resized crop of 8-100 % of the area, mirror", _crop(0.08)),
    "eman_strong": ("the same, then 2 of 16 RandAugment ops, always applied", _crop(0.08) + _IMAGENET),
    "simmatchv2_crop_224": ("SimMatchV2's five strong views: 14.0-100 % of the area, size 224", _view_of_five(0.140, 1.000)),
    "simmatchv2_crop_192": ("11.7-86.0 % of the area, size 192", _view_of_five(0.117, 0.860)),
    "simmatchv2_crop_160": ("9.5-71.5 % of the area, size 160", _view_of_five(0.095, 0.715)),
    "simmatchv2_crop_120": ("7.3-57.1 % of the area, size 120", _view_of_five(0.073, 0.571)),
    "simmatchv2_crop_96": ("5.0-42.9 % of the area, size 96", _view_of_five(0.050, 0.429)),
    "shrinkmatch_cifar_weak": ("ShrinkMatch on CIFAR: mirror, crop after reflect padding of 4", _FLIP + _SHIFT),
    "shrinkmatch_cifar_strong": ("the same, 2 of 14 RandAugment ops, cutout 17x17", _FLIP + _SHIFT + _MC),
    "shrinkmatch_stl_weak": ("ShrinkMatch on STL-10, size 96: mirror, crop after reflect padding of 4", _FLIP + _SHIFT),
    "shrinkmatch_stl_strong": ("TorchSSL's RandAugment(3) and cutout first, then mirror and crop", _TORCHSSL + _FLIP + _SHIFT),
    "shrinkmatch_svhn_weak": ("ShrinkMatch on SVHN, size 32: mirror too, crop after reflect padding of 4", _FLIP + _SHIFT),
    "shrinkmatch_svhn_strong": ("TorchSSL's RandAugment(3) and cutout first, then mirror and crop", _TORCHSSL + _FLIP + _SHIFT),
    "longtail_weak": ("SimPro, ACR on CIFAR and small ImageNet 32/64: mirror, crop after reflect padding of size / 8", _FLIP + _EIGHTH),
    "longtail_strong": ("the same, 2 of 14 RandAugment ops, cutout 17x17 at every size", _FLIP + _EIGHTH + _MC),
    "longtail_stl_weak": ("SimPro, ACR on STL-10: every image to 32 x 32 first", _STL_TO_32 + _FLIP + _EIGHTH),
    "longtail_stl_strong": ("every image to 32 x 32, then the strong view", _STL_TO_32 + _FLIP + _EIGHTH + _MC),
    "longtail_stl_eval": ("every image to 32 x 32", _STL_TO_32),
    "acr_imagenet_labeled": ("ACR's labelled view of small ImageNet: crop after zero padding of size / 8, then mirror", _ZERO_EIGHTH + _FLIP),
    "moco_v2": ("MoCo v2 (arXiv:2003.04297): resized crop of 20-100 %, mirror, jitter 0.4/0.4/0.4/0.1, grey 0.2, blur 0.5", _MOCO),
    "simclr": ("SimCLR (arXiv:2002.05709) with torchvision's color ops: 8-100 %, jitter 0.8/0.8/0.8/0.2, grey 0.2, blur 0.5", _SIMCLR),
    "torchvision_train": ("torchvision's plain training view: resized crop of 8-100 % of the area, mirror", _crop(0.08)),
}
POLICIES: dict[str, Laws] = {name: laws for name, (_, laws) in NAMED.items()}
ABOUT: dict[str, str] = {name: about for name, (about, _) in NAMED.items()}


def table() -> str:
    """One line per named policy, for terminals and docs."""
    width = max(map(len, NAMED))
    return "\n".join(f"{name:{width}s}  {about}" for name, about in ABOUT.items())
