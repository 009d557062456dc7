"""Train a recipe: the loop over updates with its log lines, evaluations, checkpoints, and an honest end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastssl.engine import checkpoint, trackers
from fastssl.engine.assemble import build_evaluator, build_streams, build_task, build_view_policies, open_data, workers_of
from fastssl.engine.build import build_updater
from fastssl.engine.capture import Capture, ReplayedForward, capture_of, update_of
from fastssl.engine.graphs import CudaGraphs
from fastssl.engine.launch import check_batches, launch, leave_group_at_exit
from fastssl.engine.prepare import prepare_method
from fastssl.engine.progress import Display
from fastssl.engine.resume import choose_run, on_main
from fastssl.engine.runfolder import RunFolder, begin, broken_disk, device_name, environment, is_about, read_json
from fastssl.engine.runlock import RunLock
from fastssl.engine.scoring import as_line
from fastssl.engine.sheet import draw_views
from fastssl.engine.state import SCALER_KEY, collect, first_non_finite, restore, scaler_state
from fastssl.engine.stop import Interrupted, StopRequest
from fastssl.engine.summary import summary
from fastssl.engine.timing import Stopwatch
from fastssl.errors import CheckpointError, TrainingError
from fastssl.methods import get as get_method
from fastssl.recipe import config_digest, dump_yaml, to_dict
from fastssl.schema import Recipe
from fastssl.sources.feed import Feed

SHEET_ROWS = 6
LOWER = "try a lower optim.lr or optim.clip_norm"


def train(recipe: Recipe, *, resume: str | None = None, run_dir: str | Path | None = None, stop: Callable[[int], bool] | None = None) -> Path:
    """Train ``recipe`` to its last update and return the run folder.

    ``resume``: None = a new run; "auto" = go on with the newest unfinished run of this configuration, else a new run; a path = go on from that run
    folder or checkpoint, or :class:`CheckpointError`. ``run_dir``: the new run's folder instead of ``runs_dir/name/<time>-<id>``; must not exist.
    ``stop(finished_updates)`` returning True ends the run like SIGTERM does.

    SIGINT and SIGTERM checkpoint after the current update and raise :class:`Interrupted` (several ranks: within 8 updates). Every other end than
    the last update raises too, after summary.json has got its status and error. Collective: every rank calls it.
    """
    trackers.check_trackers(recipe.log.trackers)
    accelerator = launch(recipe)
    capture = capture_of(recipe, accelerator)
    digest = config_digest(recipe)
    with RunLock() as lock:
        path, snapshot, why = choose_run(recipe, digest, resume, run_dir, lock)
        trainer = Trainer(recipe, accelerator, digest, capture)
        try:
            trainer.open(path, snapshot, lock, notes=[why, capture.reason])
        except OSError as cause:
            if is_about(path, cause):
                raise broken_disk(path, cause) from cause
            raise
        _train(trainer, stop)
    return path


def _train(trainer: Trainer, stop: Callable[[int], bool] | None) -> None:
    """The loop, and at its end, whatever it is, the summary and the one error."""
    path, accelerator = trainer.run.path, trainer.accelerator
    with StopRequest(accelerator.device, stop) as stop_request:
        status, error = "failed", None
        try:
            trainer.loop(stop_request)
            status = "finished"
            leave_group_at_exit()
        except Interrupted as interrupted:
            status, error = "interrupted", str(interrupted)
            raise
        except KeyboardInterrupt:
            status, error = "interrupted", "stopped by a second signal, without a checkpoint of the current update"
            raise
        except OSError as cause:
            error = str(cause)
            if is_about(path, cause):
                raise broken_disk(path, cause) from cause
            raise
        except BaseException as cause:
            error = f"{type(cause).__name__}: {cause}"
            raise
        finally:
            trainer.close(status, error)


class Trainer:
    """A run in progress: the parts built from the recipe, and where it stands."""

    def __init__(self, recipe: Recipe, accelerator: Any, digest: str, capture: Capture | None = None):
        self.recipe, self.accelerator, self.digest = recipe, accelerator, digest
        self.views = get_method(recipe.method.name).views(recipe.method.config)
        reads_unlabeled = any(view.stream == "unlabeled" for view in self.views.values())
        check_batches(recipe, accelerator.num_processes, unlabeled=reads_unlabeled)

        self.data = open_data(recipe, accelerator.device)
        self.task = build_task(recipe, self.data)
        self.streams = build_streams(recipe, self.data, unlabeled=reads_unlabeled)
        self.policies = build_view_policies(recipe, self.views, self.data.manifest, self.data.channels)
        self.evaluator = build_evaluator(recipe, self.data.manifest, self.data.split, recipe.data.eval_on, self.data.channels, accelerator.device)
        self.updater = build_updater(recipe, accelerator, self.data, self.task, self.streams, self.views, self.policies)
        capture = capture or capture_of(recipe, accelerator)
        self.update = update_of(self.updater, capture, lambda line: self.run.log(line))
        if capture.graph:
            self.evaluator.replayed = ReplayedForward(CudaGraphs(accelerator.device), lambda line: self.run.log(line))
        self.step = 0
        self.evals: dict[str, dict[str, Any]] = {}  # weights -> {"last": {...}, "best": {...}}
        self.best: dict[str, Any] | None = None  # headline top1 of the best evaluation: {"step", "top1"}
        self.bad_rows: int | None = None  # None = the source does not count them
        self.saved_at = -1
        self.found_good_at = -1
        self.watch = Stopwatch(images_per_step=sum(stream.global_batch for stream in self.streams))

    # --- beginning and end -----------------------------------------------------------------------------------------------------------

    def open(self, path: Path, snapshot: checkpoint.Snapshot | None, lock: RunLock, notes: list[str]) -> None:
        """Take the run folder: a new one, made and held here, or one to go on with from ``snapshot``, which ``lock`` holds already."""
        recipe, accelerator = self.recipe, self.accelerator
        if snapshot is None:
            on_main(lambda: begin(path, lock))
        self.run = RunFolder(path, writes=accelerator.is_main_process)
        if snapshot is not None:
            state = snapshot.state
            notes += self._resume(snapshot)
            self.watch = Stopwatch(self.watch.images_per_step, state["timing"])
            known = read_json(path / "env.json")
            env = {**known, "resumed": [*known.get("resumed", []), {"after_step": self.step, **self._environment()}]}
        else:
            env = self._environment()
            on_main(lambda: self.run.write_text("config.yaml", dump_yaml(recipe)))
        on_main(lambda: self.run.write_json("env.json", env))
        self.display = Display(self.run, start=self.step, total=recipe.train.steps)
        trackers.open_trackers(accelerator, recipe.log.trackers, project=recipe.log.project, run=path, config=to_dict(recipe), start_step=self.step)
        for note in [f"run folder {path}", *notes, self._sizes()]:
            self.run.log(note)
        if snapshot is None:
            if prepare_method(self.updater, self.streams, self.views):
                self.run.log("the method has looked at its teacher's predictions")
            self._draw_views()

    def _resume(self, snapshot: checkpoint.Snapshot) -> list[str]:
        state = snapshot.state
        if (state["data_digest"], state["split_digest"]) != (self.data.manifest.digest, self.data.split.digest):
            raise CheckpointError(f"{self.data.manifest.root} or its label split changed since the checkpoint was written; start a new run")
        same_ranks = restore(self.updater, snapshot)
        self.step, self.evals, self.best = state["step"], state["evals"], state["best"]
        self.saved_at = self.step
        notes = [f"going on after update {self.step}"]
        if not same_ranks:
            notes.append("the number of processes changed: dropout draws go on from the seed, everything else from the checkpoint")

        def rewind() -> list[str]:
            self.run.cut_metrics(state["metrics_bytes"])
            return checkpoint.rewind(self.run.checkpoints, self.step, self.best["step"] if self.best else None)

        dropped = on_main(rewind)
        if dropped:
            notes.append(f"dropped later checkpoints: {', '.join(dropped)}")
        return notes

    def _environment(self) -> dict[str, Any]:
        return environment(self.accelerator.device, self.accelerator.num_processes, self.recipe.train.precision, self.digest)

    def _sizes(self) -> str:
        world, task = self.accelerator.num_processes, self.task
        shares = ", ".join(f"{s.name} {s.global_batch} ({s.global_batch // world} per process)" for s in self.streams)
        device = f"{world} process(es) on {device_name(self.accelerator.device)}, {torch.get_num_threads()} threads, {workers_of(self.recipe)} readers"
        return (
            f"{self.recipe.method.name} on {self.data.manifest.name}/{self.data.split.name}: {task.num_labeled} labeled, {task.num_unlabeled} unlabeled rows; "
            f"batch: {shares}; {device}"
        )

    def _draw_views(self) -> None:
        """A picture of the first batch's views in the run folder, for people; never a reason to fail."""
        if not self.run.writes:
            return
        try:
            draw_views(self.recipe, self.data, self.views, self.policies, self.run.path / "views.png", rows=SHEET_ROWS)
        except Exception as error:
            self.run.log(f"no contact sheet of the views: {type(error).__name__}: {error}")

    def close(self, status: str, error: str | None) -> None:
        """Write the summary and let go of everything, whatever happened."""
        try:
            self.run.write_json("summary.json", summary(self, status, error))
            self.run.log(f"{status} after update {self.step}/{self.recipe.train.steps}" + (f": {error}" if error else ""))
        except OSError as cause:
            if status == "finished":
                raise broken_disk(self.run.path, cause) from cause
        finally:
            self.display.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.trackers = []
            self.data.close()
            self.evaluator.source.close()

    # --- the loop ---------------------------------------------------------------------------------------------------------------------

    def loop(self, stop_request: StopRequest) -> None:
        """From the update after ``self.step`` to the last one. Raises :class:`Interrupted` after a checkpoint if asked to stop."""
        recipe, method = self.recipe, self.updater.train_module.method
        total, epoch_length = recipe.train.steps, recipe.train.steps_per_epoch
        with self._feed() as feed:
            self.run.log(feed.describe())
            self.watch.run()
            while self.step < total:
                if self.step % epoch_length == 0:
                    with torch.no_grad():
                        method.on_epoch_start(self.step // epoch_length)
                waited = feed.waited_s
                raw = feed.next()
                self.update(raw, self.step)
                self.step += 1
                if self.step % epoch_length == 0:
                    with torch.no_grad():
                        method.on_epoch_end(self.step // epoch_length - 1)
                self.watch.lap(feed.waited_s - waited)
                self.display.step(self.step)

                signum = stop_request.after(self.step)
                last, improved = self.step == total, False
                if last or self.step % recipe.log.every == 0:
                    self.log()
                if last or self.step % (recipe.eval.every or epoch_length) == 0:
                    improved = self.evaluate()
                if last or improved or signum or self.step % (recipe.checkpoint.every or epoch_length) == 0:
                    self.checkpoint(best=improved)
                if signum and not last:
                    raise Interrupted(self.run.path, self.step, signum)

    def _feed(self) -> Feed:
        recipe, accelerator = self.recipe, self.accelerator
        return Feed(
            self.streams,
            start_step=self.step,
            stop_step=recipe.train.steps,
            world=accelerator.num_processes,
            rank=accelerator.process_index,
            ahead=recipe.data.ahead,
            device=accelerator.device,
            stall_timeout_s=recipe.data.stall_timeout_s,
            pack=recipe.data.pack,
        )

    def log(self) -> None:
        """One train line: the means since the last one."""
        self._refuse_non_finite()
        self._settle()
        window = self.watch.window()
        line = {
            **self._head("train"),
            **self.updater.meters.read(),
            "train/lr": self.updater.learning_rate(self.step - 1),
            "time/data": window.wait_s,
            "time/step": window.step_s,
            "perf/images_per_s": window.images_per_s,
            "perf/data_wait_share": window.wait_share,
            **self._bad_rows(),
        }
        self._write(line)
        self.watch.run()

    def evaluate(self) -> bool:
        """One eval line for raw and averaged weights. Returns whether the headline top-1 is the best so far."""
        self._refuse_non_finite(state=True)
        self._settle()
        began = time.perf_counter()
        networks = {"raw": self.updater.train_module.network}
        if self.updater.teacher is not None:
            networks["ema"] = self.updater.teacher.network
        results = self.evaluator(networks, self.accelerator)
        line = as_line(results, self.recipe.eval.headline)
        for which, result in results.items():
            entry = {"step": self.step, **{name: result[name] for name in ("top1", "top5", "balanced_acc")}}
            known = self.evals.setdefault(which, {"last": entry, "best": entry})
            known["last"] = entry
            if entry["top1"] > known["best"]["top1"]:
                known["best"] = entry
        improved = self.best is None or line["eval/top1"] > self.best["top1"]
        if improved:
            self.best = {"step": self.step, "top1": line["eval/top1"]}
        seconds = time.perf_counter() - began
        self.watch.add_eval(seconds)
        self._write({**self._head("eval"), "time/eval": seconds, **line})
        self.watch.run()
        return improved

    def checkpoint(self, *, best: bool) -> None:
        """Save the state after the current update, unless it is not finite or already saved."""
        self._refuse_non_finite(state=True)
        self._settle()
        if self.saved_at == self.step and not best:
            return
        tensors = collect(self.updater)  # collective
        state = {
            "epoch": self.step // self.recipe.train.steps_per_epoch,
            "config_digest": self.digest,
            "data_digest": self.data.manifest.digest,
            "split_digest": self.data.split.digest,
            "recipe": self.recipe.name,
            "method": self.recipe.method.name,
            "seed": self.recipe.seed,
            "world": self.accelerator.num_processes,
            "metrics_bytes": on_main(self.run.sync_metrics),
            "evals": self.evals,
            "best": self.best,
            "timing": self.watch.state(),
            "torch": torch.__version__,
            SCALER_KEY: scaler_state(self.updater),
        }
        snapshot = checkpoint.Snapshot(tensors, state)
        on_main(lambda: checkpoint.save(self.run.checkpoints, snapshot, step=self.step, best=best, keep=self.recipe.checkpoint.keep))
        self.saved_at = self.step
        self.watch.run()

    # --- small parts of the above -----------------------------------------------------------------------------------------------------

    def _bad_rows(self) -> dict[str, int]:
        """Images so far that could not be decoded and were shown as grey, summed over processes; empty for sources that do not count. Collective."""
        counts = [source.bad_rows for source in (self.data.source, self.evaluator.source) if hasattr(source, "bad_rows")]
        if not counts:
            return {}
        total = int(self.accelerator.reduce(torch.tensor(sum(counts), device=self.accelerator.device), "sum").item())
        if total > (self.bad_rows or 0):
            self.run.log(f"WARNING: {total} image(s) cannot be decoded and are shown as grey; `fastssl-data verify {self.recipe.data.path}` lists them")
        self.bad_rows = total
        return {"data/bad_rows": total}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"step": self.step, "epoch": self.step // self.recipe.train.steps_per_epoch, "kind": kind, "time/wall_s": self.watch.wall_s()}

    def _write(self, line: dict[str, Any]) -> None:
        on_main(lambda: self.run.add_metrics(line))
        trackers.send(self.accelerator, line, self.step)
        self.display.line(line)

    def _settle(self) -> None:
        """Wait for queued device work, so that it is counted as training and not as what follows."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        self.watch.settle()

    def _refuse_non_finite(self, *, state: bool = False) -> None:
        """Raise if a loss was not finite so far or, with ``state``, if a tensor of the state is not finite now."""
        bad = self.updater.meters.bad_step()
        if bad is not None:
            raise TrainingError(f"the loss of update {bad + 1} is not finite; {self._last_good()}; {LOWER}")
        if state and self.found_good_at != self.step:
            name = first_non_finite(self.updater)
            if name is not None:
                raise TrainingError(f"the state after update {self.step} is not finite ({name}); {self._last_good()}; {LOWER}")
            self.found_good_at = self.step

    def _last_good(self) -> str:
        good = checkpoint.linked(self.run.checkpoints, "last")
        return f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"
