"""Accuracy of recall with the memory on, with it off, and without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.measures import mean_of, measured, paired, shown, table


def accuracy(state: str) -> Callable[[Any], float | None]:
    return lambda measures: measures[state]["accuracy"] if state in measures else None


def summary(home: Path) -> str:
    lines = []
    for group, labels in measured(home).items():
        plain = labels.get("plain", {})
        for label, runs in labels.items():
            gain = None if label == "plain" else paired(runs, plain, accuracy("on"))
            left = None if label == "plain" else paired(runs, runs, accuracy("off"), accuracy("on"))
            on, off = (mean_of(runs, accuracy(state)) for state in ("on", "off"))
            lines.append(
                (group, label, f"{len(runs)}", shown(on), shown(gain, "+.3f"), shown(off), shown(left, "+.3f"))
            )
    head = ("task", "arm", "seeds", "accuracy", "minus plain's", "memory off", "off, minus on")
    return (
        "### Accuracy of the answers\n\nMeans over seeds, with 95 % intervals over seeds alone (Student's t). "
        f"By chance it is 1/64; with all values of the text known and their keys not, 1 over the number of pairs.\n\n"
        f"{table(head, lines, words=2)}"
    )
