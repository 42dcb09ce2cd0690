"""A claim about the speed of a table in host memory."""

import math
from pathlib import Path

from engram.ablation.statistics import Interval
from experiments.lab.claims import PAPER, Claim, Finding
from experiments.lab.results import read_lines


def throughput(home: Path) -> list[Finding]:
    """Return tokens per second with a host table over without, minus 1; the script reports medians without an
    interval."""
    return [
        Finding(
            Interval(row[f"{phase}_ratio"] - 1, -math.inf, math.inf),
            1,
            note=f"{row['device']}, batch {row['batch']}, {phase}",
        )
        for row in read_lines(home / "results.jsonl")
        for phase in ("prefill", "decode")
    ]


CLAIMS = [
    Claim(
        PAPER,
        "A table in host memory costs under 3 % of the speed",
        "tokens per second over plain's, minus 1",
        throughput,
        "above -0.03",
    )
]
