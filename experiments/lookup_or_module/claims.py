"""Claims about the lookup and the module around it."""

from experiments.lab.claims import OTHERS, SCEPTICS, loss

CLAIMS = [
    loss(OTHERS, "Switching off overstates the value of the memory", "switched-off", "plain", "above", short=21),
    loss(SCEPTICS, "The module without the lookup does not explain the gain", "one-row", "engram", "worse", short=6),
    loss(SCEPTICS, "Random rows do not explain the gain", "random", "engram", "worse", short=7),
]
