"""Recall within the text (MQAR, needles): is it better or worse with a memory, and with the memory switched off?"""

from __future__ import annotations

from dataclasses import replace

from experiments.lab.cell import HOME, SETTINGS, Run, change
from experiments.lab.tuning import rate_grid, tuned
from experiments.recall.summary import summary
from experiments.recall.task import VOCABULARY, Task, evaluate, measure, prepare, train

__all__ = ["BASELINE", "MAKES", "SIZE", "configs", "evaluate", "measure", "summary", "train", "tune"]

BASELINE, SIZE = "plain", "tiny"
MAKES = {"recall": prepare}
TUNING = HOME / "recall" / "tune.jsonl"
EASIEST, HARDEST = "MQAR, 4 pairs", "needles, 8 in 16"
TASKS = {
    EASIEST: "recall:4/4+0",
    "needles, 4 in 8": "recall:4/4+8",
    HARDEST: "recall:8/8+16",
}
TEXTS = {corpus: words for words, corpus in TASKS.items()}  # captions
STEPS, BATCH = {"tiny": 1500, "small": 3000}, 64
ARMS = ("plain", "engram", "one-row", "short-conv")
# Rows usually learn far faster than the weights of the other arms. Slow rows take a tenth of the dense rate: their row
# optimizer has no bias correction, and its first steps are ten times its rate.
SLOW, SLOWER = "engram, slow rows", 0.1
# Each arm learns the task below some rate and not above it: a grid of rates that are all too high is flat, and its best
# rate does not show the direction in which to go on.
LRS = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3)
# All tasks are run at the rate of MQAR. Arms that do not learn the hardest task at that rate get a grid on that task:
# if the grid is flat, the rate is not the reason.
HARD_ARMS, HARD_LRS = ("plain", "short-conv"), LRS[:3]


def configs(size: str) -> list[Run]:
    rates = {
        arm: tuned(arm, SETTINGS["tiny"], TUNING) for arm in ARMS
    }  # tuned() takes the nearest budget, which is MQAR's
    lr = rates["engram"].get("lr", SETTINGS["tiny"].train.lr)
    runs = []
    for words in TASKS:
        runs += [_cell(size, words, arm, rates[arm]) for arm in ARMS]
        runs.append(_cell(size, words, "engram", {"lr": lr, "table_lr": SLOWER * lr}, SLOW))
    return runs


def _cell(size: str, words: str, arm: str, rates: dict[str, float], variant: str = "") -> Run:
    setting, corpus = SETTINGS[size], TASKS[words]
    length = Task.of(corpus).length
    model = replace(setting.model, vocab_size=VOCABULARY, max_length=length)
    train_how = {"context": length, "batch_size": BATCH, "tokens": STEPS[size] * BATCH * length}
    mine = change(setting, corpus=corpus, vocab_size=VOCABULARY, model=model, train={**rates, **train_how})
    return Run("recall", arm, mine, variant=variant, size=size)


def tune() -> list[Run]:
    """Return a grid of lr for every arm on MQAR, at tiny, and for HARD_ARMS on the hardest task; rows take the rate of
    engram on text. One row at its own rate, ten times as high, learns nothing here at any lr."""
    rows = {"table_lr": tuned("engram", SETTINGS["tiny"])["table_lr"]}
    grids = ((EASIEST, ARMS, LRS), (HARDEST, HARD_ARMS, HARD_LRS))
    return [
        run
        for words, some, lrs in grids
        for run in rate_grid([_cell("tiny", words, arm, rows) for arm in some], TUNING, lrs, table_lrs=())
    ]
