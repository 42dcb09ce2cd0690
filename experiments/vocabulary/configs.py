"""What the memory gains with small and large vocabularies, all trained on the same text: plain and engram each."""

from __future__ import annotations

from engram.lm.tokenizer import SMALLEST_VOCAB
from experiments.lab.cell import SETTINGS, Run, change
from experiments.lab.tuning import tuned

BASELINE, SIZE = "plain", "tiny"
TABLES = ("vocabulary",)
# Entries, and about how many tokens a text takes over those with 4,096. The smallest: bytes and the end-of-text token.
VOCABULARIES = {SMALLEST_VOCAB: 3.3, 1024: 1.3, 4096: 1.0, 16384: 0.8}
EPOCHS = {"tiny": 0.14, "small": 0.83}  # about the tokens of the setting if the vocabulary is 4,096


def configs(size: str) -> list[Run]:
    setting, budget = SETTINGS[size], (("epochs", EPOCHS[size]),)
    runs = []
    for entries, length in VOCABULARIES.items():
        for arm in ("plain", "engram"):
            rates = tuned(arm, setting, tokens=length * setting.train.tokens)
            mine = change(setting, vocab_size=entries, train=rates)
            runs.append(Run("vocabulary", arm, mine, budget, size=size))
    return runs
