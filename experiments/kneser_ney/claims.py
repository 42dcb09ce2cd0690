"""A claim about counts of at most as many bytes."""

from pathlib import Path

from experiments.kneser_ney.configs import WITH_PLAIN, against_engram
from experiments.lab.claims import SCEPTICS, Claim, Finding


def counts(home: Path) -> list[Finding]:
    """Return plain with counts minus engram of as many bytes."""
    return [
        Finding(row.nats, len(row.paired), table, note=f", {rows:,} rows")
        for table, rows, name, row, _ in against_engram(home)
        if name == WITH_PLAIN and row.nats is not None
    ]


CLAIMS = [
    Claim(
        SCEPTICS,
        "The memory is ahead of counts (Kneser-Ney) of at most as many bytes",
        f"{WITH_PLAIN} minus engram, nats per token",
        counts,
        "worse",
        "nats",
    )
]
