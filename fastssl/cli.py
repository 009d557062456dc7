"""The command line: ``fastssl VERB ...``. Each verb parses, calls one door of the library and prints; nothing is computed here.

Heavy imports happen inside the verbs, so that ``--help`` and ``recipes`` answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastssl import __version__
from fastssl.errors import FastSSLError, nearest
from fastssl.selftrain.verbs import add_selftrain_verbs

EXAMPLES = """\
examples:
  fastssl recipes                                            what can be trained, and the published result of each
  fastssl config show cifar10/fixmatch_4000 optim.lr=0.01    every value, and where it comes from
  fastssl views cifar10/fixmatch_4000 --out views.png        look at the augmented images before spending hours
  fastssl bench cifar10/fixmatch_4000                        what limits it here, and the next setting to try
  fastssl train cifar10/fixmatch_4000                        train; key=value after the recipe changes any value
  fastssl train cifar10/fixmatch_4000 seed=1 --resume auto   go on with the newest unfinished run of exactly this recipe
  torchrun --standalone --nproc_per_node 2 -m fastssl train cifar10/fixmatch_4000
                                                             the same numbers on two processes (batch sizes are global)
  fastssl eval runs/cifar10_fixmatch_4000/20250101-120000-abc123 --checkpoint best
  fastssl report runs/cifar10_fixmatch_4000/*                one HTML page that compares runs

A RECIPE is a path to a .yaml file or a short name below recipes/.  FASTSSL_DEBUG=1 prints tracebacks.
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="fastssl",
        description="Semi-supervised image classification: train, evaluate and report from recipes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastssl {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")

    def verb(name: str, run: Any, help: str, example: str, *, into: Any = verbs) -> argparse.ArgumentParser:
        sub = into.add_parser(name, help=help, description=help, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(run=run)
        return sub

    def takes_recipe(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("recipe", metavar="RECIPE", help="path to a .yaml file, or a short name such as cifar10/fixmatch_4000")
        sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="values over the recipe's, such as optim.lr=0.01")
        sub.set_defaults(intermixed=True)
        return sub

    train = takes_recipe(verb("train", _train, "train a recipe into a new run folder", "fastssl train cifar10/fixmatch_4000 seed=1 --resume auto"))
    train.add_argument("--resume", metavar="auto|RUN|none", default="none", help="auto: newest unfinished run of this recipe; RUN: that folder (default: none)")
    train.add_argument("--run-dir", metavar="DIR", help="use exactly this run folder instead of a new one under runs_dir")

    evaluate = verb("eval", _eval, "measure a run's checkpoint", "fastssl eval runs/demo/20250101-120000-abc123 --checkpoint last --split validation")
    evaluate.add_argument("run_folder", metavar="RUN", help="run folder")
    evaluate.add_argument("--checkpoint", metavar="best|last|NAME", default="best", help="which weights; NAME: step-00001024 (default: best)")
    evaluate.add_argument("--split", choices=("test", "validation"), help="which rows (default: the recipe's data.eval_on)")

    report = verb("report", _report, "write one self-contained HTML page about runs", "fastssl report runs/demo/* --out demo.html")
    report.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders that hold run folders; several are compared")
    report.add_argument("--out", metavar="FILE", help="page to write (default: report.html in the folder of the run, or of all runs)")
    report.add_argument("--title", help="headline of the page")
    report.add_argument("--views", metavar="PNG", nargs="+", default=[], help="pictures of views to show besides the runs' own")

    views = takes_recipe(verb("views", _views, "write a picture of the views that the method sees", "fastssl views cifar10/fixmatch_4000 --out views.png"))
    views.add_argument("--rows", type=_positive, default=8, help="images on the sheet (default: 8)")
    views.add_argument("--out", metavar="FILE", default="views.png", help="picture to write (default: views.png)")
    views.add_argument("--draws", type=_positive, default=3, help="pictures of each view per image (default: 3)")
    views.add_argument("--tile", type=_positive, default=128, help="side of a picture on the sheet in pixels (default: 128)")
    views.add_argument(
        "--diff", metavar="WHO[=DIR],...", help="put readers (arrays ffcv ffcv-engine shards dali) and renderers (auto reference triton) side by side"
    )

    bench = takes_recipe(verb("bench", _bench, "measure what limits a recipe on this machine", "fastssl bench cifar10/fixmatch_4000 --steps 50"))
    bench.add_argument("--steps", type=_positive, default=20, help="longest phase in updates (default: 20; a phase also ends after about 20 s)")
    bench.add_argument("--json", action="store_true", help="for machines: one JSON object")

    add_selftrain_verbs(verb, takes_recipe, _write_page)

    methods = verb("methods", _methods, "list the methods, or explain one with its options", "fastssl methods fixmatch")
    methods.add_argument("name", metavar="NAME", nargs="?", help="a method")
    form = methods.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for machines: views, state, options, forwards per image")
    form.add_argument("--markdown", action="store_true", help="the page docs/methods.md")

    recipes = verb("recipes", _recipes, "list the recipes, their variants and the published results", "fastssl recipes --published tllib_supervised")
    recipes.add_argument("root", metavar="FOLDER|RECIPE", nargs="?", help="where to look (default: ./recipes, else the project's), or a recipe: its variants")
    recipes.add_argument("--published", metavar="TABLE", nargs="?", const="", help="list published numbers (of one table) with source and command")
    form = recipes.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for machines: every recipe and variant, every published number")
    form.add_argument("--check", action="store_true", help="prove that every recipe and variant could be trained; exits with 1 if one could not")

    config = verb("config", None, "look at resolved recipes", "fastssl config show cifar10/fixmatch_4000 optim.lr=0.01")
    config.set_defaults(run=None, help_of=config)
    inner = config.add_subparsers(dest="config_verb", metavar="show")
    shown = takes_recipe(verb("show", _config_show, "print every value with its origin", "fastssl config show cifar10/fixmatch_4000 optim.lr=0.01", into=inner))
    shown.add_argument("--yaml", action="store_true", help="print the resolved recipe as a recipe")
    shown.add_argument("--help-keys", action="store_true", help="print type, default and meaning of every key instead")

    doctor = verb("doctor", _doctor, "check this machine and name what mends it", "fastssl doctor")
    doctor.add_argument("--data", metavar="DIR", default="data", help="where datasets will be (default: data)")
    doctor.add_argument("--runs", metavar="DIR", default="runs", help="where runs will be (default: runs)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status: 0 done, 1 doctor found a fault, 2 wrong input, 130 interrupted, 143 terminated."""
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    args, rest = parser.parse_known_args(words)
    if rest and getattr(args, "intermixed", False) and not any(word.startswith("-") for word in rest):
        args.overrides, rest = [*args.overrides, *rest], []  # argparse stops collecting KEY=VALUE at the first option
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if getattr(args, "run", None) is None:
        (getattr(args, "help_of", None) or parser).print_help()
        return 0
    debug = os.environ.get("FASTSSL_DEBUG", "") not in ("", "0")
    try:
        return args.run(args) or 0
    except FastSSLError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return _end(2)
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return _end(130)
    except BrokenPipeError:  # `fastssl recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        _leave_process_group()


def _leave_process_group() -> None:
    """End the process group before the interpreter does: gloo's threads abort a process (status -6) that exits while a peer hangs up."""
    distributed = _process_group()
    if distributed is not None:
        with contextlib.suppress(RuntimeError):  # a peer that is gone already
            distributed.destroy_process_group()


def _end(status: int) -> int:
    """``status``; a rank of several stops here and now, because even ending its process group can abort it once its peers have gone."""
    if _process_group() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _process_group() -> Any:
    distributed = sys.modules.get("torch.distributed")  # not imported for this: most verbs never load torch
    return distributed if distributed is not None and distributed.is_available() and distributed.is_initialized() else None


def _train(args: argparse.Namespace) -> int:
    from fastssl.launch_check import check_world, started_world
    from fastssl.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    check_world(started_world())
    from fastssl.engine.stop import Interrupted
    from fastssl.engine.train import train

    try:
        run = train(recipe, resume=None if args.resume == "none" else args.resume, run_dir=args.run_dir)
    except Interrupted as stopped:  # with a checkpoint: 130 for Ctrl-C, 143 for SIGTERM
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    if _is_first_process():
        print(run)
    return 0


def _eval(args: argparse.Namespace) -> int:
    from fastssl.console import print_table
    from fastssl.engine.evaluate import evaluate_run
    from fastssl.recipe import load_recipe
    from fastssl.sources.manifest import load_manifest

    run = _run_folder(args.run_folder)
    results = evaluate_run(run, args.checkpoint, args.split)
    if not _is_first_process():
        return 0
    recipe = load_recipe(run / "config.yaml")
    print(f"{run}: checkpoint {args.checkpoint} (after update {results['step']}) on {results['split']}")
    if args.checkpoint == "best" and results["split"] == recipe.data.eval_on:
        print(f"note: best was chosen by its accuracy on {results['split']}, the split measured here, so it flatters; --checkpoint last is free of that choice")
    print()
    for name, value in results.items():
        if name.startswith("eval/") and not isinstance(value, (list, tuple, dict)):
            print(f"{name:<24} {value:.4f}" if isinstance(value, float) else f"{name:<24} {value}")
    of_weights = {name.split("/")[1]: value for name, value in results.items() if name.endswith("/per_class")}
    if of_weights:
        rows = zip(load_manifest(recipe.data.path).classes, *of_weights.values(), strict=True)
        print("\naccuracy of each class, percent")
        print_table(("class", *of_weights), [(name, *("-" if v is None else f"{v:.2f}" for v in values)) for name, *values in rows])
    return 0


def _report(args: argparse.Namespace) -> int:
    from fastssl.report import write_report

    out = _writable(Path(args.out)) if args.out else None
    print(write_report([Path(run) for run in args.runs], out, title=args.title, views=[Path(picture) for picture in args.views]))
    return 0


def _write_page(*args: Any, **options: Any) -> Path:
    from fastssl.report import write_report

    return write_report(*args, **options)


def _views(args: argparse.Namespace) -> int:
    from fastssl.engine.sheet import write_views
    from fastssl.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise FastSSLError(f"--out {out}: the picture is a .png file")
    if args.diff:
        from fastssl.engine.difference import write_difference

        for line in write_difference(recipe, _writable(out), args.diff, rows=args.rows, tile=args.tile):
            print(line)
        print(out)
        return 0
    print(write_views(recipe, _writable(out), args.rows, draws=args.draws, tile=args.tile))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from fastssl.engine.bench import bench, lines
    from fastssl.recipe import load_recipe

    found = bench(load_recipe(args.recipe, args.overrides), args.steps)
    if _is_first_process():
        print(json.dumps(found, indent=1) if args.json else lines(found))
    return 0


def _methods(args: argparse.Namespace) -> int:
    from fastssl import methods
    from fastssl.console import print_table
    from fastssl.recipe import describe_config
    from fastssl.recipe_values import show

    if args.markdown or args.json:
        from fastssl import catalogue

        own = Path(__file__).resolve().parent.parent / "recipes"
        catalogue.print_methods(own, args.name, markdown=args.markdown)
        return 0
    if args.name is None:
        print_table(("method", "paper"), [(name, _first_line(methods.get(name))) for name in methods.names()])
        return 0
    if args.name not in methods.names():
        raise FastSSLError(f"no method {args.name!r}{nearest(args.name, methods.names())}; there are: {', '.join(methods.names())}")
    method = methods.get(args.name)
    print(f"{args.name}\n\n{inspect.getdoc(method) or 'no description'}\n")
    options = describe_config(method.Config())
    if options:
        print_table(("option", "type", "default", "meaning"), [(i.key, i.type, show(i.default), i.help) for i in options])
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from fastssl import catalogue

    own = Path(__file__).resolve().parent.parent / "recipes"
    given = Path(args.root) if args.root else None
    standard = Path("recipes") if Path("recipes").is_dir() else own
    short = "" if given is None or given.is_dir() else given.with_suffix("").as_posix()  # a recipe, or a folder of recipes below the standard one
    one = short if short and ((standard / short).is_dir() or (standard / f"{short}.yaml").is_file()) else ""
    root = standard if given is None or one else given
    if args.check:
        return catalogue.check(root, one)
    if args.json:
        catalogue.print_json(root, one, args.published)
    elif args.published is not None:
        catalogue.print_published(root, one, args.published)
    elif one:
        catalogue.print_variants(root, one)
    else:
        catalogue.print_recipes(root)
    return 0


def _config_show(args: argparse.Namespace) -> int:
    from fastssl.console import print_table
    from fastssl.recipe import describe, dump_yaml, resolve
    from fastssl.recipe_values import show

    resolved = resolve(args.recipe, args.overrides)
    infos = describe(resolved.recipe)
    if args.yaml:
        print(dump_yaml(resolved.recipe), end="")
    elif args.help_keys:
        print_table(("key", "type", "default", "meaning"), [(i.key, i.type, show(i.default), i.help) for i in infos])
    else:
        print_table(("key", "value", "origin", "meaning"), [(i.key, show(i.value), resolved.origins[i.key], i.help) for i in infos])
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from fastssl import doctor

    findings = []
    for finding in doctor.examine(args.data, args.runs):
        findings.append(finding)
        print(doctor.format_line(finding), flush=True)
    return doctor.exit_code(findings)


def _run_folder(text: str) -> Path:
    path = Path(text)
    if not (path / "config.yaml").is_file():
        raise FastSSLError(f"{path} is not a run folder: it has no config.yaml; run folders look like runs/<recipe>/<time>-<id>")
    return path


def _is_first_process() -> bool:
    """Under torchrun every process runs the verb; one of them speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def _writable(out: Path) -> Path:
    """``out`` with its folder made, if only the last level of that is missing: a longer missing path is a typing error more often than a wish."""
    folder = out.parent
    if folder.exists() and not folder.is_dir():
        raise FastSSLError(f"--out {out}: {folder} is a file, not a folder")
    if not folder.parent.is_dir():
        raise FastSSLError(f"--out {out}: there is no folder {folder.parent}; make it first, or name another place")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise FastSSLError(f"--out {out}: the folder {folder} cannot be made: {error.strerror}") from None
    return out


def _first_line(method: Any) -> str:
    return (inspect.getdoc(method) or "").split("\n", 1)[0]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
