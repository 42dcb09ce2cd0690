"""Loss against the number of rows, beside n-gram embeddings at the input with as many rows."""

from __future__ import annotations

from experiments.lab.cell import SETTINGS, Run, change
from experiments.lab.tuning import tuned

TABLES = ()
BASELINE, SIZE = "plain", "tiny"
ROWS = tuple(2**power for power in range(10, 23, 2))  # per head


def configs(size: str) -> list[Run]:
    setting = SETTINGS[size]
    runs = [Run("slots", "plain", change(setting, train=tuned("plain", setting)), size=size)]
    for arm in ("engram", "over-encoding"):
        for rows in ROWS:
            mine = change(setting, {"rows_per_head": rows}, tuned(arm, setting))
            options = (("rows", rows),) if arm == "over-encoding" else ()
            runs.append(Run("slots", arm, mine, options, f"{arm}, {rows:,} rows", size))
    return runs
