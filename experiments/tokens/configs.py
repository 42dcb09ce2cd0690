"""What the memory gains with little and much training, up to several passes over the text: plain and engram each."""

from __future__ import annotations

from experiments.config import SETTINGS, Run, change, tuned

BASELINE, SETTING = "plain", "T"
# Halvings and doublings of the setting's budget. At T the largest is more than two passes over the text, and the same
# budgets on a third of it (one of its three corpora) are several.
FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16)
SMALL_TEXT, SMALL_FACTORS = "kjv", (0.5, 1, 2, 4, 8, 16)
SLOWER = 0.01  # a table_lr below the tuned one, where the small text repeats: are rows that move less spared?


def configs(setting_name: str) -> list[Run]:
    setting = SETTINGS[setting_name]
    runs = []
    for corpus, factors in ((setting.corpus, FACTORS), (SMALL_TEXT, SMALL_FACTORS)):
        for factor in factors:
            tokens = round(setting.train.tokens * factor)
            group = f"{setting_name}: {corpus}, {tokens / 1e6:05.2f}M tokens"
            for arm in ("plain", "engram"):
                mine = change(setting, train={**tuned(arm), "tokens": tokens}, corpus=corpus)
                runs.append(Run("tokens", arm, mine, group=group))
            if corpus == SMALL_TEXT and factor > 1:
                slower = change(mine, train={"table_lr": SLOWER})
                runs.append(Run("tokens", "engram", slower, label=f"engram, table lr {SLOWER:g}", group=group))
    return runs
