"""Functions for questions that measure more than the loss: their measures by seed, and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram.ablation.statistics import Interval, over_seeds
from experiments.lab.cell import Table
from experiments.lab.report import tables_of
from experiments.lab.results import Record, read_results


def measured(home: Path) -> dict[Table, dict[str, dict[int, Record]]]:
    """Return {table: {variant: {seed: run}}} of the runs that carry measures."""
    tables = tables_of(read_results(home / "results.jsonl"))
    return {
        table: {name: {run["seed"]: run for run in runs if "measures" in run} for name, runs in variants.items()}
        for table, variants in tables.items()
    }


def on_and_off(model: Any, measure: Callable[[], Any]) -> dict[str, Any]:
    """Return {"on": measure(), "off": measure() with the memory taken out}; no "off" if the model has no memory."""
    by_state, memory = {"on": measure()}, model.memory
    if memory is not None:
        model.memory = None
        try:
            by_state["off"] = measure()
        finally:
            model.memory = memory
    return by_state


def mean_of(runs: dict[int, Record], get: Callable[[Any], float | None]) -> Interval | None:
    """Return get(measures) over seeds; None if no seed has it."""
    values = [get(run["measures"]) for run in runs.values()]
    known = [value for value in values if value is not None and np.isfinite(value)]
    return over_seeds(known) if known else None


def paired(
    ours: dict[int, Record], theirs: dict[int, Record], get: Callable[[Any], float | None], other: Any = None
) -> Interval | None:
    """Return get(ours) - other(theirs), seed by seed, over the seeds that both have. other: default get."""
    values = []
    for seed in sorted(set(ours) & set(theirs)):
        a, b = get(ours[seed]["measures"]), (other or get)(theirs[seed]["measures"])
        if a is not None and b is not None and np.isfinite(a) and np.isfinite(b):
            values.append(a - b)
    return over_seeds(values) if values else None


def cut(value: Interval, most: float = 1.0) -> Interval:
    """Return the part of an interval from 0 to `most`: Student's interval can exceed the range of a share."""
    return value if math.isinf(value.low) else value._replace(low=max(value.low, 0.0), high=min(value.high, most))


def share_of(runs: dict[int, Record], get: Callable[[Any], float | None]) -> Interval | None:
    """Return mean_of a value between 0 and 1."""
    mean = mean_of(runs, get)
    return None if mean is None else cut(mean)


def shown(value: Interval | None, form: str = ".3f") -> str:
    """ "0.123 (0.101 .. 0.145)"; the mean alone for one seed; "" without a value."""
    if value is None:
        return ""
    if math.isinf(value.low):
        return f"{value.mean:{form}} (one seed)"
    return f"{value.mean:{form}} ({value.low:{form}} .. {value.high:{form}})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], words: int = 1) -> str:
    """Return Markdown with the first `words` columns aligned to the left, all others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * words + "---:|" * (len(head) - words)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])
