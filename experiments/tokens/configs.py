"""What the memory gains with little and much training, up to several passes over the text: plain and engram each."""

from __future__ import annotations

from engram.lm.run import Setting
from experiments.lab.cell import HOME, SETTINGS, Run, change
from experiments.lab.tuning import rate_grid, tuned
from experiments.tokens.summary import summary

__all__ = ["BASELINE", "SIZE", "configs", "summary", "tune"]

BASELINE, SIZE = "plain", "tiny"
TABLES = ("text", "tokens")
TUNING = HOME / "tokens" / "tune.jsonl"
# Halvings and doublings of the setting's budget. At tiny the largest is more than one pass over the text, and the same
# budgets on a third of it (one of its three corpora) are several.
FACTORS = (0.25, 0.5, 1, 2, 4, 8)
SMALL_TEXT, SMALL_FACTORS = "kjv", (0.5, 1, 2, 4)
SLOWER = 0.01  # a table_lr below the tuned one, on the small text that repeats: do rows that move less lose less?
TUNED = (0.125, 0.25, 0.5, 1, 2)  # kneser_ney takes its rates from here: the smallest is one of its budgets


def budget(setting: Setting, factor: float) -> Setting:
    """Return a setting with `factor` times its tokens. A shorter one has a shorter warm-up, the same share of its
    steps; a longer one keeps the setting's."""
    tokens, warmup = round(setting.train.tokens * factor), setting.train.warmup_steps
    return change(setting, train={"tokens": tokens, "warmup_steps": max(1, round(warmup * min(1.0, factor)))})


def configs(size: str) -> list[Run]:
    runs = []
    for corpus, factors in ((SETTINGS[size].corpus, FACTORS), (SMALL_TEXT, SMALL_FACTORS)):
        for factor in factors:
            setting = change(budget(SETTINGS[size], factor), corpus=corpus)
            for arm in ("plain", "engram"):
                mine = change(setting, train=tuned(arm, setting, TUNING))
                runs.append(Run("tokens", arm, mine, size=size))
            if corpus == SMALL_TEXT and factor > 1:
                slower = change(mine, train={"table_lr": SLOWER})
                runs.append(Run("tokens", "engram", slower, variant=f"engram, table lr {SLOWER:g}", size=size))
    return runs


def tune() -> list[Run]:
    """Return a grid of lr for both arms at each budget of TUNED, at tiny on its own text; rows take the rate of engram
    there."""
    cells = []
    for factor in TUNED:
        setting = budget(SETTINGS["tiny"], factor)
        for arm in ("plain", "engram"):
            mine = change(setting, train=tuned(arm, SETTINGS["tiny"]))  # for its table_lr
            cells.append(Run("tokens", arm, mine, size="tiny"))
    return rate_grid(cells, TUNING, table_lrs=())
