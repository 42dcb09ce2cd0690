"""What the memory gains with small and large vocabularies, all trained on the same text: plain and engram each."""

from __future__ import annotations

from engram.lm.tokenizer import SMALLEST_VOCAB
from experiments.config import SETTINGS, Run, change, tuned

BASELINE, SETTING = "plain", "T"
# Entries, and about how many tokens a text takes over those with 4,096. The smallest: bytes and the end-of-text token.
VOCABULARIES = {SMALLEST_VOCAB: 3.3, 1024: 1.3, 4096: 1.0, 16384: 0.8}
EPOCHS = {"T": 0.14, "S": 0.83}  # about the tokens of the setting, where the vocabulary is 4,096


def configs(setting_name: str) -> list[Run]:
    setting, budget = SETTINGS[setting_name], (("epochs", EPOCHS[setting_name]),)
    runs = []
    for size, length in VOCABULARIES.items():
        group = f"{setting_name}: vocabulary {size:,}{' (bytes)' if size == SMALLEST_VOCAB else ''}"
        for arm in ("plain", "engram"):
            rates = tuned(arm, setting, tokens=length * setting.train.tokens)
            mine = change(setting, vocab_size=size, train=rates)
            runs.append(Run("vocabulary", arm, mine, budget, group=group))
    return runs
