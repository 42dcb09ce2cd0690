"""Draw what each change to the memory does, against the memory of the setting."""

from __future__ import annotations

from pathlib import Path

from experiments.components.configs import BASELINE
from experiments.lab.plots import dot_plots


def draw(home: Path) -> Path:
    return dot_plots(home, BASELINE)
