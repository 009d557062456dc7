"""Teacher, scores, selection, student, fine-tuning: one plan from start to end, each step skipped where it is done already.

    <runs_dir>/<name>/seed<seed>/
      plan.json                 what must not change between two starts
      teacher/                  a run folder
      round1/log/ selection/    fastssl/selftrain/log.py, fastssl/sources/selection.py
      round1/check.json         the teacher's accuracy through the scoring path, beside its evaluation's
      round1/student/ finetune/ run folders
      summary.json              accuracies of all networks, facts about the selections

The steps run in this process (or in the processes of a launcher: training is shared as always, units of scoring are claimed one by one).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastssl.engine import checkpoint
from fastssl.engine.launch import launch
from fastssl.engine.resume import on_main
from fastssl.engine.runfolder import read_json
from fastssl.engine.train import train
from fastssl.errors import CheckpointError, DataError
from fastssl.recipe import config_digest, load_recipe
from fastssl.schema import Recipe
from fastssl.selftrain.files import replace_file, told
from fastssl.selftrain.judge import Judgement, judge
from fastssl.selftrain.plan import STEPS, Plan
from fastssl.selftrain.score import open_log, work
from fastssl.selftrain.select import select
from fastssl.selftrain.teacher import Scorer, load_scorer
from fastssl.sources.selection import MANIFEST_NAME

APART = {"no": 0.05, "bf16": 1.0}  # points of accuracy by which scoring may differ from evaluation: rounding of near ties


@dataclass
class Outcome:
    """What a pipeline has made so far: run folders by step ("teacher", "round1/student", ...), selections by round, and the plan's folder."""

    folder: Path
    runs: dict[str, Path] = field(default_factory=dict)
    selections: dict[str, Path] = field(default_factory=dict)
    judgements: dict[str, Judgement] = field(default_factory=dict)
    complete: bool = False

    def accuracies(self) -> dict[str, dict[str, Any]]:
        """Step -> {top1, step} after the last update, of the weights that the recipe's headline is about."""
        found = {}
        for name, run in self.runs.items():
            summary, headline = read_json(run / "summary.json"), load_recipe(run / "config.yaml").eval.headline
            cells = summary.get("eval", {})
            cell = cells.get(headline) or cells.get("raw") or {}
            if "last" in cell:
                found[name] = {"top1": cell["last"]["top1"], "step": cell["last"]["step"]}
        return found

    def lines(self) -> list[str]:
        out = [f"{name:<18} top-1 {cell['top1']:.2f} % after {cell['step']} updates" for name, cell in self.accuracies().items()]
        for name, judgement in self.judgements.items():
            out += [f"{name:<18} {line}" for line in judgement.lines()]
        return out


def run_plan(plan: Plan, *, until: str | None = None, say: Callable[[str], Any] = print) -> Outcome:
    """Do what is missing of a plan, up to step ``until`` of the first round. Collective: every process of a launcher calls it.

    Raises DataError if the folder belongs to another plan, Interrupted if a training was asked to stop; the same call then goes on.
    """
    outcome = Outcome(plan.folder)
    recipe = load_recipe(Path(plan.teacher.run) / "config.yaml") if plan.teacher.run else plan.recipe("teacher")
    accelerator = launch(recipe)
    on_main(lambda: _open_folder(plan))
    teacher = Path(plan.teacher.run) if plan.teacher.run else _train(plan, "teacher", plan.folder / "teacher", {}, say)
    outcome.runs["teacher"] = teacher
    checkpoint_name = plan.teacher.checkpoint
    for number in range(1, plan.rounds + 1):
        name, folder = f"round{number}", plan.folder / f"round{number}"
        if until == STEPS[0]:
            return outcome
        chosen = folder / "selection"
        if not on_main(lambda: (chosen / MANIFEST_NAME).exists()):  # noqa: B023 - one answer for all, before the main process makes it true
            scorer = load_scorer(teacher, checkpoint_name, device=accelerator.device, batch=plan.score.batch, precision=plan.score.precision)
            say(f"{name}: scoring with {teacher}")
            log = open_log(folder / "log", scorer, plan.pool, p=plan.score.p, unit_rows=plan.score.unit_rows)
            work(log, scorer, lease_s=plan.score.lease_s, say=say)
            on_main(lambda: _check_path(scorer, teacher, checkpoint_name, folder / "check.json"))  # noqa: B023
            if until == "score":
                return outcome
            on_main(lambda: select(log, plan.select, chosen) and None)  # noqa: B023
        say(f"{name}: selection {chosen}")
        outcome.selections[name] = chosen
        outcome.judgements[name] = judge(chosen)
        if until == "select":
            return outcome
        handed: dict[str, Any] = {"data.selection": str(chosen), "data.selection_as": plan.student.selection_as}
        if plan.student.frozen_teacher:
            handed |= {"teacher.enabled": True, "teacher.start": str(weights_of(teacher, checkpoint_name))}
        last, checkpoint_name = _train(plan, "student", folder / "student", handed, say), plan.student.checkpoint
        outcome.runs[f"{name}/student"] = last
        if until == "student":
            return outcome
        if plan.finetune is not None:
            start = {"model.start": str(weights_of(last, checkpoint_name))}
            last, checkpoint_name = _train(plan, "finetune", folder / "finetune", start, say), plan.finetune.checkpoint
            outcome.runs[f"{name}/finetune"] = last
        if until == "finetune":
            return outcome
        teacher = last
    outcome.complete = True
    facts = {name: judgement.facts() for name, judgement in outcome.judgements.items()}
    summary = {"status": "finished", "title": plan.title, "seed": plan.seed, "accuracy": outcome.accuracies(), "selections": facts}
    on_main(lambda: replace_file(plan.folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode()))
    return outcome


