"""Converting a folder of JPEGs that already have their size: fastssl-data against FFCV's DatasetWriter and the obvious Pillow script, in turn, in one run.

    python benchmarks/bench_convert.py            # 8192 images, 5 rounds
    python benchmarks/bench_convert.py --quick    # 2048 images, 3 rounds

Every competitor starts as a fresh process per round; the time is that of the conversion alone, without starting Python and importing.  The folder is in
the page cache for all of them, and the clock runs until the result is on the disk.  Beside the time on the clock stands the processor time (of the process
and its children), which other load on the machine hardly changes.  What each does: ours keeps the JPEG bytes, walks their structure, hashes every image,
decodes every n-th for mean and std, records all of it, and writes dataset.json last; FFCV decodes with Pillow (as its documentation's datasets do) and
encodes again at quality 90; the script opens each file with Pillow and saves it at quality 90.  The profile at the end says where our time goes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

CLASSES = 8


def make_folder(root: Path, count: int, photos: Path | None) -> float:
    """``count`` JPEGs of 500x375 in class folders; returns their mean size in KB."""
    from benchmarks.photos import as_jpeg, cut, photographs

    pictures = photographs(photos)
    distinct = [as_jpeg(image, 97) for image in cut(pictures, min(count, 256))]
    total = 0
    for split, images in (("train", count), ("test", CLASSES)):
        for i in range(images):
            folder = root / split / f"class{i % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            data = distinct[i % len(distinct)]
            data = data[:-2] + b"\xff\xfe\x00\x06%04d" % (i % 10000) + data[-2:]  # a comment makes every file its own
            (folder / f"{i:06d}.jpg").write_bytes(data)
            total += len(data)
    return total / (count + CLASSES) / 1e3


class Folder:
    """The indexed dataset that FFCV's writer is given: decoded images with labels."""

    def __init__(self, root: Path):
        self.files = sorted(root.rglob("*.jpg"))
        names = sorted({file.parent.name for file in self.files})
        self.labels = [names.index(file.parent.name) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int):
        from PIL import Image

        return Image.open(self.files[i]).convert("RGB"), self.labels[i]


def save_again(pair: tuple[Path, Path]) -> None:
    from PIL import Image

    source, target = pair
    Image.open(source).convert("RGB").save(target, quality=90)


