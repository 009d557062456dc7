"""Trees, flat folders, archives and tables of encoded images."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data_tools.layouts import Layout, jpeg, png, put

NAMES = ("cat", "dog", "emu")


def class_folders(root: Path) -> Layout:
    splits = {}
    for split, count in (("train", 3), ("val", 2)):
        found = [(put(root / split / name / f"{i}.jpg", jpeg(10 * label + i)), label) for label, name in enumerate(NAMES) for i in range(count)]
        splits["test" if split == "val" else split] = tuple(map(list, zip(*found, strict=True)))
    rest = [put(root / "unlabeled" / "deep" / f"{i}.png", png(i)) for i in range(4)]
    splits["train"] = (splits["train"][0] + rest, splits["train"][1] + [-1] * 4)
    return Layout("class_folders", str(root), NAMES, splits)


def class_tree(root: Path) -> Layout:
    """One tree and images without a class beside it."""
    found = [(put(root / name / "deep" / f"{i}.jpg", jpeg(10 * label + i)), label) for label, name in enumerate(NAMES) for i in range(3)]
    images, labels = map(list, zip(*found, strict=True))
    rest = [put(root / "unlabelled" / f"{i}.png", png(i)) for i in range(2)]
    return Layout("class_tree", str(root), NAMES, {"train": (images + rest, labels + [-1, -1])})


def flat(root: Path) -> Layout:
    """Images here and in folders below, of which a list labels some and another one names the test."""
    files = ["a.jpg", "b c.jpg", "d.jpg", "e.jpg", "f/0.jpg", "f/g/1.png", "f/g/2.png", "z/3.jpg"]  # in the order of folders, then of names
    images = [put(root / name, (png if name.endswith("png") else jpeg)(i)) for i, name in enumerate(files)]
    known = {0: 1, 1: 0, 4: 1, 5: 0}
    put(root.parent / f"{root.name}-labels.csv", "".join(f"{files[i]},{('no', 'yes')[label]}\n" for i, label in known.items()))
    put(root.parent / f"{root.name}-test.txt", f"{files[3]} no\n{files[7]} yes\n")
    train = [i for i in range(8) if i not in (3, 7)]
    splits = {"train": ([images[i] for i in train], [known.get(i, -1) for i in train]), "test": ([images[3], images[7]], [0, 1])}
    return Layout("flat", str(root), ("no", "yes"), splits, {"labels": f"{root}-labels.csv", "test": f"{root}-test.txt"})


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def webdataset(root: Path, *, labels: str = "cls") -> Layout:
    """Two training shards and one of validation; ``labels``: which member holds them; one long name, one sample without a label."""
    splits, seed = {}, 0
    root.mkdir(parents=True, exist_ok=True)
    for split, shard, count in (("train", "train-000000", 5), ("train", "train-000001", 4), ("test", "val-000000", 3)):
        with tarfile.open(root / f"{shard}.tar", "w", format=tarfile.GNU_FORMAT if shard.endswith("1") else tarfile.PAX_FORMAT) as archive:
            for i in range(count):
                seed += 1
                key = f"deep/{'long' * 40}/{shard}-{i:04d}" if i == 1 else f"{shard}-{i:04d}"
                data, label = jpeg(seed), i % 3
                unknown = i == 4 and labels == "cls"
                add(archive, f"{key}.jpg", data)
                member = {
                    "cls": (".cls", f"{label}\n"), "json": (".json", json.dumps({"label": label, "caption": "?"})), "txt": (".txt", NAMES[label]),
                }[labels]  # fmt: skip
                if not unknown:
                    add(archive, key + member[0], member[1].encode())
                images, found = splits.setdefault(split, ([], []))
                images.append(data)
                found.append(-1 if unknown else label)
    options = {"cls": {"label": "cls"}, "json": {}, "txt": {"label": "txt"}}[labels]
    return Layout("tar", str(root), NAMES if labels == "txt" else ("0", "1", "2"), splits, options)


def imagenet(root: Path) -> Layout:
    """The ILSVRC 2012 archives with three classes, and validation labels as one WordNet id per line."""
    wnids, splits = ("n01440764", "n01443537", "n02119789"), {"train": ([], []), "test": ([], [])}
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for label in (2, 0, 1):  # the archives come in any order, rows by class and name
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for i in (2, 0, 1):
                    add(archive, f"{wnids[label]}_{i}.JPEG", jpeg(10 * label + i))
            add(outer, f"{wnids[label]}.tar", inner.getvalue())
    for label in range(3):
        splits["train"][0].extend(jpeg(10 * label + i) for i in range(3))
        splits["train"][1].extend([label] * 3)
    truth = [1, 0, 2, 0, 1]
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for number in (3, 1, 5, 2, 4):
            add(archive, f"ILSVRC2012_val_{number:08d}.JPEG", jpeg(50 + number))
    order = np.argsort(truth, kind="stable").tolist()
    splits["test"] = ([jpeg(51 + i) for i in order], [truth[i] for i in order])
    put(root / "imagenet_2012_validation_synset_labels.txt", "".join(f"{wnids[label]}\n" for label in truth))
    return Layout("imagenet", str(root), wnids, splits)


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"image": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}


def _table(seed: int, labels: list[int], kind: pa.DataType = IMAGE) -> tuple[pa.Table, list[bytes]]:
    images = [jpeg(seed + i) for i in range(len(labels))]
    values = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)] if kind == IMAGE else images
    schema = pa.schema([("image", kind), ("label", pa.int64())], {"huggingface": json.dumps({"info": {"features": FEATURES}})} if kind == IMAGE else None)
    return pa.table({"image": pa.array(values, kind), "label": pa.array(labels, pa.int64())}, schema=schema), images


def _stream(file: Path, table: pa.Table, rows: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


PARTS = (("train", (20, [0, 1, 2, 0, 1]), (30, [2, 1, 0, 2])), ("test", (40, [2, 1, 0])))


def hf_saved(root: Path) -> Layout:
    """``DatasetDict.save_to_disk``: Arrow streams in record batches, with a state and an info file for each split; one more split without labels."""
    splits: dict = {}
    for name, *parts in PARTS:
        for i, (seed, labels) in enumerate(parts):
            table, images = _table(seed, labels)
            _stream(root / name / f"data-{i:05d}-of-{len(parts):05d}.arrow", table, 2)
            found = splits.setdefault(name, ([], []))
            found[0].extend(images)
            found[1].extend(labels)
        files = [{"filename": f"data-{i:05d}-of-{len(parts):05d}.arrow"} for i in range(len(parts))]
        put(root / name / "state.json", json.dumps({"_data_files": files, "_fingerprint": "0", "_format_type": None, "_split": name}))
        put(root / name / "dataset_info.json", json.dumps({"features": FEATURES}))
    table, images = _table(60, [2, -1])  # labels of such a part are not used
    _stream(root / "unsupervised" / "data-00000-of-00001.arrow", table, 5)
    put(root / "unsupervised" / "state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    put(root / "dataset_dict.json", json.dumps({"splits": ["train", "test", "unsupervised"]}))
    splits["train"] = (splits["train"][0] + images, splits["train"][1] + [-1, -1])
    return Layout("hf_saved", str(root), NAMES, splits)


def hf_parquet(root: Path) -> Layout:
    """The hub's layout: data/SPLIT-00000-of-00002.parquet with the features in the schema."""
    splits: dict = {}
    for name, *parts in PARTS:
        for i, (seed, labels) in enumerate(parts):
            table, images = _table(seed, labels)
            (root / "data").mkdir(parents=True, exist_ok=True)
            pq.write_table(table, root / "data" / f"{name}-{i:05d}-of-{len(parts):05d}.parquet", row_group_size=2)
            found = splits.setdefault(name, ([], []))
            found[0].extend(images)
            found[1].extend(labels)
    put(root / "README.md", "---\npretty_name: tiny\n---\n")
    return Layout("parquet", str(root), NAMES, splits)


