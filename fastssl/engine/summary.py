"""summary.json: what a run was, how far it came, what it reached and how fast it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastssl.engine.runfolder import device_name

if TYPE_CHECKING:
    from fastssl.engine.train import Trainer


def summary(trainer: Trainer, status: str, error: str | None) -> dict[str, Any]:
    """``status``: finished, interrupted or failed. Accuracies in percent, times in seconds, speeds by the rules of fastssl/engine/timing.py."""
    recipe = trainer.recipe
    images_per_s, wait_share = trainer.watch.overall()
    return {
        "status": status,
        "error": error,
        "recipe": recipe.name,
        "title": recipe.title,
        "method": recipe.method.name,
        "dataset": trainer.data.manifest.name,
        "split": trainer.data.split.name,
        "seed": recipe.seed,
        "world": trainer.accelerator.num_processes,
        "steps": trainer.step,
        "total_steps": recipe.train.steps,
        "num_labeled": trainer.task.num_labeled,
        "num_unlabeled": trainer.task.num_unlabeled,
        "eval": trainer.evals,
        "images_per_s": images_per_s,
        "data_wait_share": wait_share,
        **({} if trainer.bad_rows is None else {"bad_rows": trainer.bad_rows}),
        "train_wall_s": trainer.watch.totals.train_s,
        "eval_wall_s": trainer.watch.totals.eval_s,
        "device": device_name(trainer.accelerator.device),
        "precision": recipe.train.precision,
        "config_digest": trainer.digest,
    }
