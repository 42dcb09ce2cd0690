"""Claims about the split of a sparse budget between experts and table."""

from experiments.lab.claims import PAPER, loss

CLAIMS = [
    loss(PAPER, "A quarter of the budget in the table beats experts alone", "table 25 %", "table 0 %", "below"),
    loss(
        PAPER,
        "A quarter of the budget in the table beats the table alone: a U",
        *("table 25 %", "table 100 %", "below"),
        short=14,
    ),
]
