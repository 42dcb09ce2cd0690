"""Draw the controls' differences to plain, one panel per vocabulary."""

from __future__ import annotations

from pathlib import Path

from experiments.lab.plots import dot_plots
from experiments.lookup_or_module.configs import BASELINE


def draw(home: Path) -> Path:
    return dot_plots(home, BASELINE)