def to_disk(folder: Path) -> None:
    """Wait until everything below ``folder`` is on the disk, as our conversion does before it says that it is done."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


class Clock:
    """Seconds since it was made: on the wall, and of the processor (this process and its ended children)."""

    def __init__(self) -> None:
        self.start, self.used = time.perf_counter(), sum(os.times()[:4])

    def stop(self) -> tuple[float, float]:
        return time.perf_counter() - self.start, sum(os.times()[:4]) - self.used


def run_one(who: str, root: Path, workers: int, out: Path) -> tuple[float, float]:
    """One conversion of ``root``/train (ours: with its few test images), without the imports before it."""
    if who.startswith("ours"):
        from data_tools.convert import convert

        clock = Clock()
        convert(root, out / "data", format="ffcv", workers=workers, pool=who.split()[1], check="decode" if "decode" in who else "structure")
        return clock.stop()
    if who == "ffcv":
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        dataset = Folder(root / "train")
        clock = Clock()
        writer = DatasetWriter(str(out / "train.beton"), {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}, num_workers=workers)
        writer.from_indexed_dataset(dataset)
        to_disk(out)
        wall, _ = clock.stop()
        for worker in multiprocessing.active_children():  # the writer leaves them behind; only ended ones show their processor time
            worker.join()
        return wall, clock.stop()[1]
    pairs = [(file, out / f"{i}.jpg") for i, file in enumerate(sorted((root / "train").rglob("*.jpg")))]
    clock = Clock()
    if workers == 1:
        for pair in pairs:
            save_again(pair)
    else:
        pool = multiprocessing.Pool(workers)
        pool.map(save_again, pairs, chunksize=16)
        pool.close()
        pool.join()
    to_disk(out)
    return clock.stop()


def child(who: str, root: Path, workers: int, scratch: Path) -> tuple[float, float]:
    """One conversion in a process of its own: seconds on the clock, seconds of processor time."""
    out = Path(tempfile.mkdtemp(dir=scratch))
    command = [sys.executable, __file__, "--child", who, "--root", str(root), "--workers", str(workers), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-2000:]}")
    wall, processor = map(float, done.stdout.strip().splitlines()[-1].split())
    return wall, processor


def profile(root: Path) -> dict[str, float]:
    """Microseconds per image of the steps of keeping a JPEG, measured alone on the same files; ``whole`` is a unit as conversion runs it."""
    import hashlib

    import simplejpeg

    from data_tools.images import Rules
    from data_tools.jpeg_scan import scan_jpeg
    from data_tools.outputs import copy_range
    from data_tools.readers import open_raw
    from data_tools.storage import Storage
    from data_tools.units import Task, convert_rows

    files = sorted((root / "train").rglob("*.jpg"))[:512]
    data = [file.read_bytes() for file in files]
    part = open_raw(root).splits["train"].part(0, len(files))

    def per_image(work) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return round(statistics.median(times) / len(files) * 1e6, 1)

    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"

        def write() -> None:
            with open(one, "wb") as handle:
                for item in data:
                    handle.write(item)

        def copy() -> None:
            with open(one, "rb") as source, open(two, "wb") as target:
                copy_range(source, 0, one.stat().st_size, target)

        def whole() -> None:
            with open(one, "wb") as handle:
                convert_rows(Task("profile", Path(folder), part, 0, Rules(), Storage()), handle.write)

        steps = {"read": lambda: [part.read(i) for i in range(part.count)], "hash": lambda: [hashlib.sha256(item).digest() for item in data]}
        steps |= {"walk structure": lambda: [scan_jpeg(item) for item in data], "write part": write, "copy to its place": copy, "whole unit": whole}
        steps["(decode, not done)"] = lambda: [simplejpeg.decode_jpeg(item, "RGB") for item in data]
        return {name: per_image(work) for name, work in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--images", type=int, help="instead of 8192 or 2048")
    parser.add_argument("--rounds", type=int, help="instead of 5 or 3")
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: those of scikit-image and scikit-learn)")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(*run_one(args.child, args.root, args.workers, args.out))
        return
    from benchmarks.host import commit, machine, versions

    count, rounds, cores = (2048, 3, os.cpu_count() or 1) if args.quick else (8192, 5, os.cpu_count() or 1)
    count, rounds = args.images or count, args.rounds or rounds
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="bench-convert-") as temp:
        root = Path(temp) / "photos"
        size_kb = make_folder(root, count, args.photos)
        competitors = [("ours threads", 1), ("ours threads decode", 1), ("ffcv", 1), ("pillow script", 1)]
        if cores > 1:
            competitors += [("ours threads", cores), ("ours processes", cores), ("ffcv", cores), ("pillow script", cores)]
        times: dict[tuple[str, int], list[tuple[float, float]]] = {who: [] for who in competitors}
        for _ in range(rounds):
            for who in competitors:
                times[who].append(child(who[0], root, who[1], Path(temp)))
        steps = profile(root)
    rows = []
    for (who, workers), pairs in times.items():
        seconds = [wall for wall, _ in pairs]
        median, processor = statistics.median(seconds), statistics.median(cpu for _, cpu in pairs)
        base = times[("ffcv", workers)]
        rows.append(
            {
                "who": who,
                "workers": workers,
                "images_per_s": round(count / median, 1),
                "spread": [round(count / max(seconds), 1), round(count / min(seconds), 1)],
                "times_ffcv": round(statistics.median(wall for wall, _ in base) / median, 2),
                "images_per_cpu_s": round(count / processor, 1),
                "times_ffcv_cpu": round(statistics.median(cpu for _, cpu in base) / processor, 2),
            }
        )
    names = versions("ffcv", "pillow", "simplejpeg", "numpy")
    result = {"images": count, "rounds": rounds, "mean_kb": round(size_kb, 1), "machine": facts, "commit": commit(), "versions": names, "rows": rows}
    result["profile_us_per_image"] = steps
    print(f"{count} JPEGs of 500x375, {size_kb:.0f} KB each, medians of {rounds} rounds in turn")
    print(f"{'who':22} {'workers':>7} {'images/s':>9} {'slowest..fastest':>18} {'times FFCV':>11} {'images/CPU s':>13} {'times FFCV':>11}")
    for row in rows:
        low, high = row["spread"]
        wall = f"{row['images_per_s']:>9} {f'{low}..{high}':>18} {row['times_ffcv']:>11}"
        print(f"{row['who']:22} {row['workers']:>7} {wall} {row['images_per_cpu_s']:>13} {row['times_ffcv_cpu']:>11}")
    print("microseconds per image: " + ", ".join(f"{name} {value}" for name, value in steps.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
