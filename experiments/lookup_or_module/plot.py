"""The controls' differences to plain, one panel per vocabulary."""

from __future__ import annotations

from pathlib import Path

from experiments.lookup_or_module.configs import BASELINE
from experiments.plots import dot_plots


def draw(home: Path) -> Path:
    return dot_plots(home, BASELINE)
