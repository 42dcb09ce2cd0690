"""Recall within the text (MQAR, needles): is it better or worse with a memory, and with the memory switched off?"""

from __future__ import annotations

from dataclasses import replace

from experiments.config import SETTINGS, Run, change, tuned
from experiments.recall.summary import summary
from experiments.recall.task import VOCABULARY, Task, measure, train

__all__ = ["BASELINE", "SETTING", "configs", "measure", "summary", "train"]

BASELINE, SETTING = "plain", "T"
TASKS = {  # all of 65 tokens
    "MQAR, 16 pairs": "recall:16+0",
    "needle, 1 in 60": "recall:1+60",
    "needles, 4 in 48": "recall:4+48",
}
STEPS = {"T": 2000, "S": 6000}
ARMS = ("plain", "engram", "one-row")


def configs(setting_name: str) -> list[Run]:
    setting = SETTINGS[setting_name]
    runs = []
    for words, corpus in TASKS.items():
        length = Task.of(corpus).length
        model = replace(setting.model, vocab_size=VOCABULARY, max_length=length)
        train_how = {"context": length, "batch_size": 32, "tokens": STEPS[setting_name] * 32 * length}
        base = change(setting, corpus=corpus, vocab_size=VOCABULARY, model=model)
        for arm in ARMS:
            mine = change(base, train={**tuned(arm), **train_how})
            runs.append(Run("recall", arm, mine, group=f"{setting_name}: {words}"))
    return runs
