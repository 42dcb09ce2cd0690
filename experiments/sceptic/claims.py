"""Claims about the memory against everything a sceptic would try instead."""

from experiments.lab.claims import OTHERS, PAPER, SCEPTICS, loss

CLAIMS = [
    loss(PAPER, "The memory lowers the loss of a dense model", "engram", "plain", "below", short=5),
    loss(
        PAPER,
        "The memory lowers the loss more than experts of as many parameters and FLOPs",
        *("engram", "moe-active", "below"),
        short=13,
    ),
    loss(
        PAPER,
        "The memory is far ahead of n-gram embeddings at the input",
        *("engram", "over-encoding", "below"),
        short=9,
    ),
    loss(PAPER, "The gate earns its place", "gate-one", "engram", "above", short=15),
    loss(
        OTHERS,
        "Value embeddings (1/16 of the table) do not do as well as the memory",
        *("value-embeddings", "engram", "worse"),
        short=10,
    ),
    loss(
        OTHERS,
        "Hashed bigrams at every layer do not do as well as the memory",
        *("hashed-bigram", "engram", "worse"),
        short=8,
    ),
    loss(SCEPTICS, "As many weights in wider layers do not replace the memory", "wider", "engram", "worse", short=11),
    loss(
        SCEPTICS,
        "A larger vocabulary of as many bytes does not replace the memory",
        *("larger-vocabulary", "engram", "worse", "bits"),
        short=12,
    ),
    loss(SCEPTICS, "As many seconds of training do not replace the memory", "longer", "engram", "worse"),
    loss(
        SCEPTICS,
        "The memory is ahead of counts (Kneser-Ney) of at most as many bytes, in the sweep of all arms",
        *("kneser-ney", "engram", "worse"),
        short=1,
        counter=True,
    ),
    loss(
        SCEPTICS,
        "The memory is ahead of the nearest contexts of the training text (kNN-LM)",
        *("knn-lm (ivf, 1,024)", "engram", "worse"),
        short=2,
        counter=True,
    ),
]
