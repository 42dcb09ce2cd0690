"""python -m experiments list | run NAME | plot [NAME] | report [NAME] | new NAME: see experiments/README.md."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.lab.cell import HOME, LETTERS, SETTINGS, Run, hook, names, questions, size_named
from experiments.lab.report import by_numbers, document, write_tables
from experiments.lab.results import read_results
from experiments.lab.runner import run_again, sweep


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
    """["a,b", "c, d"] -> ["a", "b", "c, d"] if "c, d" is a variant. Raises ValueError: an unknown question."""
    variants = {run.variant for size in SETTINGS for run in questions(name).configs(size)}
    return only and [part for text in only for part in ([text] if text in variants else text.split(","))]


def runs_of(
    name: str,
    seeds: list[int],
    only: list[str] | None = None,
    size: str | None = None,
    corpus: str | None = None,
    groups: list[str] | None = None,
) -> list[Run]:
    """Return the runs of a question, all of a seed before the next seed's.

    Args:
        only: variants or arms to keep. groups: texts, one of which must be in the caption of a run's table.
        size: "small" or "tiny" instead of the question's own. corpus: another text than the setting's; its runs get a
            table of their own.

    Raises:
        ValueError: an unknown question; an `only` that no run has, or a text that no caption has.
    """
    module = questions(name)
    cells = module.configs(size or module.SIZE)
    if corpus is not None:
        cells = [replace(run, setting=replace(run.setting, corpus=corpus)) for run in cells]
    known = {name for run in cells for name in (run.variant, run.arm)}
    unknown = [arm for arm in only or () if arm not in known]
    if unknown:
        raise ValueError(f"{name} has no arm {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    missing = [part for part in groups or () if not any(_is_in(part, run) for run in cells)]
    if missing:
        captions = "; ".join(sorted({str(run.table) for run in cells}, key=by_numbers))
        raise ValueError(f"{name} has no group with {' or '.join(missing)} in its name; it has {captions}")
    return [run.seeded(seed) for seed in seeds for run in _keep(cells, only, groups)]


def _is_in(part: str, run: Run) -> bool:
    """Return True if a caption contains a text, with the size by its name or by its letter ("S:", "T:")."""
    caption = str(run.table)
    letters = {size: letter for letter, size in LETTERS.items()}
    return part in caption or part in caption.replace(run.size, letters.get(run.size, ""), 1)


def _keep(runs: list[Run], only: list[str] | None, groups: list[str] | None = None) -> list[Run]:
    """Return the runs of these variants, or of these arms if no variant has that name, in tables with one of these
    texts in their caption; None keeps all."""
    variants = {run.variant for run in runs}
    if only is not None:
        runs = [run for run in runs if run.variant in only or run.arm in set(only) - variants]
    return [run for run in runs if groups is None or any(_is_in(part, run) for part in groups)]


def tune(
    name: str,
    only: list[str] | None = None,
    groups: list[str] | None = None,
    limit_minutes: float | None = None,
    **how: Any,
) -> int:
    """Make the tuning runs of a question, seed 0; the later part of a grid depends on the earlier. Return how many
    failed."""
    module, began, failed = questions(name), time.monotonic(), 0
    if not hasattr(module, "tune"):
        raise ValueError(f"{name} has no grid of its own: its runs take the rates of sceptic")
    tried: set[str] = set()
    while True:
        runs = _keep(module.tune(), only, groups)
        if not runs:
            raise ValueError(f"{name} has no tuning run left after --only and --group")
        new = [run for run in runs if run.key not in tried]  # a run that failed is tried once
        left = None if limit_minutes is None else limit_minutes - (time.monotonic() - began) / 60
        if not new or (left is not None and left < 0):
            return failed
        tried |= {run.key for run in new}
        failed += sweep(new, limit_minutes=left, **how)


def list_experiments() -> None:
    for name in names():
        module = questions(name)
        done = {result["key"] for result in read_results(HOME / name / "results.jsonl")}
        cells = module.configs(module.SIZE)
        runs = [cell.seeded(seed) for cell in cells for seed in (0, 1, 2)]
        made = sum(run.key in done for run in runs)
        print(f"{name:18} {module.SIZE:5}  {len(cells):3} cells, {made:3} of {len(runs):3} runs", end="")
        other = f" and {len(done) - made} at other sizes or texts" if len(done) > made else ""
        print(f"{other}  {_question(module)}")


def _question(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().partition("\n")[0]


def _with_results() -> list[str]:
    return [name for name in names() if read_results(HOME / name / "results.jsonl")]


def plot(name: str) -> Path:
    """Draw home/figure.png with the question's own plot.py, or as dots with intervals if it has none."""
    if (HOME / name / "plot.py").exists():
        return importlib.import_module(f"experiments.{name}.plot").draw(HOME / name)
    plots = importlib.import_module("experiments.lab.plots")  # not above: it imports matplotlib
    return plots.dot_plots(HOME / name, questions(name).BASELINE)


