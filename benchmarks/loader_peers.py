"""The loader benchmark's peers: how other code turns the same JPEGs into a weak and a strong view per image, each as its project is used.

``imagenet`` is SimMatch's pair (weak: resized crop of 20-100 %, mirror; strong: the same with color jitter, grey, blur), ``tllib`` the transfer-learning
library's (strong: timm's rand-m10-n2-mstd2 with p 0.5), ``cifar`` FixMatch's.  Written from the specifications.  What a peer cannot express is replaced by
its nearest own operations, which is said below; it then does less work than ours, never more.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.loader_cases import BATCH, MEAN, PAIRS, SMALL_BATCH, SMALL_UNIT, STD, VIEW, Case, Turn
from benchmarks.loader_data import Sets
from benchmarks.peers import pipelines

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
LEVELS_MEAN, LEVELS_STD = ([255 * v for v in values] for values in (MEAN, STD))


class Missing(Exception):
    """A package that is not installed, with what to do."""


class Blur:
    """Pillow's Gaussian blur with a drawn radius."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class TimmRandAugment:
    """timm's RandAugment, applied to half of the images."""

    def __init__(self) -> None:
        from timm.data.auto_augment import rand_augment_transform

        fill = tuple(round(255 * m) for m in MEAN)
        self.op = rand_augment_transform("rand-m10-n2-mstd2", {"translate_const": 100, "img_mean": fill, "interpolation": Image.Resampling.BILINEAR})

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.op(image) if random.random() < 0.5 else image


class Both:
    """Weak and strong view of one decoded image, one after the other."""

    def __init__(self, weak: Any, strong: Any):
        self.weak, self.strong = weak, strong

    def __call__(self, image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weak(image), self.strong(image)


def _pil(pair: str) -> Both:
    from torchvision import transforms as t

    crop = [t.RandomResizedCrop(VIEW, SCALE, RATIO), t.RandomHorizontalFlip()]
    end = [t.ToTensor(), t.Normalize(MEAN, STD)]
    colours = [t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), t.RandomGrayscale(0.2), t.RandomApply([Blur()], 0.5)]
    strong = colours if pair == "imagenet" else [TimmRandAugment()]
    return Both(t.Compose([*crop, *end]), t.Compose([*crop, *strong, *end]))


def _v2() -> Both:
    from torchvision.transforms import v2 as t

    crop = [t.RandomResizedCrop(VIEW, SCALE, RATIO, antialias=True), t.RandomHorizontalFlip()]
    colours = [t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), t.RandomGrayscale(0.2), t.RandomApply([t.GaussianBlur(13, (0.1, 2.0))], 0.5)]
    end = [t.ToDtype(torch.float32, scale=True), t.Normalize(MEAN, STD)]
    return Both(t.Compose([*crop, *end]), t.Compose([*crop, *colours, *end]))


def _as_tensor(path: str) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    return decode_jpeg(read_file(path), mode=ImageReadMode.RGB)


def _loader(dataset: Any, cores: int, batch: int, images: int) -> Turn:
    """torch's DataLoader: in this very process on one core (nothing to send), else one worker process per core, kept between passes."""
    from torch.utils.data import DataLoader, RandomSampler

    sampler = RandomSampler(dataset, replacement=images > len(dataset), num_samples=images)
    workers = 0 if cores == 1 else cores
    context = "fork" if workers else None  # the benchmark's own way to start processes would import everything again
    loader = DataLoader(
        dataset, batch, sampler=sampler, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=_one_thread, multiprocessing_context=context
    )

    def run(passes: int) -> int:
        for _ in range(passes):
            for _batch in loader:
                pass
        return passes * images

    return Turn(run)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
    random.seed(worker)


def image_folder(sets: Sets, cores: int, pair: str, tensors: bool = False) -> Turn:
    """torchvision's ImageFolder: decoded once per image by Pillow (or to a tensor by torchvision), views made one by one."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(sets.tree / "train"), _v2(), loader=_as_tensor) if tensors else ImageFolder(str(sets.tree / "train"), _pil(pair))
    return _loader(dataset, cores, BATCH, -(-len(dataset) // BATCH) * BATCH)


class SmallImages(torch.utils.data.Dataset):
    """Arrays of 32x32 images turned into Pillow images one by one, as torchvision's CIFAR10 does."""

    def __init__(self, pixels: np.ndarray):
        made = pipelines(PAIRS["cifar"][2], MEAN, STD)
        self.pixels, self.both = pixels, Both(made["fixmatch_weak"], made["fixmatch_strong"])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.both(Image.fromarray(self.pixels[i]))


