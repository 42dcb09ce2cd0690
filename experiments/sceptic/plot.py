"""Every arm's difference to plain, sorted."""

from __future__ import annotations

from pathlib import Path

from experiments.plots import dot_plots
from experiments.sceptic.configs import BASELINE


def draw(home: Path) -> Path:
    return dot_plots(home, BASELINE)
