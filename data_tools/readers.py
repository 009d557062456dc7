"""Reading raw image collections: CIFAR PNG sheets, CIFAR python batches, IDX files (MNIST), class-per-folder trees."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from fastssl.errors import DataError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS = tuple("0123456789")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
Image.MAX_IMAGE_PIXELS = None  # a sheet of 10 000 CIFAR images is larger than Pillow's guard against hostile files expects


@dataclass(frozen=True)
class Picture:
    """One decoded image, uint8 [H, W, C]; ``jpeg`` holds the original bytes where they decode to exactly these RGB pixels."""

    pixels: np.ndarray
    jpeg: bytes | None = None


@dataclass(frozen=True)
class RawSplit:
    """One split of a raw collection: int64 labels [N], a stable key per row, random access to pictures, extents int32 [N, 2] known without decoding."""

    labels: np.ndarray
    keys: list[str]
    load: Callable[[int], Picture]
    extents: np.ndarray


@dataclass(frozen=True)
class RawDataset:
    kind: str
    name: str
    classes: tuple[str, ...]
    channels: int
    splits: dict[str, RawSplit]


def open_raw(path: str | Path) -> RawDataset:
    """Recognise what kind of collection ``path`` is and open it; DataError names the kinds that are known."""
    root = Path(path)
    if not root.exists():
        raise DataError(f"source {str(root)!r} does not exist; fetch it first with `fastssl-data fetch NAME {root}`")
    if not root.is_dir():
        raise DataError(f"source {str(root)!r} is not a folder; unpack it first")
    for reader in (_sheets, _python_batches, _idx, _class_folders):
        found = reader(root)
        if found is not None:
            return found
    raise DataError(
        f"{str(root)!r} is no known kind of image collection; known: CIFAR-10 PNG sheets (data_batch_1.png ...), "
        "CIFAR python batches (data_batch_1 ... or train, test), IDX files (train-images-idx3-ubyte[.gz]), "
        "class-per-folder trees (train/<class>/*.jpg and test/ or val/)"
    )


def _array_split(pixels: np.ndarray, labels: np.ndarray, key: str) -> RawSplit:
    if len(pixels) != len(labels):
        raise DataError(f"{key}: {len(pixels)} images but {len(labels)} labels; fetch the collection again")
    if not len(pixels):
        raise DataError(f"{key}: no images in it")
    extents = np.tile(np.asarray(pixels.shape[1:3], np.int32), (len(pixels), 1))
    return RawSplit(labels.astype(np.int64), [f"{key}/{i}" for i in range(len(labels))], lambda row: Picture(pixels[row]), extents)


def _sheets(root: Path) -> RawDataset | None:
    sheets = [root / f"data_batch_{i}.png" for i in range(1, 6)]
    if not sheets[0].is_file():
        return None
    splits = {}
    for split, files, label_name in (("train", sheets, "train_lables.json"), ("test", [root / "test_batch.png"], "test_lables.json")):
        pixels = np.concatenate([_read_sheet(file) for file in files])
        splits[split] = _array_split(pixels, _read_label_list(root / label_name), split)
    return RawDataset("cifar_sheets", "cifar10", CIFAR10_CLASSES, 3, splits)


def _read_sheet(file: Path) -> np.ndarray:
    if not file.is_file():
        raise DataError(f"{str(file)!r} is missing; fetch the collection again")
    try:
        sheet = np.asarray(Image.open(file))
    except (OSError, SyntaxError) as error:
        raise DataError(f"{str(file)!r} is damaged ({error}); fetch the collection again") from error
    if sheet.dtype != np.uint8 or sheet.ndim != 3 or sheet.shape[1:] != (1024, 3):
        raise DataError(f"{str(file)!r} is {sheet.dtype}{list(sheet.shape)}, a CIFAR sheet has one image of 1024 RGB pixels per row; fetch it again")
    return sheet.reshape(-1, 32, 32, 3)


def _read_label_list(file: Path) -> np.ndarray:
    try:
        return np.asarray(json.loads(file.read_text()), dtype=np.int64).reshape(-1)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{str(file)!r} cannot be read as a JSON list of labels ({error}); fetch the collection again") from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain containers and numpy arrays only, so that a foreign file cannot run code."""

    def find_class(self, module: str, name: str):
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} or (module.startswith("numpy") and name == "_reconstruct"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"unexpected {module}.{name}")