def small_pil(sets: Sets, cores: int) -> Turn:
    return _loader(SmallImages(np.load(sets.cifar / "train.pixels.npy")), cores, SMALL_BATCH, SMALL_UNIT)


def ffcv(sets: Sets, cores: int) -> Turn:
    """FFCV's Loader with one pipeline per view, each decoding for itself. No hue, grey, blur: brightness, contrast and saturation stand for the strong view."""
    try:
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline import PipelineSpec
        from ffcv.transforms import NormalizeImage, RandomBrightness, RandomContrast, RandomHorizontalFlip, RandomSaturation, ToTensor, ToTorchImage
    except ImportError as error:
        raise Missing(f"needs the ffcv package ({error}): make ffcv") from None

    def view(*colours: Any) -> Any:
        decode = RandomResizedCropRGBImageDecoder((VIEW, VIEW), np.array(SCALE), np.array(RATIO))
        normalise = NormalizeImage(np.array(LEVELS_MEAN), np.array(LEVELS_STD), np.float32)
        return PipelineSpec("image", decode, [RandomHorizontalFlip(), *colours, normalise, ToTensor(), ToTorchImage()])

    strong = view(RandomBrightness(0.4, 0.8), RandomContrast(0.4, 0.8), RandomSaturation(0.4, 0.8))
    pipelines = {"weak": view(), "strong": strong, "image": None, "label": None}
    file = next(sets.ffcv.glob("train*.beton"))
    loader = Loader(str(file), BATCH, num_workers=cores, os_cache=True, order=OrderOption.RANDOM, seed=0, drop_last=False, pipelines=pipelines)
    images = len(loader.indices)

    def run(passes: int) -> int:
        for _ in range(passes):
            for _batch in loader:
                pass
        return passes * images

    return Turn(run)


def dali(sets: Sets, cores: int) -> Turn:
    """DALI on the host: one decode, two branches, no grey. It reads ahead on its own, so that some batches run before the clock."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except Exception as error:  # a broken CUDA library raises other things than ImportError
        raise Missing(f"needs the nvidia-dali package ({type(error).__name__}: {error}): make dali") from None

    def branch(image: Any, strong: bool) -> Any:
        view = fn.random_resized_crop(image, size=(VIEW, VIEW), random_area=SCALE, random_aspect_ratio=RATIO, antialias=True)
        if strong:
            if fn.random.coin_flip(probability=0.8, dtype=types.BOOL):
                b, c, s = fn.random.uniform(range=(0.6, 1.4)), fn.random.uniform(range=(0.6, 1.4)), fn.random.uniform(range=(0.6, 1.4))
                view = fn.color_twist(view, brightness=b, contrast=c, saturation=s, hue=fn.random.uniform(range=(-36.0, 36.0)))
            if fn.random.coin_flip(probability=0.5, dtype=types.BOOL):
                view = fn.gaussian_blur(view, window_size=13, sigma=fn.random.uniform(range=(0.1, 2.0)))
        return fn.crop_mirror_normalize(
            view, dtype=types.FLOAT, output_layout="CHW", mean=LEVELS_MEAN, std=LEVELS_STD, mirror=fn.random.coin_flip(probability=0.5)
        )

    @pipeline_def(batch_size=BATCH, num_threads=cores, device_id=None, seed=0, set_affinity=False, enable_conditionals=True)
    def both() -> Any:
        encoded, label = fn.readers.file(file_root=str(sets.tree / "train"), random_shuffle=True, initial_fill=1024, name="files")
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        return branch(image, False), branch(image, True), label

    pipeline = both()
    pipeline.build()
    batches = -(-pipeline.epoch_size("files") // BATCH)

    def take(count: int) -> None:
        for _ in range(count):
            weak, strong, _label = pipeline.run()
            weak.as_tensor(), strong.as_tensor()

    def run(passes: int) -> int:
        take(passes * batches)
        return passes * batches * BATCH

    return Turn(run, lead_in=lambda: take(3))


def cases() -> list[Case]:
    """The peers, in the table's order."""

    def peer(name: str, pair: str, open: Any) -> Case:
        return Case(name, "views", pair, open, ours=False)

    return [
        peer("PIL: ImageFolder + torchvision transforms", "imagenet", partial(image_folder, pair="imagenet")),
        peer("torchvision v2 on tensors", "imagenet", partial(image_folder, pair="imagenet", tensors=True)),
        peer("FFCV, a pipeline per view", "imagenet", ffcv),
        peer("DALI on the host, two branches", "imagenet", dali),
        peer("PIL: ImageFolder + timm RandAugment", "tllib", partial(image_folder, pair="tllib")),
        peer("PIL: per-image transforms", "cifar", small_pil),
    ]
