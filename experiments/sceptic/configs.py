"""Does any arm that a sceptic would try do as well as Engram? All at learning rates tuned per arm."""

from __future__ import annotations

from typing import Any

from experiments.arms import vocabulary_for
from experiments.lab.cell import HOME, SETTINGS, Run, change
from experiments.lab.results import read_results
from experiments.lab.tuning import TABLE_LRS, rate_grid, tuned

BASELINE, SIZE = "plain", "small"
TUNING = HOME / "sceptic" / "tune.jsonl"

# Arms with a training of their own; True: their rows have a learning rate of their own.
TRAINED = {
    "plain": False,
    "engram": True,
    "one-row": True,
    "random": False,
    "shuffled": True,
    "gate-one": True,
    "wider": False,
    "deeper": False,
    "bigram-embedding": True,
    "hashed-bigram": True,
    "over-encoding": True,
    "value-embeddings": True,
    "layer-embeddings": True,
    "larger-vocabulary": False,
    "short-conv": False,
    "moe-total": False,
    "moe-active": False,
    "product-key": True,
}
# (label, arm, options) with a grid of its own: each trained arm, and variants that follow the source of an arm where
# the arm itself is matched to Engram.
TUNED: tuple[tuple[str, str, tuple[tuple[str, Any], ...]], ...] = (
    *((arm, arm, ()) for arm in TRAINED),
    ("short-conv (every layer)", "short-conv", (("everywhere", True),)),
    ("product-key (batch norm)", "product-key", (("norm", "batch"),)),
)
# A run takes ten minutes, so only the two that every conclusion at small is about, and the nearest rival.
TUNED_AT_SMALL = ("engram", "plain", "hashed-bigram")
# Rows that are added to the hidden state without a projection need smaller steps.
BARE_ROWS = {arm: (0.001, 0.003, 0.01) for arm in ("bigram-embedding", "hashed-bigram")}
# Tokens of a text with the larger vocabulary over its tokens with the usual one, so that the same text is read.
SHORTER = 0.78
DATASTORE = 1_000_000  # at most, keys of the exact index: a query reads them all
# (label, arm, options, arm whose rates it takes): one of the above with another step after training, or trained longer.
DERIVED = (
    ("longer", "longer", (), "plain"),
    ("switched-off", "switched-off", (), "engram"),
    ("kneser-ney", "kneser-ney", (), "plain"),
    ("knn-lm (exact, 1,024)", "knn-lm", (("index", "exact"), ("k", 1024), ("limit", DATASTORE)), "plain"),
    ("knn-lm (ivf, 1,024)", "knn-lm", (("index", "ivf"), ("k", 1024)), "plain"),
    ("knn-lm (ivfpq, 1,024)", "knn-lm", (("index", "ivfpq"), ("k", 1024)), "plain"),
)


def configs(size: str) -> list[Run]:
    setting = SETTINGS[size]
    runs = []
    for label, arm, options, rates_of in (*((*cell, cell[0]) for cell in TUNED), *DERIVED):
        mine = change(setting, train=tuned(rates_of, setting))
        if arm == "longer":
            mine = change(mine, train={"tokens": round(setting.train.tokens * slowdown())})
        if arm == "larger-vocabulary":
            shorter = {"tokens": round(setting.train.tokens * SHORTER)}
            mine = change(mine, train=shorter, vocab_size=vocabulary_for(setting))
        runs.append(Run("sceptic", arm, mine, options, label, size))
    return runs


def tune() -> list[Run]:
    """Return a grid for every trained arm at tiny, where arms without rows have no second rate, and of lr at small for
    TUNED_AT_SMALL, where bare rows have a grid of their second rate too."""
    runs = []
    for label, arm, options in TUNED:
        setting = SETTINGS["tiny"]
        if arm == "larger-vocabulary":
            setting = change(setting, vocab_size=vocabulary_for(setting))
        bare = BARE_ROWS.get(arm)
        if bare is not None:
            setting = change(setting, train={"table_lr": bare[1]})
        cell = Run("sceptic", arm, setting, options, label, "tiny")
        runs += rate_grid([cell], TUNING, table_lrs=bare or TABLE_LRS if TRAINED[arm] else ())
    setting = SETTINGS["small"]
    for arm in TUNED_AT_SMALL:
        mine = change(setting, train=tuned(arm, SETTINGS["tiny"]))  # for its table_lr
        cell = Run("sceptic", arm, mine, size="small")
        runs += rate_grid([cell], TUNING, table_lrs=BARE_ROWS.get(arm, ()))
    return runs


def slowdown() -> float:
    """Return how many tokens plain trains on while engram trains on one. It compares the fastest tuning run of each,
    which other work on the machine disturbed least, in steps of 0.05 so that one more run hardly changes what "longer"
    means; 1.1 before there are tuning runs."""
    speed = {
        arm: [r["tokens"] / r["train_seconds"] for r in read_results(TUNING) if r["variant"] == arm]
        for arm in ("plain", "engram")
    }
    if not all(speed.values()):
        return 1.1
    return round(max(1.0, max(speed["plain"]) / max(speed["engram"])) * 20) / 20