def weights_of(run: Path, checkpoint_name: str) -> Path:
    """The weights file of a run that its headline accuracy is about: the average's, else the student's."""
    recipe, folder = load_recipe(run / "config.yaml"), checkpoint.find(run, checkpoint_name)
    averaged = folder / "teacher.safetensors"
    return averaged if recipe.eval.headline == "ema" and averaged.is_file() else folder / "student.safetensors"


def _open_folder(plan: Plan) -> None:
    """Make the plan's folder, or make sure that it is this plan's."""
    identity, file = json.loads(json.dumps(plan.identity())), plan.folder / "plan.json"
    known = read_json(file)
    if not known:
        replace_file(file, (json.dumps(identity, indent=1) + "\n").encode())
    elif known != identity:
        apart = [name for name in identity if known.get(name) != identity[name]]
        raise DataError(f"{plan.folder} was begun with another plan ({', '.join(apart)} differ); give this one another name: name=NAME")


def _train(plan: Plan, step: str, run: Path, extra: dict[str, Any], say: Callable[[str], Any]) -> Path:
    """Train a step in its run folder: skip it if finished, go on from its last checkpoint, or begin."""
    recipe = plan.recipe(step, extra)
    state = on_main(lambda: _state_of(run, recipe))
    say(f"{step}: {'is finished already' if state == 'finished' else 'goes on' if state == 'begun' else 'begins'}: {run}")
    if state == "begun":
        train(recipe, resume=str(run))
    elif state == "new":
        train(recipe, run_dir=run)
    return run


def _state_of(run: Path, recipe: Recipe) -> str:
    """ "finished", "begun" or "new"; a folder that died before its first checkpoint is put aside. Raises CheckpointError for another recipe's run."""
    if read_json(run / "summary.json").get("status") == "finished":
        recorded = read_json(run / "env.json").get("config_digest")
        if recorded != config_digest(recipe):
            raise CheckpointError(f"{run} was trained with other settings than this plan's (compare its config.yaml); give the plan another name: name=NAME")
        return "finished"
    if checkpoint.linked(run / "checkpoints", "last") is not None:
        return "begun"
    if run.exists():
        with told(run):
            run.rename(next(aside for n in range(1, 1000) if not (aside := run.with_name(f"{run.name}-unfinished-{n}")).exists()))
    with told(run):
        run.parent.mkdir(parents=True, exist_ok=True)
    return "new"


def _check_path(scorer: Scorer, teacher: Path, checkpoint_name: str, file: Path) -> None:
    """Guard against another channel order, normalisation or crop in scoring than in evaluation: both must give one accuracy."""
    state = checkpoint.load_state(checkpoint.find(teacher, checkpoint_name))
    weights = "ema" if scorer.identity["teacher"]["weights"] == "teacher" else "raw"
    last = state.get("evals", {}).get(weights, {}).get("last", {})
    evaluated = last.get("top1") if last.get("step") == state["step"] else None
    scored = scorer.accuracy()
    replace_file(file, (json.dumps({"top1_scoring": scored, "top1_evaluation": evaluated}, indent=1) + "\n").encode())
    if evaluated is not None and abs(scored - evaluated) > APART[scorer.precision]:
        raise DataError(
            f"the teacher's accuracy is {scored:.2f} % through scoring but {evaluated:.2f} % in its evaluation ({teacher}): "
            "the two see different pixels or weights"
        )
