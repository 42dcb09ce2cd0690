"""Learning rates: grids that go on beyond their edges, and the best rates of an arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from engram.lm.run import Setting
from experiments.lab.cell import HOME, Run, change
from experiments.lab.results import read_results

LRS, TABLE_LRS = (1.5e-3, 3e-3, 6e-3), (0.01, 0.03, 0.1)
# Rates that a grid goes on with if its best rate is its smallest or largest, up to WIDEST rates.
LADDERS = {
    "lr": (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
    "table_lr": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
}
WIDEST = 6


def tuned(arm: str, setting: Setting, file: Path | None = None, tokens: float = 0) -> dict[str, float]:
    """Return the learning rates {"lr", "table_lr"} with the lowest loss of an arm's tuning runs; {} before any ran. The
    best rate falls as training gets longer: if an arm was tuned at several budgets, the one nearest (by ratio) to the
    training's counts.

    Args:
        arm: the variant of the tuning runs. file: their tune.jsonl; default: that of sceptic, which tunes all arms.
        tokens: about how many the training takes, if passes over a text decide; default: the setting's.
    """
    tokens = tokens or setting.train.tokens
    results = [r for r in _runs_of(file or HOME / "sceptic" / "tune.jsonl") if r["variant"] == arm]
    if not results:
        return {}
    budget = min((budget_of(r) for r in results), key=lambda count: abs(math.log(count / tokens)))
    best = min((r for r in results if budget_of(r) == budget), key=lambda r: (r["loss"], r["key"]))["setting"]["train"]
    return {"lr": best["lr"], "table_lr": best["table_lr"]}


def _runs_of(file: Path) -> list[dict[str, Any]]:
    version = file.stat() if file.exists() else None
    return _read(file, version and (version.st_ino, version.st_mtime_ns, version.st_size))


@lru_cache(maxsize=2)  # each variant of each question is given its rates from one file
def _read(file: Path, version: tuple[int, ...] | None) -> list[dict[str, Any]]:
    return read_results(file)


def budget_of(result: dict[str, Any]) -> int:
    """Return the tokens of training in a run's configuration."""
    return int(result["setting"]["train"]["tokens"])


def rate_grid(
    cells: Iterable[Run], file: Path, lrs: Sequence[float] = LRS, table_lrs: Sequence[float] = TABLE_LRS
) -> list[Run]:
    """Return the tuning runs of some cells: first every lr at the cell's own table_lr, then, once those are in `file`,
    every table_lr at the best lr. A grid whose best rate is at its edge goes on by one rate of LADDERS, up to WIDEST
    rates. Pass table_lrs=() for arms without a table, lrs=() to keep lr."""
    done = {result["key"]: result["loss"] for result in read_results(file)}
    runs = []
    for cell in cells:
        cell = replace(cell, held_out="tune")
        first = _grid(cell, "lr", lrs, done)
        runs += first
        if all(run.key in done for run in first):
            runs += _grid(min(first, key=lambda run: done[run.key]), "table_lr", table_lrs, done)
    return list({run.key: run for run in runs}.values())


def _grid(cell: Run, rate: str, values: Sequence[float], done: dict[str, float]) -> list[Run]:
    """Return the cell at each value of a rate, and at the next of the ladder while the best is at the edge; [cell]
    without values."""
    while values:
        runs = [_rates(cell, **{rate: value}) for value in values]
        if len(values) >= WIDEST or not all(run.key in done for run in runs):
            return runs
        best = min(range(len(runs)), key=lambda at: done[runs[at].key])
        step = {0: -1, len(runs) - 1: 1}.get(best, 0)
        at = LADDERS[rate].index(values[best]) + step
        if step == 0 or not 0 <= at < len(LADDERS[rate]):
            return runs
        values = sorted({*values, LADDERS[rate][at]})
    return [cell]


def _rates(run: Run, **rates: float) -> Run:
    return replace(run, setting=change(run.setting, train=rates))
