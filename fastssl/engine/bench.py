"""How fast a recipe goes on this machine: the feed alone, rendering alone, the step on a batch that stays, and all of it together.

Everything is built as training builds it, with the recipe's exact shapes and data; no run folder is written.  On CUDA times are those of events on
the device, on the CPU those of the clock.  Each phase runs ``steps`` times, less if that would take longer than :data:`PHASE_S`; all ranks alike.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from fastssl.augment import check_backend
from fastssl.engine.advice import Facts, advise
from fastssl.engine.assemble import build_streams, build_task, build_view_policies, open_data, workers_of
from fastssl.engine.build import build_updater
from fastssl.engine.capture import WARM as RECORDED_AFTER
from fastssl.engine.capture import capture_of, update_of
from fastssl.engine.launch import check_batches, cores_per_process, launch
from fastssl.engine.runfolder import device_name
from fastssl.methods import get as get_method
from fastssl.schema import Recipe
from fastssl.sources.feed import Feed
from fastssl.sources.jpeg import reductions
from fastssl.sources.order import rank_slots
from fastssl.sources.pack import padding_share
from fastssl.types import RawBatch

WARM = 3  # calls of a phase before its clock starts: allocator, autotuning, page cache
PHASE_S = 20.0
LEAST = 3


def bench(recipe: Recipe, steps: int = 20) -> dict[str, Any]:
    """Measure ``recipe`` and return plain data: seconds and images per second of each phase, memory, and the verdict.

    Keys: ``recipe``, ``method``, ``device``, ``world``, ``images_per_step`` (over all ranks), ``phases`` (name -> seconds, images_per_s, steps),
    ``views_per_s``, ``wait_share``, ``bytes_per_step`` and ``slot_bytes`` (of this rank), ``feed``, ``bottleneck``, ``next``, ``verdict``.
    Collective: every rank calls it.  Raises what training would for a recipe that cannot run.
    """
    return _Bench(recipe, steps).run()


def lines(found: Mapping[str, Any]) -> str:
    """What :func:`bench` returned, for people."""
    names = {
        "read": "sources alone, this thread",
        "loader": "loader ceiling: the feed alone",
        "render": "rendering all views",
        "step": "step ceiling: one batch stays",
        "together": "loader and step together",
    }
    batches = ", ".join(f"{name} {size}" for name, size in found["batches"].items())
    said = [
        f"{found['method']} on {found['device']}, {found['world']} process(es), {found['threads']} threads, {found['workers']} readers; batch: {batches}",
        "",
    ]
    said.append(f"{'':34}{'ms per step':>12}{'images/s':>12}{'steps':>7}")
    for name, phase in found["phases"].items():
        said.append(f"{names[name]:34}{1e3 * phase['seconds']:>12.2f}{phase['images_per_s']:>12,.0f}{phase['steps']:>7}")
    said += [
        "",
        f"views: {found['views_per_s']:,.0f} per second, {found['render_share']:.1%} of a step; waiting for data: {found['wait_share']:.1%} of the time",
    ]
    return "\n".join([*said, found["feed"], "", found["verdict"]])


class _Bench:
    """The parts of a run, and the seconds of its phases as they are found."""

    def __init__(self, recipe: Recipe, steps: int):
        self.recipe, self.steps = recipe, steps
        self.accelerator = launch(recipe)
        self.device: torch.device = self.accelerator.device
        method = get_method(recipe.method.name)
        self.views = method.views(recipe.method.config)
        unlabeled = any(view.stream == "unlabeled" for view in self.views.values())
        check_batches(recipe, self.accelerator.num_processes, unlabeled=unlabeled)
        self.data = open_data(recipe, self.device)
        self.streams = build_streams(recipe, self.data, unlabeled=unlabeled)
        self.policies = build_view_policies(recipe, self.views, self.data.manifest, self.data.channels)
        task = build_task(recipe, self.data)
        self.updater = build_updater(recipe, self.accelerator, self.data, task, self.streams, self.views, self.policies)
        self.update = update_of(self.updater, capture_of(recipe, self.accelerator))
        self.images = sum(stream.global_batch for stream in self.streams)
        self.phases: dict[str, dict[str, float]] = {}

    def run(self) -> dict[str, Any]:
        method = self.updater.train_module.method
        with torch.no_grad():
            method.on_epoch_start(0)
        try:
            self._phase("read", self._read())
            with self._feed() as feed:
                self._phase("loader", feed.next)
                raw = self._keep(feed.next())
                about_feed = {"bytes_per_step": feed.bytes_per_step, "slot_bytes": feed.nbytes, "feed": feed.describe()}
            self._phase("render", self._moving(raw, lambda: self.updater.renderer(raw)))
            step = self._moving(raw, self._step(lambda: raw))
            for _ in range(RECORDED_AFTER if self.update is not self.updater else 0):
                step()
            self._phase("step", step)
            with self._feed() as feed:
                waited = [0.0]  # in all, after each update

                def next_batch() -> dict[str, RawBatch]:
                    raw = feed.next()
                    waited.append(feed.waited_s)
                    return raw

                self._phase("together", self._step(next_batch))
            together = self.phases["together"]
            wait_share = min(1.0, (waited[-1] - waited[-1 - int(together["steps"])]) / (together["steps"] * together["seconds"]))
        finally:
            self.data.source.close()
        views = sum(len(view) for view in self.updater.renderer.buffers.values()) * self.accelerator.num_processes
        facts = self._facts()
        bottleneck, nexts, verdict = advise(facts)
        return {
            "recipe": self.recipe.name,
            "method": self.recipe.method.name,
            "device": device_name(self.device),
            "world": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "workers": workers_of(self.recipe),
            "torch": torch.__version__,
            "images_per_step": self.images,
            "batches": {stream.name: stream.global_batch for stream in self.streams},
            "canvas": list(self.data.source.canvas),
            "phases": self.phases,
            "views_per_s": round(views / self.phases["render"]["seconds"], 1),
            "render_share": round(self.phases["render"]["seconds"] / self.phases["step"]["seconds"], 4),
            "wait_share": round(wait_share, 4),
            **about_feed,
            "facts": asdict(facts),
            "bottleneck": bottleneck,
            "next": nexts,
            "verdict": verdict,
        }

    # --- the phases ---------------------------------------------------------------------------------------------------------------

    def _read(self) -> Callable[[], object]:
        """The sources' share of a step in this thread: reading and decoding, nothing sent."""
        world, rank, turn = self.accelerator.num_processes, self.accelerator.process_index, iter(range(1 << 30))
        shares = {s.name: rank_slots(0, s.global_batch, world, rank)[1] for s in self.streams}
        device = getattr(self.data.source, "device", "cpu")
        buffers = {s.name: RawBatch.allocate(shares[s.name], *s.source.canvas, device=device) for s in self.streams}

        def read() -> None:
            step = next(turn)
            for stream in self.streams:
                start, count = rank_slots(step, stream.global_batch, world, rank)
                stream.source.fill(stream.rows_N[stream.pick(start, count)], buffers[stream.name])

        return read

    def _feed(self) -> Feed:
        recipe = self.recipe
        return Feed(
            self.streams,
            world=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            ahead=recipe.data.ahead,
            device=self.device,
            stall_timeout_s=recipe.data.stall_timeout_s,
            pack=recipe.data.pack,
        )

    def _keep(self, raw: dict[str, RawBatch]) -> dict[str, RawBatch]:
        """A copy that the feed does not overwrite."""
        kept = {}
        for name, batch in raw.items():
            kept[name] = RawBatch.allocate(*batch.pixels_BHWC.shape, device=self.device).copy_(batch)
        return kept

    def _moving(self, raw: dict[str, RawBatch], work: Callable[[], object]) -> Callable[[], object]:
        """``work`` on a batch whose draws move on, so that every call draws other views."""

        def moved() -> None:
            for stream in self.streams:
                raw[stream.name].draw_B.add_(stream.global_batch)
            work()

        return moved

    def _step(self, batch: Callable[[], dict[str, RawBatch]]) -> Callable[[], object]:
        turn = iter(range(1 << 30))
        return lambda: self.update(batch(), next(turn) % self.recipe.train.steps)

    # --- the clock ----------------------------------------------------------------------------------------------------------------

    def _phase(self, name: str, call: Callable[[], object]) -> None:
        """Seconds per call of ``call``, the mean of as many as fit."""
        began = time.perf_counter()
        warm = 0
        while warm < WARM and (warm == 0 or time.perf_counter() - began < PHASE_S / 4):
            call()
            warm += 1
        self._settle()
        fits = int(PHASE_S / max(1e-9, (time.perf_counter() - began) / warm))
        count = [min(self.steps, max(LEAST, fits))]
        broadcast_object_list(count)
        seconds = self._mean_seconds(call, count[0])
        self.phases[name] = {"seconds": seconds, "images_per_s": round(self.images / seconds, 1), "steps": count[0]}

    def _mean_seconds(self, call: Callable[[], object], count: int) -> float:
        if self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(count):
                call()
            last.record()
            last.synchronize()
            return first.elapsed_time(last) / 1e3 / count
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) / count

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- what the verdict is drawn from -------------------------------------------------------------------------------------------

    def _facts(self) -> Facts:
        recipe, source, manifest = self.recipe, self.data.source, self.data.manifest
        sizes = source.extents_N2 if getattr(source, "sizes_N2", None) is None else source.sizes_N2
        view = max((v.size or recipe.augment.size for v in self.views.values()), default=recipe.augment.size)
        backends = {check_backend(policy, recipe.augment.backend, self.device) for policy in self.policies.values()}
        on_device = torch.device(getattr(source, "device", "cpu")).type == "cuda"
        return Facts(
            images=self.images,
            **{f"{name}_s": phase["seconds"] for name, phase in self.phases.items()},  # type: ignore[arg-type]
            cuda=self.device.type == "cuda",
            format=manifest.format,
            reader=recipe.data.source,
            on_device=on_device,
            workers=workers_of(recipe),
            cores=cores_per_process(),
            threads=torch.get_num_threads(),
            precision=recipe.train.precision,
            canvas=max(source.canvas[:2]),
            view=view,
            padding=padding_share(source.extents_N2, source.canvas),
            pack=recipe.data.pack,
            can_scale=manifest.format == "ffcv" and recipe.data.scaled_decode == 0 and bool((reductions(np.asarray(sizes), view, 1.0) > 1).mean() > 0.5),
            has_dali=importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None,
            backend="triton" if backends == {"triton"} else "reference",
            geometry=recipe.augment.geometry,
        )
