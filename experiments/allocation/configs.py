"""One budget of parameters that are stored but mostly not in use, split between experts and table: is there a U?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engram.lm.run import Setting
from experiments.lab.cell import HOME, SETTINGS, Run, change
from experiments.lab.tuning import rate_grid, tuned

SIZE, TABLES = "tiny", ()
TUNING = HOME / "allocation" / "tune.jsonl"
BUDGET, TOP_K = 64, 2  # inactive experts per layer if the table gets nothing; TOP_K more are in use at any token
SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the table; at 1 only the TOP_K experts in use are left
TUNED = (0.0, 1 / 4, 1.0)  # other splits take the rate of the nearest of these


def label_of(share: float) -> str:
    return f"table {100 * share:g} %"


BASELINE = label_of(0.0)


def cells(size: str, shares: Sequence[float] = SHARES) -> list[Run]:
    setting = SETTINGS[size]
    setting = change(setting, train=tuned("engram", setting))
    rows = BUDGET * expert_parameters(setting) // (setting.memory.columns * setting.memory.head_dim)
    return [
        Run(
            "allocation",
            "moe+engram",
            setting,
            (("experts", TOP_K + round(BUDGET * (1 - share))), ("rows", round(rows * share)), ("top_k", TOP_K)),
            label_of(share),
            size,
        )
        for share in shares
    ]


def expert_parameters(setting: Setting) -> int:
    """Return the parameters of one expert in every layer. TOP_K experts are as wide as the plain feed-forward layer
    (squared ReLU, 8 d^2)."""
    return setting.model.layers * 8 * setting.model.hidden_size**2 // TOP_K


def configs(size: str) -> list[Run]:
    """Return the splits, each at the dense rate of the nearest split that was tuned, and plain, which has no such
    parameters."""
    setting = SETTINGS[size]
    runs = [Run("allocation", "plain", change(setting, train=tuned("plain", setting)), size=size)]
    for share, run in zip(SHARES, cells(size), strict=True):
        nearest = min(TUNED, key=lambda tuned_share: abs(tuned_share - share))
        runs.append(replace(run, setting=change(run.setting, train=tuned(label_of(nearest), setting, TUNING))))
    return runs


def tune() -> list[Run]:
    """Return a grid of lr for three splits, at tiny; rows take the rate of engram."""
    return rate_grid(cells("tiny", TUNED), TUNING, table_lrs=())
