"""python -m experiments list | run NAME | plot [NAME] | report [NAME]: see experiments/README.md."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from dataclasses import replace
from typing import Any

from experiments.config import HOME, NAMES, SETTINGS, Run, hook, questions, read_results
from experiments.report import by_numbers, write_tables
from experiments.runner import run_again, sweep


def seeds_of(text: str) -> list[int]:
    """ "0,1,2" -> [0, 1, 2]. Raises argparse.ArgumentTypeError on anything else, and on repeated seeds."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"seeds are integers with commas between them, not {text!r}") from None
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"seeds are distinct and not negative, not {text!r}")
    return seeds


def chosen(name: str, only: list[str] | None) -> list[str] | None:
    """["a,b", "c, d"] -> ["a", "b", "c, d"] where "c, d" is a label. Raises ValueError: an unknown experiment."""
    labels = {run.label for setting in SETTINGS for run in questions(name).configs(setting)}
    return only and [part for text in only for part in ([text] if text in labels else text.split(","))]


def runs_of(
    name: str,
    seeds: list[int],
    only: list[str] | None = None,
    setting: str | None = None,
    corpus: str | None = None,
    groups: list[str] | None = None,
) -> list[Run]:
    """The runs of an experiment, all of a seed before the next seed's.

    Args:
        only: labels or arms to keep. groups: texts of which one must be in the name of a run's group.
        setting: "S" or "T" instead of the experiment's own. corpus: another text than the setting's; its runs get a
            table of their own.

    Raises:
        ValueError: an unknown experiment; an `only` that no run has, or a text that no group has in its name.
    """
    module = questions(name)
    cells = module.configs(setting or module.SETTING)
    if corpus is not None:
        cells = [_on_corpus(run, corpus) for run in cells]
    names = {name for run in cells for name in (run.label, run.arm)}
    unknown = [arm for arm in only or () if arm not in names]
    if unknown:
        raise ValueError(f"{name} has no arm {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    missing = [part for part in groups or () if not any(part in run.group for run in cells)]
    if missing:
        there = "; ".join(sorted({run.group for run in cells}, key=by_numbers))
        raise ValueError(f"{name} has no group with {' or '.join(missing)} in its name; it has {there}")
    return [run.seeded(seed) for seed in seeds for run in _keep(cells, only, groups)]


def _keep(runs: list[Run], only: list[str] | None, groups: list[str] | None = None) -> list[Run]:
    """The runs with these labels, or of these arms where no label is called so, in groups with one of these texts in
    their name; None is no choice."""
    labels = {run.label for run in runs}
    if only is not None:
        runs = [run for run in runs if run.label in only or run.arm in set(only) - labels]
    return [run for run in runs if groups is None or any(part in run.group for part in groups)]


def _on_corpus(run: Run, corpus: str) -> Run:
    """The same run on another text, whose name takes the place of the old one's in the name of the table."""
    old = run.setting.corpus
    group = run.group.replace(old, corpus) if old in run.group else f"{run.group}, {corpus}"
    return replace(run, setting=replace(run.setting, corpus=corpus), group=group)


def tune(
    name: str,
    only: list[str] | None = None,
    groups: list[str] | None = None,
    limit_minutes: float | None = None,
    **how: Any,
) -> int:
    """Makes the tuning runs of an experiment, seed 0; the later part of a grid hangs on the earlier.

    Returns how many failed."""
    module, began, failed = questions(name), time.monotonic(), 0
    if not hasattr(module, "tune"):
        raise ValueError(f"{name} has nothing to tune: its runs take the rates of sceptic")
    asked: set[str] = set()
    while True:
        runs = _keep(module.tune(), only, groups)
        if not runs:
            raise ValueError(f"{name} tunes nothing that --only and --group leave")
        new = [run for run in runs if run.key not in asked]  # what failed is not tried again and again
        left = None if limit_minutes is None else limit_minutes - (time.monotonic() - began) / 60
        if not new or (left is not None and left < 0):
            return failed
        asked |= {run.key for run in new}
        failed += sweep(new, limit_minutes=left, **how)


def list_experiments() -> None:
    for name in NAMES:
        module = questions(name)
        done = {result["key"] for result in read_results(HOME / name / "results.jsonl")}
        cells = module.configs(module.SETTING)
        runs = [cell.seeded(seed) for cell in cells for seed in (0, 1, 2)]
        there = sum(run.key in done for run in runs)
        print(f"{name:18} {module.SETTING}  {len(cells):3} cells, {there:3} of {len(runs):3} runs", end="")
        other = f" and {len(done) - there} at other settings or texts" if len(done) > there else ""
        print(f"{other}  {(module.__doc__ or '').splitlines()[0]}")


def _with_results() -> list[str]:
    return [name for name in NAMES if read_results(HOME / name / "results.jsonl")]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the experiments and how many of their runs are there")
    run = commands.add_parser("run", help="make the runs that are not there yet")
    run.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    run.add_argument("--seeds", type=seeds_of, default=[0, 1, 2], help="default 0,1,2")
    only = "labels or arms, with commas between them; a label that has commas itself in an --only of its own"
    run.add_argument("--only", action="append", help=only)
    run.add_argument("--group", action="append", help="only groups (tables) with this in their name; may be repeated")
    run.add_argument("--setting", choices=tuple(SETTINGS), help="default: the experiment's own")
    run.add_argument("--corpus", help="another text, as engram.lm.corpus.load_corpus takes it")
    run.add_argument("--tune", action="store_true", help="make the learning-rate grid instead, of seed 0")
    run.add_argument("--workers", type=int, default=1, help="runs side by side (default 1)")
    run.add_argument("--threads", type=int, default=1, help="of each run (default 1, which repeats to the last digit)")
    run.add_argument("--device", default="cpu", help="cpu (default) or cuda: of the dense weights, tables stay in RAM")
    run.add_argument("--again", action="store_true", help="make runs that are there once more and compare the losses")
    run.add_argument("--limit-minutes", type=float, help="begin no new run after this long")
    for command, what in (
        ("plot", "draw figure.png from the results"),
        ("report", "write the tables into README.md; of all, into paper_notes/claims.md and the project's README too"),
    ):
        one = commands.add_parser(command, help=f"{what}; without a NAME of all")
        one.add_argument("name", choices=NAMES, metavar="NAME", nargs="?")
    return top


def main() -> int:
    """Returns the exit status: 1 where a run failed or the input was bad."""
    arguments = parser().parse_args()
    try:
        if arguments.command == "list":
            list_experiments()
        elif arguments.command == "run":
            only = chosen(arguments.name, arguments.only)
            how = {name: getattr(arguments, name) for name in ("workers", "threads", "limit_minutes")}
            if arguments.tune:
                if arguments.device != "cpu":
                    raise ValueError("rates are tuned on the CPU: leave --device out")
                return bool(tune(arguments.name, only, arguments.group, **how))
            runs = runs_of(arguments.name, arguments.seeds, only, arguments.setting, arguments.corpus, arguments.group)
            runs = [run.on(arguments.device) for run in runs]
            if arguments.again:
                return bool(run_again(runs, **how))
            return bool(sweep(runs, **how))
        elif arguments.command == "plot":
            for name in [arguments.name] if arguments.name else _with_results():
                importlib.import_module(f"experiments.{name}.plot").draw(HOME / name)
        else:
            claims = importlib.import_module("experiments.claims")  # not above: it brings matplotlib along
            results = claims.found_in(name=arguments.name or "")
            for name in [arguments.name] if arguments.name else NAMES:
                answers = claims.answers(results, name)
                write_tables(HOME / name, questions(name).BASELINE, hook(name, "summary"), answers)
            if not arguments.name:
                claims.write_claims(results)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
