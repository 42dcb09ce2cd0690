"""Claims about the number of rows."""

from experiments.lab.claims import PAPER, Claim
from experiments.slots.summary import ahead, fitted

CLAIMS = [
    Claim(
        PAPER,
        "The memory is ahead of n-gram embeddings with as many rows",
        "engram minus over-encoding with the most rows, nats per token",
        ahead,
        "below",
        "nats",
    ),
    Claim(
        PAPER,
        "Loss falls with the number of rows",
        "slope over log2(rows), nats per token and per doubling",
        fitted("slope"),
        "below",
        "nats",
        short=18,
    ),
    Claim(
        PAPER,
        "Loss falls linearly in the logarithm of the rows",
        "the size farthest from the line, minus the line, nats per token",
        fitted("off"),
        "near",
        "nats",
    ),
]