def plain_parquet(root: Path) -> Layout:
    """Parquet without anybody's notes: bytes, and class names as strings with one missing."""
    splits: dict = {}
    root.mkdir(parents=True, exist_ok=True)
    for name, seed, labels in (("train", 5, [2, 0, 1, 0, 2, 1]), ("validation", 9, [1, 2, 0])):
        table, images = _table(seed, labels, pa.binary())
        words = [None if name == "train" and i == 4 else NAMES[label] for i, label in enumerate(labels)]
        table = table.drop(["label"]).append_column("species", pa.array(words, pa.string()))
        pq.write_table(table, root / f"{name}.parquet", row_group_size=4)
        splits["test" if name == "validation" else name] = (images, [-1 if word is None else NAMES.index(word) for word in words])
    return Layout("parquet", str(root), NAMES, splits, {"label": "species"})


def torchvision_name(root: Path) -> Layout:
    """A class of torchvision whose files this package reads itself."""
    from tests.data_tools.layouts_arrays import stl10

    made = stl10(root)
    return Layout("stl10", "torchvision:STL10", made.classes, made.splits, {"root": str(root)})


def torchvision_other(root: Path) -> Layout:
    """A class of torchvision that nobody here knows: its own list of files is used."""
    splits: dict = {}
    found = [(put(root / "eurosat" / "2750" / name / f"{name}_{i}.jpg", jpeg(10 * label + i)), label) for label, name in enumerate(NAMES) for i in range(3)]
    splits["train"] = tuple(map(list, zip(*found, strict=True)))
    return Layout("torchvision", "torchvision:EuroSAT", NAMES, splits, {"root": str(root)})


LAYOUTS = {
    "class_folders": class_folders,
    "class_tree": class_tree, "flat": flat, "tar": webdataset, "imagenet": imagenet, "hf_saved": hf_saved, "hf_parquet": hf_parquet,
    "plain_parquet": plain_parquet, "torchvision": torchvision_name, "torchvision_other": torchvision_other,
}  # fmt: skip
