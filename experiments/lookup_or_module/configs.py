"""Is it the lookup or the module around it? The controls, at two vocabulary sizes."""

from __future__ import annotations

from experiments.config import SETTINGS, Run, change, tuned

BASELINE, SETTING = "plain", "S"
ARMS = ("plain", "engram", "one-row", "random", "shuffled", "gate-one", "switched-off", "short-conv")
VOCABULARIES = (1024, 4096)


def configs(setting_name: str) -> list[Run]:
    setting = SETTINGS[setting_name]
    runs = []
    for size in VOCABULARIES:
        group = f"{setting_name}: vocabulary {size:,}"
        for arm in ARMS:
            rates = tuned("engram" if arm == "switched-off" else arm, setting)
            mine = change(setting, vocab_size=size, train=rates)
            runs.append(Run("lookup_or_module", arm, mine, group=group))
    return runs
