"""Accuracy of recall with the memory on, with it off, and without one, and how soon it is learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from engram.ablation.statistics import over_seeds
from experiments.lab.measures import measured, paired, share_of, shown, table
from experiments.lab.results import Record
from experiments.recall.task import Task


def accuracy(state: str, what: str = "accuracy") -> Callable[[Any], float | None]:
    return lambda measures: measures[state][what] if state in measures else None


def half_way(run: Record) -> float:
    """Return half the loss of an even guess among the values of a text, in nats per answer: recall counts as learned
    below it."""
    return math.log(Task.of(run["setting"]["corpus"]).pairs) / 2


def learned_after(run: Record) -> float | None:
    """Return the millions of training tokens after which the loss first falls below half_way; None if it never does.
    The loss is of texts that were not read before, because no text comes twice in training."""
    level, curve = half_way(run), run["curve"]
    if curve[0][1] < level:
        return curve[0][0] / 1e6
    for (fewer, high), (more, low) in pairwise(curve):
        if low < level:
            return (fewer + (high - level) / (high - low) * (more - fewer)) / 1e6
    return None


def _after(runs: dict[int, Record]) -> str:
    counts = [learned_after(run) for run in runs.values()]
    known = [value for value in counts if value is not None]
    if len(known) < len(counts):
        return f"{len(known)} of {len(counts)} seeds learn" if known else "not learned"
    return shown(over_seeds(known), ".2f") if known else ""


def summary(home: Path) -> str:
    lines = []
    for group, labels in measured(home).items():
        plain = labels.get("plain", {})
        for label, runs in labels.items():
            gain = None if label == "plain" else paired(runs, plain, accuracy("on"))
            left = None if label == "plain" else paired(runs, runs, accuracy("off"), accuracy("on"))
            on, off, keyless = (
                share_of(runs, get) for get in (accuracy("on"), accuracy("off"), accuracy("on", "keyless"))
            )
            cells = (shown(keyless), shown(on), shown(gain, "+.3f"), _after(runs), shown(off), shown(left, "+.3f"))
            lines.append((group, label, f"{len(runs)}", *cells))
    head = (
        *("task", "arm", "seeds", "without keys", "accuracy", "minus plain's", "learned after, M tokens"),
        *("memory off", "off, minus on"),
    )
    return (
        "### Accuracy of the answers\n\nMeans over seeds, with 95 % intervals over seeds alone (Student's t). "
        "Without keys: how often the answer is said where a key is asked that is not in the text, so what is right "
        "without looking anything up; 1 over the number of pairs for a model that knows the values. Learned: the "
        "training tokens after which the loss of texts not read before is below half that of an even guess among the "
        f"text's values.\n\n{table(head, lines, words=2)}"
    )
