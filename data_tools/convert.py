"""Converting a raw collection into a dataset folder: units of work in a journal, put together in order, renamed into place when everything is there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.assembly import write_data, write_records
from data_tools.atomic import told, write_file
from data_tools.beton_writer import SIDE_LIMIT
from data_tools.catalogue import identify
from data_tools.collection import Collection, RawSplit
from data_tools.forecast import check_space, forecast
from data_tools.images import CHECKS, EXIF, MAX_PIXELS, Rules
from data_tools.journal import Journal, partial_folder, tidy
from data_tools.manifest_writer import build_manifest
from data_tools.official_splits import write_official
from data_tools.plan import SplitPlan, plan_split
from data_tools.pool import KINDS, run_all
from data_tools.progress import Meter, say
from data_tools.readers import open_raw
from data_tools.storage import MODES, PNG, RAW, Storage
from data_tools.units import Task, is_whole, run
from fastssl.errors import DataError, nearest
from fastssl.sources.manifest import FORMATS, MANIFEST_NAME, load_manifest, load_split, split_files

UNIT_ROWS = 512
_SHOWN = 5
_MEASURE_AT_LEAST, _MEASURE_STRIDE = 512, 64
_PROCESSES_FROM = 8  # units per worker: below, starting a process costs more than it gains


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    format: str = "arrays",
    name: str = "",
    mode: str = "auto",
    quality: int = 95,
    proportion: float = 0.5,
    smart_threshold: int = 1_000_000,
    shard_mb: int = 256,
    max_side: int = 0,
    max_pixels: int = MAX_PIXELS,
    exif: str = "apply",
    check: str = "structure",
    strict: bool = False,
    force: bool = False,
    restart: bool = False,
    workers: int = 0,
    pool: str = "auto",
    unit_rows: int = UNIT_ROWS,
    kind: str = "auto",
    options: Mapping[str, str] | None = None,
) -> Path:
    """Write ``source`` (see readers.open_raw for ``kind`` and ``options``) as the dataset folder ``dest``; returns ``dest``.

    The same source and arguments give the same bytes with any ``workers`` (0 = one per core), ``pool`` and ``unit_rows``, interrupted or not.  What each image
    becomes is stated in data_tools/images.py and storage.py; images that no rule covers are left out and listed in bad.parquet, or are one error (``strict``).
    An interrupted conversion stays in ``<dest>.tmp-convert`` and is continued by the same call; ``restart`` throws it away.
    Raises DataError for unknown kinds and options, a changed source, an existing ``dest`` (unless ``force``), a full disk; ``dest`` is then as it was.
    """
    dest = Path(dest)
    _check_arguments(source, dest, format, mode, quality, exif, check, pool)
    _check_numbers(proportion=(proportion, 0, 1), shard_mb=(shard_mb, 1, 10**9), max_side=(max_side, 0, 10**6), max_pixels=(max_pixels, 1, 10**12))
    _check_numbers(smart_threshold=(smart_threshold, 0, 10**15), workers=(workers, 0, 4096), unit_rows=(unit_rows, 1, 10**6))
    if not force and dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        tidy(dest)
        raise DataError(f"{str(dest)!r} already exists; choose another folder or add --force to replace it")
    if force and dest.exists() and not (dest / MANIFEST_NAME).is_file() and not (dest.is_dir() and not any(dest.iterdir())):
        raise DataError(f"{str(dest)!r} is no dataset folder, and --force replaces only those; choose another place or remove it yourself")
    raw = open_raw(source, kind=kind, options=options)
    known = identify(raw)
    classes = known.classes if known else raw.classes
    for split_name, split in raw.splits.items():
        _check_labels(split, split_name, classes)
    rules = Rules(max_side, max_pixels, exif, check, raw.channels)
    storage = _storage(format, mode, quality, proportion, smart_threshold, raw.channels)
    recorded = _recorded(format, rules, storage, shard_mb)
    workers = workers or os.cpu_count() or 1
    state = {"stamp": raw.stamp(), "unit_rows": unit_rows, "classes": list(classes), **recorded}
    expected = forecast(raw, rules, storage, workers, padded=format == "arrays")
    parent = next(folder for folder in (dest.parent, *dest.parent.resolve().parents) if folder.exists())
    check_space(expected, parent, _bytes_below(partial_folder(dest)))
    say(f"forecast: {expected}; {workers} workers, free {shutil.disk_usage(parent).free / 1e9:.2f} GB")
    with Journal(dest, state).opened(restart=restart) as journal:
        units = {
            split_name: [f"{number:02d}-{start // unit_rows:09d}" for start in range(0, split.count, unit_rows)]
            for number, (split_name, split) in enumerate(raw.splits.items())
        }
        _convert_units(journal, raw, units, rules, storage, unit_rows, workers, pool)
        plans = [plan_split(split_name, raw.channels, len(classes), names, map(journal.unit, names)) for split_name, names in units.items()]
        _report_bad(journal, plans, strict)
        with told(dest):
            data = {plan.name: write_data(journal, plan, format, recorded) for plan in plans}
            records = write_records(journal, plans, format)
            found = known.name if known else None
            manifest = build_manifest(journal.out, plans, data, records, raw=raw, name=name, known=found, classes=classes, options=recorded)
            (journal.out / "splits").mkdir(exist_ok=True)
            write_file(journal.out / MANIFEST_NAME, (json.dumps(manifest, indent=1) + "\n").encode())
            write_official(journal.out, raw.official)
            _keep_label_splits(dest / "splits", journal.out)
            journal.finish(dest)
    return dest


def _check_arguments(source: str | Path, dest: Path, format: str, mode: str, quality: int, exif: str, check: str, pool: str) -> None:
    for what, value, valid in (("format", format, FORMATS), ("mode", mode, MODES), ("exif", exif, EXIF), ("check", check, CHECKS), ("pool", pool, KINDS)):
        if value not in valid:
            raise DataError(f"unknown {what} {value!r}{nearest(value, valid)}; known: {list(valid)}")
    if not 1 <= quality <= 100:
        raise DataError(f"JPEG quality {quality} is outside 1..100")
    if not dest.name or dest.name == "..":
        raise DataError(f"destination {str(dest)!r} must be a folder with a name; give it as the name of a new folder")
    if Path(source).resolve() == dest.resolve():
        raise DataError(f"source and destination are the same folder {str(dest)!r}; choose another destination")
    if Path(source).resolve() in dest.resolve().parents:
        raise DataError(f"destination {str(dest)!r} lies inside the source {str(source)!r}, which would then contain it; choose a place beside it")


def _check_numbers(**values: tuple[float, float, float]) -> None:
    for name, (value, low, high) in values.items():
        if not low <= value <= high:
            raise DataError(f"--{name.replace('_', '-')} {value} is outside {low}..{high}")


def _storage(format: str, mode: str, quality: int, proportion: float, smart_threshold: int, channels: int) -> Storage:
    if format == "arrays":
        return Storage(jpeg=False, channels=channels, stored_channels=channels)
    if format == "dali":
        return Storage(mode, quality, PNG, True, channels, channels, proportion, smart_threshold)
    return Storage(mode, quality, RAW, True, 3, channels, proportion, smart_threshold, SIDE_LIMIT)


def _recorded(format: str, rules: Rules, storage: Storage, shard_mb: int) -> dict[str, Any]:
    """The options that decide what is written: they stand in dataset.json, and a begun conversion is continued only with the same ones."""
    shown = asdict(rules)
    del shown["channels"]
    if format == "arrays":
        del shown["check"]  # everything is decoded anyway
        return {"format": format, **shown}
    shown |= {"format": format, "mode": storage.mode, "jpeg_quality": storage.quality}
    if storage.mode == "proportion":
        shown["proportion"] = storage.proportion
    if storage.mode == "smart":
        shown["smart_threshold"] = storage.smart_threshold
    return {**shown, "shard_mb": shard_mb} if format == "dali" else shown


def _check_labels(split: RawSplit, name: str, classes: tuple[str, ...]) -> None:
    if not split.count:
        raise DataError(f"{name}: no images in it; fetch the source again")
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < -1 or high >= len(classes):
        raise DataError(f"{name}: labels reach from {low} to {high}, but there are {len(classes)} classes: wrong class count; fetch the source again")


def measure_stride(count: int) -> int:
    """Every how many-th encoded training image is decoded for mean and std: all below 1024, then 512 or a few more, from 32 768 on every 64th."""
    return min(_MEASURE_STRIDE, max(1, count // _MEASURE_AT_LEAST))


def measured_split(raw: Collection) -> str:
    """The split whose pixels give mean and std: ``train``, else the first."""
    return "train" if "train" in raw.splits else next(iter(raw.splits))


def _convert_units(
    journal: Journal, raw: Collection, units: dict[str, list[str]], rules: Rules, storage: Storage, unit_rows: int, workers: int, pool: str
) -> None:
    done = _checked_units(journal, units, workers)
    total = sum(split.count for split in raw.splits.values())
    left = [(split_name, number, name) for split_name, names in units.items() for number, name in enumerate(names) if name not in done]
    meter = Meter("convert", total)
    ready = total - sum(min(unit_rows, raw.splits[split_name].count - number * unit_rows) for split_name, number, _ in left)
    if journal.continued:
        say(f"continuing: {ready} of {total} images are done")
    meter.skip(ready)

    def tasks() -> Iterator[Task]:
        measured = measured_split(raw)
        for split_name, number, name in left:
            split = raw.splits[split_name]
            first = number * unit_rows
            measure = measure_stride(split.count) if split_name == measured else 0
            yield Task(name, journal.parts, split.part(first, min(first + unit_rows, split.count)), first, rules, storage, measure)

    workers = min(workers, max(1, len(left)))
    kind = pool if pool != "auto" else ("processes" if len(left) >= _PROCESSES_FROM * workers else "threads")
    try:
        for _, count, size in run_all(run, tasks(), workers, kind):
            meter.add(count, size)
    finally:
        meter.close()


def _checked_units(journal: Journal, units: dict[str, list[str]], workers: int) -> set[str]:
    """Units of an earlier run that are whole; damaged ones are forgotten.  What assembly has used up already was checked before."""
    done = journal.done()
    assembled = journal.assembled()
    if assembled:
        return done
    names = [name for names in units.values() for name in names if name in done]
    for name, whole in run_all(lambda name: (name, is_whole(journal.meta(name))), names, workers):
        if not whole:
            journal.forget(name)
            done.discard(name)
    return done


def _report_bad(journal: Journal, plans: list[SplitPlan], strict: bool) -> None:
    bad = sum(plan.bad for plan in plans)
    shown: list[str] = []
    for plan in plans if bad else ():
        for name in plan.units:
            if len(shown) < _SHOWN:
                unit = journal.unit(name)
                shown += [f"{unit.bad_keys[i]} ({unit.bad_reasons[i]})" for i in range(len(unit.bad_rows))]
    listed = "; ".join(shown[:_SHOWN]) + (" ..." if bad > _SHOWN else "")
    if bad and strict:
        raise DataError(f"{bad} images cannot be converted: {listed}; repair or remove them and add --restart, or leave --strict away")
    for plan in plans:
        if not plan.count:
            raise DataError(f"{plan.name}: none of its {plan.bad} images can be converted: {listed}")
    if bad:
        say(f"left out {bad} images that no rule covers, listed in bad.parquet: {listed}")


def _keep_label_splits(old: Path, folder: Path) -> None:
    """Carry the label splits of a replaced dataset over where they were drawn for the same rows."""
    manifest = load_manifest(folder)
    for file in split_files(old.parent):
        copy = folder / "splits" / file.name
        shutil.copyfile(file, copy)
        try:
            load_split(manifest, str(copy))
        except DataError:
            copy.unlink()
            say(f"label split {file.stem} belongs to other data and was dropped; draw it again")


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
