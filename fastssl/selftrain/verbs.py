"""The verbs ``fastssl select score | topk | report`` and ``fastssl selftrain``: arguments in, one door of this package each, lines out."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any


def add_selftrain_verbs(verb: Any, takes_recipe: Any, write_report: Any) -> None:
    """Add the verbs to the command line, whose own makers ``verb`` and ``takes_recipe`` are; ``write_report`` writes the page about run folders."""
    select = verb("select", None, "score a pool of images with a trained run and select the best of each class", "fastssl select score RUN --log logs/pool")
    select.set_defaults(run=None, help_of=select)
    inner = select.add_subparsers(dest="select_verb", metavar="score|topk|report")

    score = verb("score", _score, "score a pool; start as many of these as there are devices", "fastssl select score RUN --log logs/pool", into=inner)
    score.add_argument("teacher", metavar="RUN", help="run folder of the teacher")
    score.add_argument("--log", metavar="DIR", required=True, help="scoring log to make or go on with; all workers share it")
    score.add_argument("--checkpoint", default="last", metavar="last|best|NAME", help="which weights of the teacher (default: last)")
    score.add_argument("--pool", default="", metavar="DATASET", help="dataset folder to score (default: the teacher's own)")
    score.add_argument("--split", default="train", help="its split (default: train)")
    score.add_argument("--rows", choices=("unlabeled", "all"), help="rows to score (default: unlabeled in the teacher's own dataset, all in another)")
    score.add_argument("--label-split", default="", metavar="NAME", help="label split that says which rows are unlabeled (default: the teacher's)")
    score.add_argument("--p", type=_positive, default=10, help="classes kept per image (default: 10)")
    score.add_argument("--unit", type=_positive, default=20_000, metavar="ROWS", help="images per unit of work (default: 20000)")
    score.add_argument("--batch", type=_positive, default=256, help="images per forward pass (default: 256)")
    score.add_argument("--precision", choices=("auto", "bf16", "no"), default="auto", help="of the backbone; the head is float32 (default: bf16 on a GPU)")
    score.add_argument("--lease", type=float, default=120.0, metavar="S", help="seconds without a sign of life after which a unit is taken over (default: 120)")
    score.add_argument("--mend", action="store_true", help="first check all committed units and throw damaged ones away")

    topk = verb("topk", _topk, "select from a complete log", "fastssl select topk logs/pool --out selections/k1000 --k 1000", into=inner)
    topk.add_argument("log", metavar="LOG", help="scoring log")
    topk.add_argument("--out", metavar="DIR", required=True, help="selection folder to write")
    topk.add_argument("--k", type=int, default=0, help="rows per class (default: 0 = all lists together hold 16 %% of the pool)")
    topk.add_argument("--p", type=int, default=0, help="classes per image that compete (default: 0 = all of the log)")
    topk.add_argument("--seed", type=int, default=0, help="decides among equal scores (default: 0)")
    topk.add_argument("--min-probability", type=float, default=0.0, metavar="X", help="leave out rows below this probability")
    topk.add_argument("--floor", type=int, default=0, metavar="N", help="but keep at least the best N rows of each class")
    topk.add_argument("--cap", action="append", default=[], metavar="CLASS=K", help="another k for one class; may be repeated")
    topk.add_argument("--fill", choices=("none", "duplicate"), default="none", help="duplicate: repeat rows of short classes up to k")
    topk.add_argument("--over", choices=("class", "all"), default="class", help="all: one list over all classes, unbalanced")
    topk.add_argument("--method", choices=("auto", "table", "histogram"), default="auto", help="same result, other memory (default: auto)")
    topk.add_argument("--exclude", metavar="FILE", help="rows that may not be selected: a number per line, or .npy")
    topk.add_argument("--check", action="store_true", help="also let DuckDB select, and compare")

    report = verb("report", _report, "judge a selection: counts, scores, precision, pictures", "fastssl select report selections/k1000", into=inner)
    report.add_argument("selection", metavar="SELECTION", help="selection folder")
    report.add_argument("--out", metavar="FILE", help="page to write (default: report.html in the selection folder)")
    report.add_argument("--log", metavar="LOG", help="scoring log, for score histograms and the curve beyond the selection's own k")
    report.add_argument("--rows", type=_positive, default=8, help="pictures per class and row of the contact sheet (default: 8)")

    plan = takes_recipe(verb("selftrain", _selftrain, "teacher, scores, selection, student, fine-tuning in one", "fastssl selftrain selftrain/cifar10 seed=1"))
    plan.add_argument("--until", choices=("teacher", "score", "select", "student", "finetune"), help="stop after this step of the first round")
    plan.set_defaults(write_report=write_report)


def _score(args: argparse.Namespace) -> int:
    from fastssl.selftrain.score import Pool, open_log, work, worker_device
    from fastssl.selftrain.teacher import load_scorer

    scorer = load_scorer(args.teacher, args.checkpoint, device=worker_device(), batch=args.batch, precision=args.precision)
    rows = args.rows or ("all" if args.pool and not args.label_split else "unlabeled")
    log = open_log(args.log, scorer, Pool(args.pool, args.split, rows, args.label_split), p=args.p, unit_rows=args.unit)
    for name in log.mend() if args.mend else ():
        print(f"unit {name} was damaged and will be scored again", flush=True)
    done = work(log, scorer, lease_s=args.lease, say=lambda text: print(text, flush=True))
    bad = len(log.bad())
    print(f"{log.folder}: complete, {log.num_rows - bad} of {log.num_rows} images scored, {bad} bad; this worker: {done.units} units, {done.images} images")
    return 0


def _topk(args: argparse.Namespace) -> int:
    from fastssl.errors import DataError
    from fastssl.selftrain.log import Log
    from fastssl.selftrain.rules import Rule
    from fastssl.selftrain.select import read_excluded, select

    caps = {}
    for text in args.cap:
        name, equals, k = text.rpartition("=")
        if not equals or not k.isdigit():
            raise DataError(f"--cap {text!r} must be CLASS=K, for example --cap cat=100")
        caps[name] = int(k)
    rule = Rule(args.k, args.p, args.seed, args.min_probability, args.floor, caps, args.fill, args.over)
    log, excluded = Log(args.log), read_excluded(args.exclude) if args.exclude else None
    made = select(log, rule, args.out, method=args.method, excluded=excluded)
    for line in lines_of(made.info):
        print(line)
    if args.check:
        from fastssl.selftrain.duck import check_with_duckdb

        print(check_with_duckdb(log, made, rule, excluded))
    print(args.out)
    return 0


def lines_of(info: dict[str, Any]) -> list[str]:
    """What there is to say about a selection in a few lines."""
    short = info["short_classes"]
    lines = [
        f"{info['rows']} rows of {info['images']} images, {info['examples']} training examples, from {info['pool']['ranked']} of {info['pool']['rows']} images"
    ]
    if info["bad_images"]:
        lines.append(f"{info['bad_images']} images could not be scored")
    if short:
        shown = ", ".join(f"{name} {count}" for name, count in list(short.items())[:8])
        lines.append(f"{len(short)} of {len(info['classes'])} classes have fewer rows than their k: {shown}{', ...' if len(short) > 8 else ''}")
    return lines


def _report(args: argparse.Namespace) -> int:
    from fastssl.selftrain.judge import judge
    from fastssl.selftrain.pages import write_page

    found = judge(args.selection, log=args.log)
    for line in found.lines():
        print(line)
    print(write_page(found, args.out, pictures=args.rows))
    return 0


def _selftrain(args: argparse.Namespace) -> int:
    from fastssl.engine.stop import Interrupted
    from fastssl.selftrain.pages import sections
    from fastssl.selftrain.pipeline import run_plan
    from fastssl.selftrain.plan import load_plan

    plan = load_plan(args.recipe, args.overrides)
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        done = run_plan(plan, until=args.until, say=lambda text: print(f"[selftrain] {text}", flush=True) if first else None)
    except Interrupted as stopped:
        print(f"{stopped}\nthe same command goes on from here", file=sys.stderr)
        return stopped.exit_code
    if first:
        for line in done.lines():
            print(line)
        if done.complete:
            extra = [part for name, judgement in done.judgements.items() for part in sections(judgement, name if plan.rounds > 1 else "")]
            page = args.write_report(list(done.runs.values()), done.folder / "report.html", title=plan.title or plan.name, extra_sections=extra)
            print(page)
        print(done.folder)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
