"""The transfer collections in the layouts in which they are published, with three classes of a few images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.data_tools.layouts import Layout, jpeg, put

COUNTS = {"train": 3, "val": 2, "test": 2}


def _images(*names: str, classes: int = 3):
    """(split, class, number of the image over all) in the order split, class."""
    seed = 0
    for split in names:
        for label in range(classes):
            for _ in range(COUNTS[split]):
                seed += 1
                yield split, label, seed


class _Truth(dict):
    def note(self, split: str, image: bytes, label: int) -> None:
        images, labels = self.setdefault(split, ([], []))
        images.append(image)
        labels.append(label)


def food101(root: Path) -> Layout:
    folder, names, truth, lines = root / "food-101", ("apple_pie", "beef", "beef_stew"), _Truth(), {"train": [], "test": []}
    for split, label, seed in _images("train", "test"):
        truth.note(split, put(folder / "images" / names[label] / f"{1000 + seed}.jpg", jpeg(seed)), label)
        lines[split].append(f"{names[label]}/{1000 + seed}")
    for split, found in lines.items():
        put(folder / "meta" / f"{split}.txt", "\n".join(found[::-1]) + "\n")  # rows come sorted, as from a tree of class folders
    put(folder / "meta" / "classes.txt", "\n".join(names) + "\n")
    return Layout("food101", str(root), names, truth)


def cub200(root: Path) -> Layout:
    folder, names, truth = root / "CUB_200_2011", ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"), _Truth()
    tables: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    for number, (split, label, seed) in enumerate(_images("train", "test"), 1):
        path = f"{names[label]}/bird_{seed:04d}.jpg"
        truth.note(split, put(folder / "images" / path, jpeg(seed)), label)
        for table, value in zip(tables.values(), (path, label + 1, int(split == "train")), strict=True):
            table.append(f"{number} {value}")
    for name, table in tables.items():
        put(folder / f"{name}.txt", "\n".join(table) + "\n")
    put(folder / "classes.txt", "".join(f"{i + 1} {name}\n" for i, name in enumerate(names)))
    return Layout("cub200", str(root), names, truth)


def aircraft(root: Path) -> Layout:
    folder, names, truth = root / "fgvc-aircraft-2013b" / "data", ("707-320", "A340-200", "DH 82"), _Truth()
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for split, label, seed in _images("train", "test"):
        truth.note(split, put(folder / "images" / f"{seed:07d}.jpg", jpeg(seed)), label)
        lines["trainval" if split == "train" else split].append(f"{seed:07d} {names[label]}")
    for name, found in lines.items():
        put(folder / f"images_variant_{name}.txt", "\n".join(found) + "\n")
    put(folder / "variants.txt", "\n".join(names) + "\n")
    return Layout("aircraft", str(root), names, truth)


def _annotations(entries: list[dict], order: tuple[str, ...]) -> np.ndarray:
    """A struct array [1, N] as MATLAB keeps it."""
    table = np.empty((1, len(entries)), [(name, object) for name in order])
    for i, entry in enumerate(entries):
        for name in order:
            table[0, i][name] = entry[name]
    return table


def cars(root: Path) -> Layout:
    from scipy.io import savemat

    folder, names, truth = root / "stanford_cars", ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi 100 Wagon 1994"), _Truth()
    entries: dict[str, list[dict]] = {"train": [], "test": []}
    for split, label, seed in _images("train", "test"):
        truth.note(split, put(folder / f"cars_{split}" / f"{seed:05d}.jpg", jpeg(seed)), label)
        entries[split].append({"bbox_x1": 1, "class": label + 1, "fname": f"{seed:05d}.jpg"})
    (folder / "devkit").mkdir()
    fields = ("bbox_x1", "class", "fname")
    savemat(folder / "devkit" / "cars_train_annos.mat", {"annotations": _annotations(entries["train"], fields)})
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": _annotations(entries["test"], fields)})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(names, object)[None]})
    return Layout("cars", str(root), names, truth)


def cars_one_file(root: Path) -> Layout:
    """The other published form: one annotation file for all images."""
    from scipy.io import savemat

    names, truth, entries = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi 100 Wagon 1994"), _Truth(), []
    for split, label, seed in _images("train", "test"):
        truth.note(split, put(root / "car_ims" / f"{seed:06d}.jpg", jpeg(seed)), label)
        entries.append({"relative_im_path": f"car_ims/{seed:06d}.jpg", "class": label + 1, "test": int(split == "test")})
    annotations = _annotations(entries, ("relative_im_path", "class", "test"))
    savemat(root / "cars_annos.mat", {"annotations": annotations, "class_names": np.array(names, object)[None]})
    return Layout("cars", str(root), names, truth)


def sun397(root: Path) -> Layout:
    folder, names, truth = root / "SUN397", ("a/abbey", "a/apartment_building/outdoor", "z/zoo"), _Truth()
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for split, label, seed in _images("train", "test"):
        path = f"{names[label]}/sun_a{seed:04d}.jpg"
        truth.note(split, put(folder / path, jpeg(seed)), label)
        lines[split].append(f"/{path}")
    put(folder / "ClassName.txt", "".join(f"/{name}\n" for name in names))
    put(root / "Partitions" / "Training_01.txt", "\n".join(lines["train"]) + "\n")
    put(root / "Partitions" / "Testing_01.txt", "\n".join(lines["test"]) + "\n")
    return Layout("sun397", str(root), ("abbey", "apartment_building/outdoor", "zoo"), truth)


def dtd(root: Path, *, validation: str = "drop") -> Layout:
    folder, names, truth = root / "dtd" / "dtd", ("banded", "blotchy", "braided"), _Truth()
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for split, label, seed in _images("train", "val", "test"):
        path = f"{names[label]}/{names[label]}_{seed:04d}.jpg"
        image = put(folder / "images" / path, jpeg(seed))
        lines[split].append(path)
        if split != "val":
            truth.note(split, image, label)
        elif validation != "drop":
            truth.note("train", image, -1 if validation == "unlabeled" else label)
    for split, found in lines.items():
        put(folder / "labels" / f"{split}1.txt", "\n".join(found) + "\n")
    return Layout("dtd", str(root), names, truth, {} if validation == "drop" else {"validation": validation})


def pets(root: Path) -> Layout:
    folder, names, truth = root / "oxford-iiit-pet", ("Abyssinian", "american_bulldog", "yorkshire_terrier"), _Truth()
    lines: dict[str, list[str]] = {"trainval": ["#Image CLASS-ID SPECIES BREED ID"], "test": []}
    for split, label, seed in _images("train", "test"):
        name = f"{names[label]}_{seed}"
        truth.note(split, put(folder / "images" / f"{name}.jpg", jpeg(seed)), label)
        lines["trainval" if split == "train" else split].append(f"{name} {label + 1} 1 1")
    put(folder / "images" / "Abyssinian_1.mat", b"MATLAB")  # the published folder holds some of these
    for name, found in lines.items():
        put(folder / "annotations" / f"{name}.txt", "\n".join(found) + "\n")
    return Layout("pets", str(root), names, truth)


def flowers102(root: Path, *, validation: str = "unlabeled") -> Layout:
    from scipy.io import savemat

    folder, truth, labels = root / "flowers-102", _Truth(), []
    ids: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for split, label, seed in _images("train", "val", "test"):
        image = put(folder / "jpg" / f"image_{seed:05d}.jpg", jpeg(seed))
        labels.append(label + 1)
        ids[split].append(seed)
        if split != "val":
            truth.note(split, image, label)
        elif validation != "drop":
            truth.note("train", image, -1 if validation == "unlabeled" else label)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(folder / "setid.mat", {"trnid": [ids["train"]], "valid": [ids["val"]], "tstid": [ids["test"]]})
    return Layout("flowers102", str(root), tuple(f"flower {i}" for i in (1, 2, 3)), truth, {} if validation == "unlabeled" else {"validation": validation})


def caltech101(root: Path, *, background: str = "yes") -> Layout:
    """Five images of each class, three of which are drawn for training; the rows are known, which ones is the reader's draw."""
    folder, names, truth = root / "caltech101" / "101_ObjectCategories", ("BACKGROUND_Google", "Faces", "accordion"), _Truth()
    names = names if background == "yes" else names[1:]
    for label, name in enumerate(names):
        chosen = set(np.random.RandomState([0, label]).permutation(5)[:3].tolist())
        for i in range(5):
            image = put(folder / name / f"image_{i + 1:04d}.jpg", jpeg(100 * label + i))
            truth.note("train" if i in chosen else "test", image, label)
    if background == "no":
        put(folder / "BACKGROUND_Google" / "image_0001.jpg", jpeg(7))
    return Layout("caltech101", str(root), names, truth, {"per_class": "3"} | ({} if background == "yes" else {"background": "no"}))


def image_lists(root: Path) -> Layout:
    names, truth = ("red fox", "wolf", "zebra"), _Truth()
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for split, label, seed in _images("train", "val", "test"):
        path = f"images/{names[label]}/photo no {seed}.jpg"
        image = put(root / path, jpeg(seed))
        truth.note("test" if split == "test" else "train", image, -1 if split == "val" else label)
        lines[split].append(f"{path} {label}")
    for split, file in (("train", "train_100"), ("val", "validation"), ("test", "test")):
        put(root / "image_list" / f"{file}.txt", "\n".join(lines[split]) + "\n")
    return Layout("image_lists", str(root), names, truth, {"unlabeled": "validation.txt"})


LAYOUTS = {
    "food101": food101, "cub200": cub200, "aircraft": aircraft, "cars": cars, "cars_one_file": cars_one_file, "sun397": sun397, "dtd": dtd, "pets": pets,
    "flowers102": flowers102, "caltech101": caltech101, "image_lists": image_lists,
}  # fmt: skip
