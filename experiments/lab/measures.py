"""What experiments share that measure more than the loss: their measures by seed, and intervals over seeds."""

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
    """{table: {variant: {seed: run}}} of the runs that carry measures."""
    tables = tables_of(read_results(home / "results.jsonl"))
    return {
        table: {name: {run["seed"]: run for run in runs if "measures" in run} for name, runs in variants.items()}
        for table, variants in tables.items()
    }


def on_and_off(model: Any, measure: Callable[[], Any]) -> dict[str, Any]:
    """{"on": measure(), "off": measure() while the model has no memory}; no "off" where it has none anyway."""
    found, memory = {"on": measure()}, model.memory
    if memory is not None:
        model.memory = None
        try:
            found["off"] = measure()
        finally:
            model.memory = memory
    return found


def mean_of(runs: dict[int, Record], get: Callable[[Any], float | None]) -> Interval | None:
    """get(measures) over seeds; None where no seed has it."""
    values = [get(run["measures"]) for run in runs.values()]
    known = [value for value in values if value is not None and np.isfinite(value)]
    return over_seeds(known) if known else None


def paired(
    ours: dict[int, Record], theirs: dict[int, Record], get: Callable[[Any], float | None], other: Any = None
) -> Interval | None:
    """get(ours) - other(theirs), seed by seed, over the seeds that both have; other: default get."""
    values = []
    for seed in sorted(set(ours) & set(theirs)):
        a, b = get(ours[seed]["measures"]), (other or get)(theirs[seed]["measures"])
        if a is not None and b is not None and np.isfinite(a) and np.isfinite(b):
            values.append(a - b)
    return over_seeds(values) if values else None


def cut(value: Interval, most: float = 1.0) -> Interval:
    """The part of an interval from 0 to `most`: Student's knows nothing of what a share can be."""
    return value if math.isinf(value.low) else value._replace(low=max(value.low, 0.0), high=min(value.high, most))


def share_of(runs: dict[int, Record], get: Callable[[Any], float | None]) -> Interval | None:
    """mean_of something that lies between 0 and 1."""
    found = mean_of(runs, get)
    return None if found is None else cut(found)


def shown(value: Interval | None, form: str = ".3f") -> str:
    """ "0.123 (0.101 .. 0.145)"; the mean alone where there is one seed; nothing without a value."""
    if value is None:
        return ""
    if math.isinf(value.low):
        return f"{value.mean:{form}} (one seed)"
    return f"{value.mean:{form}} ({value.low:{form}} .. {value.high:{form}})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], words: int = 1) -> str:
    """Markdown; the first columns, as many as hold words, to the left, all others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * words + "---:|" * (len(head) - words)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])
