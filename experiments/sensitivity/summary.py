"""Tables of facts and reading with the memory on and off, and how much of each is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram.lm.statistics import Interval
from experiments.measures import mean_of, measured, paired, shown, table
from experiments.report import Record

# What is measured, and its level for a model that knows nothing (of 16 answers one is right by chance).
SHARES = {
    "taught_exact": ("taught facts, whole description", 0.0),
    "taught_top1": ("taught facts, next token", 0.0),
    "taught_rank": ("taught facts, best of 16", 1 / 16),
    "untaught_rank": ("facts never taught, best of 16", 1 / 16),
    "reading_top1": ("held-out text, next token", 0.0),
    "copied_top1": ("held-out text, what stands in it already", 0.0),
}
LOSSES = {
    "taught_nats": "taught facts",
    "untaught_nats": "facts never taught",
    "reading_nats": "held-out text",
}


def of(state: str, name: str) -> Callable[[Any], float | None]:
    return lambda measures: measures[state][name] if state in measures else None


def retention(name: str) -> Callable[[Any], float | None]:
    """Of measures -> what is left of a share with the memory off, above the level of knowing nothing; None where
    nothing was there with it on."""
    level = SHARES[name][1]

    def left(measures: Any) -> float | None:
        on, off = (of(state, name)(measures) for state in ("on", "off"))
        return None if on is None or off is None or on <= level else (off - level) / (on - level)

    return left


def retention_gap(runs: dict[int, Record], fact: str = "taught_top1", text: str = "reading_top1") -> Interval | None:
    """What is left of facts minus what is left of reading, over seeds: below 0, facts lean on the memory more."""
    return paired(runs, runs, retention(fact), retention(text))


def summary(home: Path) -> str:
    parts = []
    for group, labels in measured(home).items():
        plain = labels.get("plain", {})
        lines = []
        for name, (words, _) in SHARES.items():
            for label, runs in labels.items():
                on, off = (mean_of(runs, of(state, name)) for state in ("on", "off"))
                kept = mean_of(runs, retention(name))
                gain = None if label == "plain" else paired(runs, plain, of("on", name))
                lines.append((words, label, shown(on), shown(off), shown(kept, ".2f"), shown(gain, "+.3f")))
        head = ("share right", "arm", "memory on", "memory off", "left of it", "on, minus plain's")
        losses = []
        for name, words in LOSSES.items():
            for label, runs in labels.items():
                on, off = (mean_of(runs, of(state, name)) for state in ("on", "off"))
                cost = paired(runs, runs, of("off", name), of("on", name))
                gain = None if label == "plain" else paired(runs, plain, of("on", name))
                losses.append((words, label, shown(on), shown(off), shown(cost, "+.3f"), shown(gain, "+.3f")))
        loss_head = ("nats a token", "arm", "memory on", "memory off", "off, minus on", "on, minus plain's")
        gap = retention_gap(labels.get("engram", {}))
        parts += [
            f"### Memory on and off, {group}",
            "Means over seeds, with 95 % intervals over seeds alone (Student's t).",
            table(head, lines, words=2),
            table(loss_head, losses, words=2),
            "Left of the next tokens of taught facts, minus left of those of held-out text, engram: "
            f"{shown(gap, '+.2f') or 'no runs'}.",
        ]
    return "\n\n".join(parts)
