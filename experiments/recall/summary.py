"""Accuracy of recall with the memory on, with it off, and without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.measures import measured, paired, share_of, shown, table


def accuracy(state: str, what: str = "accuracy") -> Callable[[Any], float | None]:
    return lambda measures: measures[state][what] if state in measures else None


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
            cells = (shown(keyless), shown(on), shown(gain, "+.3f"), shown(off), shown(left, "+.3f"))
            lines.append((group, label, f"{len(runs)}", *cells))
    head = ("task", "arm", "seeds", "without keys", "accuracy", "minus plain's", "memory off", "off, minus on")
    return (
        "### Accuracy of the answers\n\nMeans over seeds, with 95 % intervals over seeds alone (Student's t). "
        "Without keys: how often the answer is said where a key is asked that is not in the text, so what is right "
        f"without looking anything up; 1 over the number of pairs for a model that knows the values.\n\n"
        f"{table(head, lines, words=2)}"
    )
