"""What the memory gains with small and large vocabularies, all trained on the same text: plain and engram each."""

from __future__ import annotations

from engram.lm.tokenizer import SMALLEST_VOCAB
from experiments.config import SETTINGS, Run, change, tuned

BASELINE, SETTING = "plain", "T"
VOCABULARIES = (SMALLEST_VOCAB, 1024, 4096, 16384)  # the smallest is bytes and the end-of-text token
EPOCHS = {"T": 0.14, "S": 0.83}  # about the tokens of the setting, where the vocabulary is 4,096


def configs(setting_name: str) -> list[Run]:
    setting, budget = SETTINGS[setting_name], (("epochs", EPOCHS[setting_name]),)
    runs = []
    for size in VOCABULARIES:
        group = f"{setting_name}: vocabulary {'bytes' if size == SMALLEST_VOCAB else f'{size:,}'}"
        for arm in ("plain", "engram"):
            mine = change(setting, vocab_size=size, train=tuned(arm, setting))
            runs.append(Run("vocabulary", arm, mine, budget, group=group))
    return runs
