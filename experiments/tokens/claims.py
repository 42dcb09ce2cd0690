"""Claims about the length of training and about text that repeats."""

from experiments.lab.cell import SETTINGS
from experiments.lab.claims import OTHERS, SCEPTICS, Claim, lasts
from experiments.tokens.summary import twice_the_tokens

CLAIMS = [
    lasts(OTHERS, "The gain lasts through several passes over a text", "tokens", "several", short=3, counter=True),
    lasts(SCEPTICS, "The gain lasts with more tokens within one pass", "tokens", "one"),
    lasts(
        SCEPTICS,
        "The gain lasts with more tokens than the tiny size has, within one pass",
        *("tokens", "one", SETTINGS["tiny"].train.tokens),
        short=20,
    ),
    Claim(
        SCEPTICS,
        "Twice the training does not replace the memory",
        "plain with twice the tokens minus engram, nats per token",
        twice_the_tokens,
        "worse",
        "nats",
    ),
]
