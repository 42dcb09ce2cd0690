"""Does the lookup bring the gain, or the module around it? The controls, at two vocabulary sizes."""

from __future__ import annotations

from experiments.lab.cell import SETTINGS, Run, change
from experiments.lab.tuning import tuned

BASELINE, SIZE = "plain", "small"
ARMS = ("plain", "engram", "one-row", "random", "shuffled", "gate-one", "switched-off", "short-conv")
TABLES = ("vocabulary",)
VOCABULARIES = (1024, 4096)


def configs(size: str) -> list[Run]:
    setting = SETTINGS[size]
    runs = []
    for vocabulary in VOCABULARIES:
        for arm in ARMS:
            rates = tuned("engram" if arm == "switched-off" else arm, setting)
            mine = change(setting, vocab_size=vocabulary, train=rates)
            runs.append(Run("lookup_or_module", arm, mine, size=size))
    return runs
