"""Loss against the number of rows, beside n-gram embeddings at the input with as many rows."""

from __future__ import annotations

from experiments.config import SETTINGS, Run, change, tuned

BASELINE, SETTING = "plain", "T"
ROWS = tuple(2**power for power in range(10, 23, 2))  # a head


def configs(setting_name: str) -> list[Run]:
    setting = SETTINGS[setting_name]
    runs = [Run("slots", "plain", change(setting, train=tuned("plain", setting)), group=setting_name)]
    for arm in ("engram", "over-encoding"):
        for rows in ROWS:
            mine = change(setting, {"rows_per_head": rows}, tuned(arm, setting))
            options = (("rows", rows),) if arm == "over-encoding" else ()
            runs.append(Run("slots", arm, mine, options, f"{arm}, {rows:,} rows", setting_name))
    return runs