def report(name: str | None) -> None:
    """Write tables.md of a question; without a name of all, with claims.md, claims_in_short.md and the lab's README."""
    page = importlib.import_module("experiments.lab.claims_page")
    results = page.all_findings(name=name or "")
    for one in [name] if name else names():
        module, home = questions(one), HOME / one
        text = document(home, module.BASELINE, hook(one, "summary"), page.answers(results, one))
        write_tables(home, one, text)
    if not name:
        page.write_claims(results)
        importlib.import_module("experiments.lab.readme").write_readme()


def new(name: str, home: Path = HOME) -> Path:
    """Write the skeleton of a question: a folder with configs.py and README.md. Return the folder.

    Raises:
        ValueError: a name that is not a Python identifier, or one that is taken.
    """
    folder = home / name
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"the name of a question is a lower-case Python identifier, not {name!r}")
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another name")
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "configs.py").write_text(SKELETON.format(name=name), encoding="utf-8")
    (folder / "README.md").write_text(READING.format(name=name), encoding="utf-8")
    return folder


SKELETON = '''"""Write the question here, in one line.

Write here what is compared, and why.
"""

from __future__ import annotations

from experiments.lab.cell import SETTINGS, Run, change
from experiments.lab.tuning import tuned

BASELINE, SIZE = "plain", "tiny"


def configs(size: str) -> list[Run]:
    setting = SETTINGS[size]
    return [Run("{name}", arm, change(setting, train=tuned(arm, setting)), size=size) for arm in ("plain", "engram")]
'''
READING = """# {name}

Write the reading here: what was asked, what came out, in three to six sentences without figures.
**Set the one sentence that answers the question in bold: the documentation shows it first.**

![the figure](figure.png)

Tables: [tables.md](tables.md).

## What this does not show
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the questions, and how many of their runs are made")
    run = commands.add_parser("run", help="make the runs that are missing")
    run.add_argument("name", choices=names(), metavar="NAME", help=", ".join(names()))
    run.add_argument("--seeds", type=seeds_of, default=[0, 1, 2], help="default 0,1,2")
    only = "variants or arms, with commas between them; repeat --only for a variant with commas in its name"
    run.add_argument("--only", action="append", help=only)
    run.add_argument("--group", action="append", help="only tables with this in their caption; may be repeated")
    sizes = "small (4 layers, 3.3M tokens) or tiny (2 layers, 0.56M tokens); default: the question's own"
    run.add_argument("--size", "--setting", type=_size, metavar="SIZE", help=sizes)
    run.add_argument("--corpus", help="another text, as engram.lm.corpus.load_corpus takes it")
    run.add_argument("--tune", action="store_true", help="make the learning-rate grid instead, of seed 0")
    run.add_argument("--workers", type=int, default=1, help="number of runs side by side (default 1)")
    run.add_argument(
        "--threads", type=int, default=1, help="threads of each run (default 1, which repeats to the last digit)"
    )
    run.add_argument(
        "--device", default="cpu", help="device of the dense weights, cpu (default) or cuda; tables stay in RAM"
    )
    run.add_argument("--again", action="store_true", help="make finished runs once more and compare the losses")
    run.add_argument("--limit-minutes", type=float, help="start no new run after this many minutes")
    for command, what in (
        ("plot", "draw figure.png from the results"),
        ("report", "write tables.md, and for all questions claims.md and claims_in_short.md in paper_notes/"),
    ):
        one = commands.add_parser(command, help=f"{what}; without NAME, of all questions")
        one.add_argument("name", choices=names(), metavar="NAME", nargs="?")
    skeleton = commands.add_parser("new", help="write the skeleton of a question: a folder with configs.py")
    skeleton.add_argument("name", metavar="NAME")
    return top


def _size(text: str) -> str:
    try:
        return size_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> int:
    """Return the exit status: 1 if a run failed or the input was bad."""
    arguments = parser().parse_args()
    try:
        if arguments.command == "list":
            list_experiments()
        elif arguments.command == "run":
            only = chosen(arguments.name, arguments.only)
            how = {name: getattr(arguments, name) for name in ("workers", "threads", "limit_minutes")}
            if arguments.tune:
                if arguments.device != "cpu":
                    raise ValueError("rates are tuned on the CPU: omit --device")
                return bool(tune(arguments.name, only, arguments.group, **how))
            runs = runs_of(arguments.name, arguments.seeds, only, arguments.size, arguments.corpus, arguments.group)
            runs = [run.on(arguments.device) for run in runs]
            if arguments.again:
                return bool(run_again(runs, **how))
            return bool(sweep(runs, **how))
        elif arguments.command == "plot":
            for name in [arguments.name] if arguments.name else _with_results():
                plot(name)
        elif arguments.command == "new":
            print(f"{new(arguments.name)}: edit configs.py, then python -m experiments run {arguments.name}")
        else:
            report(arguments.name)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
