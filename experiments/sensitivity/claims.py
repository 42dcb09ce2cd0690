"""Claims about facts, reading, and new text that is like text of the training."""

from pathlib import Path
from typing import Any

from engram.ablation.statistics import Interval
from experiments.lab.cell import Table
from experiments.lab.claims import PAPER, SCEPTICS, Claim, of_measures
from experiments.sensitivity.summary import never_taught, retention_gap


def _left_of_facts(home: Path, variants: dict[str, Any]) -> Interval | None:
    return retention_gap(variants.get("engram", {}))


def _like_what_was_said(home: Path, variants: dict[str, Any]) -> Interval | None:
    return never_taught(variants.get("engram", {}), variants.get("plain", {}))


def said_once(table: Table) -> bool:
    """Return True if the text of a table has each line once, not eight times."""
    return table.text.startswith("facts:1:")


def said_often(table: Table) -> bool:
    return not said_once(table)


CLAIMS = [
    Claim(
        PAPER,
        "Switched off, facts lose more than reading",
        "left of what teaching facts added, minus the same of prose said as often",
        of_measures(_left_of_facts, chosen=said_often),
        "below",
        short=22,
    ),
    Claim(
        SCEPTICS,
        "New text that is like repeated text is predicted better with the memory",
        "engram minus plain on facts never taught, nats per token",
        of_measures(_like_what_was_said, chosen=said_often),
        "below",
        "nats",
        short=4,
        counter=True,
    ),
    Claim(
        SCEPTICS,
        "New text that is like text said once is predicted better with the memory",
        "engram minus plain on facts never taught, nats per token",
        of_measures(_like_what_was_said, chosen=said_once),
        "below",
        "nats",
        short=23,
    ),
]
