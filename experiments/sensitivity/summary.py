"""Tables of facts and reading with the memory on and off, and how much of each is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram.ablation.statistics import Interval
from experiments.lab.measures import mean_of, measured, paired, share_of, shown, table
from experiments.lab.results import Record

SHARES = {
    "taught_exact": "taught facts, whole description",
    "taught_top1": "taught facts, next token",
    "prose_top1": "prose said as often, next token",
    "untaught_top1": "facts never taught, next token",
    "new_prose_top1": "new prose of that kind, next token",
    "reading_top1": "held-out text, next token",
    "copied_top1": "held-out text, what stands in it already",
}
FAINT = 0.05  # the retention of a smaller share is noise
# Lines of the same kind that were never taught: a model has as much right without having learned any of them.
LEVELS = {"taught_top1": "untaught_top1", "prose_top1": "new_prose_top1"}
LOSSES = {
    "taught_nats": "taught facts",
    "prose_nats": "prose said as often",
    "untaught_nats": "facts never taught",
    "new_prose_nats": "new prose of that kind",
    "reading_nats": "held-out text",
}


def of(state: str, name: str) -> Callable[[Any], float | None]:
    return lambda measures: measures[state].get(name) if state in measures else None


def retention(name: str) -> Callable[[Any], float | None]:
    """Return a function from measures to the share with the memory off over the same with it on, as the paper defines
    it; None if one of them is missing or the share with the memory on is below FAINT."""

    def left(measures: Any) -> float | None:
        on, off = (of(state, name)(measures) for state in ("on", "off"))
        return None if on is None or off is None or on < FAINT else off / on

    return left


def learned_retention(name: str) -> Callable[[Any], float | None]:
    """Return the same of what teaching added: shares above those of LEVELS in the same state."""

    def left(measures: Any) -> float | None:
        on, off, on_level, off_level = (
            of(state, which)(measures) for which in (name, LEVELS[name]) for state in ("on", "off")
        )
        if on is None or off is None or on_level is None or off_level is None or on <= on_level:
            return None
        return (off - off_level) / (on - on_level)

    return left


def retention_gap(runs: dict[int, Record]) -> Interval | None:
    """Return what is left of what teaching facts added, minus the same of prose that was repeated as often, over seeds.
    Below 0, facts depend on the memory more than other memorised text."""
    return paired(runs, runs, learned_retention("taught_top1"), learned_retention("prose_top1"))


def never_taught(ours: dict[int, Record], plain: dict[int, Record]) -> Interval | None:
    """Return nats per token of facts that were never taught, but are like the taught ones, minus plain's,
    over seeds."""
    return paired(ours, plain, of("on", "untaught_nats"))


def summary(home: Path) -> str:
    parts = []
    for group, labels in measured(home).items():
        plain = labels.get("plain", {})
        lines = []
        for name, words in SHARES.items():
            for label, runs in labels.items():
                on, off = (share_of(runs, of(state, name)) for state in ("on", "off"))
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
        loss_head = ("nats per token", "arm", "memory on", "memory off", "off, minus on", "on, minus plain's")
        parts += [
            f"### Memory on and off, {group}",
            "Means over seeds, with 95 % intervals over seeds alone (Student's t).",
            table(head, lines, words=2),
            table(loss_head, losses, words=2),
            _contrasts(labels.get("engram", {})),
        ]
    return "\n\n".join(parts)


def _contrasts(runs: dict[int, Record]) -> str:
    reading = retention("reading_top1")
    found = (
        ("left of taught facts, minus left of held-out text", paired(runs, runs, retention("taught_top1"), reading)),
        ("left of never taught facts, minus the same", paired(runs, runs, retention("untaught_top1"), reading)),
        ("left of what teaching facts added", mean_of(runs, learned_retention("taught_top1"))),
        ("left of what saying prose as often added", mean_of(runs, learned_retention("prose_top1"))),
        ("the one minus the other", retention_gap(runs)),
    )
    lines = [(words, f"{len(runs)}", shown(value, ".2f") or "no runs") for words, value in found]
    return table(("next tokens, engram", "seeds", "share"), lines)
