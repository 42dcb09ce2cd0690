"""What is lost when the memory is switched off: facts that were taught, or the reading of text?"""

from __future__ import annotations

from experiments.lab.cell import SETTINGS, Run, change
from experiments.lab.tuning import tuned
from experiments.sensitivity.facts import prepare
from experiments.sensitivity.measure import measure
from experiments.sensitivity.summary import summary

__all__ = ["BASELINE", "MAKES", "SIZE", "configs", "measure", "summary"]

BASELINE, SIZE = "plain", "tiny"
MAKES = {"facts": prepare}
EPOCHS = 1.0  # one pass: every copy of a fact is met once
TOKENS = 1_600_000  # about, of that pass; the text with each line once is shorter, and takes the same rates
CORPORA = {"facts:wiki": ("plain", "engram", "one-row"), "facts:1:wiki": ("plain", "engram")}


def configs(size: str) -> list[Run]:
    setting = SETTINGS[size]
    return [
        Run(
            "sensitivity",
            arm,
            change(setting, train=tuned(arm, setting, tokens=TOKENS), corpus=corpus),
            (("epochs", EPOCHS),),
            arm,
            size,
        )
        for corpus, arms in CORPORA.items()
        for arm in arms
    ]
