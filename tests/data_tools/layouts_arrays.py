"""Collections of decoded images in a few files: CIFAR, STL-10, SVHN, IDX, downsampled ImageNet."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data_tools.collections import idx_bytes
from tests.data_tools.layouts import Layout, noise, planes, put

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEN = list(range(10))


def cifar_batches(root: Path) -> Layout:
    folder, train, test = root / "cifar-10-batches-py", noise(20, 32, 1), noise(10, 32, 2)
    for i in range(5):
        content = {b"data": planes(train[4 * i : 4 * i + 4]), b"labels": [(4 * i + k) % 10 for k in range(4)]}
        put(folder / f"data_batch_{i + 1}", pickle.dumps(content, protocol=2))
    put(folder / "test_batch", pickle.dumps({b"data": planes(test), b"labels": TEN}, protocol=2))
    put(folder / "batches.meta", pickle.dumps({b"label_names": [name.encode() for name in CIFAR]}, protocol=2))
    return Layout("cifar_batches", str(root), CIFAR, {"train": (list(train), TEN * 2), "test": (list(test), TEN)})


def cifar_sheets(root: Path) -> Layout:
    train, test = noise(20, 32, 1), noise(10, 32, 2)
    root.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate([*np.split(train, 5), test]):
        Image.fromarray(part.reshape(-1, 1024, 3)).save(root / ("test_batch.png" if i == 5 else f"data_batch_{i + 1}.png"))
    put(root / "train_lables.json", json.dumps(TEN * 2))
    put(root / "test_lables.json", json.dumps(TEN))
    return Layout("cifar_sheets", str(root), CIFAR, {"train": (list(train), TEN * 2), "test": (list(test), TEN)})


def cifar_binary(root: Path) -> Layout:
    folder, train, test = root / "cifar-10-batches-bin", noise(20, 32, 1), noise(10, 32, 2)

    def records(images, labels):
        return np.concatenate([np.array(labels, np.uint8)[:, None], planes(images)], axis=1).tobytes()

    for i in range(5):
        put(folder / f"data_batch_{i + 1}.bin", records(train[4 * i : 4 * i + 4], [(4 * i + k) % 10 for k in range(4)]))
    put(folder / "test_batch.bin", records(test, TEN))
    put(folder / "batches.meta.txt", "\n".join(CIFAR) + "\n\n")
    return Layout("cifar_binary", str(root), CIFAR, {"train": (list(train), TEN * 2), "test": (list(test), TEN)})


def cifar100_binary(root: Path, labels: str = "coarse") -> Layout:
    folder, train, test = root / "cifar-100-binary", noise(6, 32, 1), noise(3, 32, 2)
    fine, coarse = [5, 4, 3, 2, 1, 0], [0, 1, 2, 0, 1, 2]
    for name, images in (("train", train), ("test", test)):
        table = np.array([coarse[: len(images)], fine[: len(images)]], np.uint8).T
        put(folder / f"{name}.bin", np.concatenate([table, planes(images)], axis=1).tobytes())
    put(folder / "fine_label_names.txt", "\n".join("abcdef") + "\n")
    put(folder / "coarse_label_names.txt", "fish\nflowers\nfruit\n")
    classes, kept = (("fish", "flowers", "fruit"), coarse) if labels == "coarse" else (tuple("abcdef"), fine)
    return Layout("cifar_binary", str(root), classes, {"train": (list(train), kept), "test": (list(test), kept[:3])}, {"labels": labels})


def stl10(root: Path, *, unlabeled: str = "yes") -> Layout:
    folder, train, test, rest = root / "stl10_binary", noise(12, 96, 1), noise(10, 96, 2), noise(7, 96, 3)
    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    for name, images in (("train", train), ("test", test), ("unlabeled", rest)):
        put(folder / f"{name}_X.bin", np.ascontiguousarray(images.transpose(0, 3, 2, 1)).tobytes())  # planes, column by column
    labels = [*TEN, 3, 1]
    put(folder / "train_y.bin", (np.array(labels, np.uint8) + 1).tobytes())
    put(folder / "test_y.bin", (np.arange(10, dtype=np.uint8) + 1).tobytes())
    put(folder / "class_names.txt", "\n".join(names) + "\n")
    put(folder / "fold_indices.txt", "0 1 2 3 4 5 6 7 8 9 \n11 10 9 8 7 6 5 4 2 0 \n")
    extra = (list(rest), [-1] * 7) if unlabeled == "yes" else ([], [])
    splits = {"train": (list(train) + extra[0], labels + extra[1]), "test": (list(test), TEN)}
    return Layout("stl10", str(root), names, splits, {} if unlabeled == "yes" else {"unlabeled": "no"})


def svhn(root: Path, *, extra: str = "unlabeled") -> Layout:
    from scipy.io import savemat

    truth = {}
    for name, count, seed in (("train", 20, 1), ("test", 10, 2), ("extra", 5, 3)):
        images, labels = noise(count, 32, seed), [i % 10 for i in range(count)]
        root.mkdir(parents=True, exist_ok=True)
        numbers = np.array([label or 10 for label in labels], np.uint8)[:, None]
        savemat(root / f"{name}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": numbers}, do_compression=True)
        truth[name] = (list(images), labels)
    more = {"no": ([], []), "train": truth["extra"], "unlabeled": (truth["extra"][0], [-1] * 5)}[extra]
    splits = {"train": (truth["train"][0] + more[0], truth["train"][1] + more[1]), "test": truth["test"]}
    return Layout("svhn", str(root), tuple("0123456789"), splits, {} if extra == "no" else {"extra": extra})


def idx(root: Path) -> Layout:
    splits = {}
    for name, stem, count, seed in (("train", "train", 20, 1), ("test", "t10k", 10, 2)):
        images = noise(count, 8, seed, channels=1)
        put(root / "raw" / f"{stem}-images-idx3-ubyte", idx_bytes(images[..., 0]))
        put(root / "raw" / f"{stem}-labels-idx1-ubyte", idx_bytes(np.arange(count) % 10))
        splits[name] = (list(images), [i % 10 for i in range(count)])
    return Layout("idx", str(root), tuple("0123456789"), splits, channels=1)


def small_imagenet(root: Path, *, side: int = 4, batches: int = 2, protocol: int = 4, names: bool = True) -> Layout:
    """1000 classes, two images each in training (their order shuffled) and one in validation."""
    order = np.random.RandomState(0).permutation(1000 * batches)
    labels = (order % 1000).tolist()
    train, test = noise(1000 * batches, side, 1), noise(1000, side, 2)
    val = np.random.RandomState(1).permutation(1000).tolist()

    def batch(images, own):
        return pickle.dumps({"data": planes(images), "labels": [label + 1 for label in own], "mean": planes(images).mean(0)}, protocol=protocol)

    for i in range(batches):
        put(root / f"train_data_batch_{i + 1}", batch(train[1000 * i : 1000 * i + 1000], labels[1000 * i : 1000 * i + 1000]))
    put(root / "val_data", batch(test, val))
    classes = tuple(f"n{7919 * i % 100000:08d}" for i in range(1000)) if names else tuple(map(str, range(1000)))
    if names:
        put(root / "map_clsloc.txt", "".join(f"{name} {i + 1} some_name\n" for i, name in enumerate(classes)))
    return Layout("small_imagenet", str(root), classes, {"train": (list(train), labels), "test": (list(test), val)})


LAYOUTS = {
    "cifar_batches": cifar_batches, "cifar_sheets": cifar_sheets, "cifar_binary": cifar_binary, "cifar100_binary": cifar100_binary, "stl10": stl10,
    "svhn": svhn, "idx": idx, "small_imagenet": small_imagenet,
}  # fmt: skip
