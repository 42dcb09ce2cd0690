"""A claim about storing rows as fp8."""

from pathlib import Path

from experiments.lab.claims import V41, Claim, Finding
from experiments.scripts.codecs.summary import budgets, cost


def fp8(home: Path) -> list[Finding]:
    """Return nats per token of trained models after their rows were stored as fp8, minus before."""
    return [
        Finding(cost(home, codecs["fp8"]), len(codecs["fp8"]), note=f"{tokens / 1e6:.2f}M tokens")
        for tokens, codecs in budgets(home).items()
    ]


CLAIMS = [
    Claim(
        V41,
        "Rows can be stored as fp8",
        "after storing as fp8 minus before, nats per token",
        fp8,
        "no worse",
        "nats",
    )
]