def _python_batches(root: Path) -> RawDataset | None:
    for folder in (root, root / "cifar-10-batches-py", root / "cifar-100-python"):
        for meta, label_key, name_key, train, name in (
            ("batches.meta", b"labels", b"label_names", [f"data_batch_{i}" for i in range(1, 6)], "cifar10"),
            ("meta", b"fine_labels", b"fine_label_names", ["train"], "cifar100"),
        ):
            test = ["test_batch"] if name == "cifar10" else ["test"]
            if (folder / meta).is_file() and (folder / train[0]).is_file():
                classes = tuple(text.decode() for text in _unpickle(folder / meta)[name_key])
                splits = {}
                for split, files in (("train", train), ("test", test)):
                    parts = [_unpickle(folder / file) for file in files]
                    planes = np.concatenate([np.asarray(part[b"data"], np.uint8) for part in parts]).reshape(-1, 3, 32, 32)
                    labels = np.concatenate([np.asarray(part[label_key], np.int64) for part in parts])
                    splits[split] = _array_split(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels, split)
                return RawDataset("cifar_batches", name, classes, 3, splits)
    return None


def _unpickle(file: Path) -> dict:
    try:
        with open(file, "rb") as handle:
            return _ArraysOnly(handle, encoding="bytes").load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise DataError(f"{str(file)!r} is missing or damaged ({error}); fetch the collection again") from error


def find_idx(root: Path, stem: str) -> Path | None:
    """The IDX file called ``stem`` (gz or not) in ``root`` or torchvision's raw/ subfolders."""
    for folder in (root, root / "raw", *sorted(root.glob("*/raw"))):
        for file in (folder / stem, folder / f"{stem}.gz"):
            if file.is_file():
                return file
    return None


def _idx(root: Path) -> RawDataset | None:
    if find_idx(root, "train-images-idx3-ubyte") is None:
        return None
    splits = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        pixels, labels = (read_idx(root, f"{stem}-{part}") for part in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        splits[split] = _array_split(pixels[..., None], labels, split)
    return RawDataset("idx", root.name, DIGITS, 1, splits)


def read_idx(root: Path, stem: str) -> np.ndarray:
    """An IDX file of unsigned bytes: magic 0, 0, 8, ndim, then big-endian int32 sizes, then the data."""
    file = find_idx(root, stem)
    if file is None:
        raise DataError(f"{str(root)!r} lacks {stem}[.gz]; fetch the collection again")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if len(data) < 4 or data[:3] != b"\0\0\x08":
            raise ValueError("no IDX header of unsigned bytes")
        shape = tuple(np.frombuffer(data, ">i4", count=data[3], offset=4).tolist())
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{str(file)!r} is truncated or damaged ({error}); fetch the collection again") from error


def _class_folders(root: Path) -> RawDataset | None:
    train = root / "train"
    test = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
    if not train.is_dir():
        return None
    classes = tuple(sorted(entry.name for entry in train.iterdir() if entry.is_dir()))
    if not classes:
        return None
    splits = {"train": _folder_split(root, train, classes)}
    if test is not None:
        splits["test"] = _folder_split(root, test, classes)
    return RawDataset("class_folders", root.resolve().name, classes, 3, splits)


def _folder_split(root: Path, folder: Path, classes: tuple[str, ...]) -> RawSplit:
    strange = sorted({entry.name for entry in folder.iterdir() if entry.is_dir()} - set(classes))
    if strange:
        raise DataError(f"{str(folder)!r} has class folders {strange[:5]} that train/ lacks: wrong class count; give both the same class folders")
    files, labels = [], []
    for label, name in enumerate(classes):
        # Sorted by folder, then by file name: the row order of torchvision's ImageFolder.
        images = (file for file in (folder / name).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        found = sorted(images, key=lambda file: (str(file.parent), file.name))
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"{str(folder)!r} has no images in its class folders; known endings: {', '.join(IMAGE_SUFFIXES)}")
    extents = np.asarray([_header_extent(file) for file in files], np.int32)
    keys = [file.relative_to(root).as_posix() for file in files]
    return RawSplit(np.asarray(labels, np.int64), keys, lambda row: read_picture(files[row]), extents)


def _header_extent(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except (OSError, SyntaxError) as error:
        raise DataError(f"{str(file)!r} is not a readable image ({error}); repair or remove it") from error


def read_picture(file: Path) -> Picture:
    """Decode a file to RGB.  JPEGs go through the decoder that training uses, so that stored bytes and stored pixels give the same image."""
    data = file.read_bytes()
    if data[:2] == b"\xff\xd8":
        try:
            return Picture(simplejpeg.decode_jpeg(data, "RGB"), data)
        except ValueError:
            pass  # CMYK, or damage that Pillow may still read; then the pixels are stored, not these bytes
    try:
        with Image.open(io.BytesIO(data)) as image:
            return Picture(np.asarray(image.convert("RGB")))
    except (OSError, SyntaxError) as error:
        raise DataError(f"{str(file)!r} is not a readable image ({error}); repair or remove it") from error
