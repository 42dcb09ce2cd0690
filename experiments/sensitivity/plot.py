"""Draw what is left of facts and of reading when the memory is switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.lines import Line2D

from engram.ablation.statistics import Interval
from experiments.lab.measures import mean_of, measured
from experiments.lab.plots import COLOURS, INK, SOFT, STYLE, dot, new_figure, save
from experiments.sensitivity.summary import LEVELS, SHARES, learned_retention, retention

KINDS = ("above what was never said, next token", "said in training", "never said")


def draw(home: Path) -> Path:
    found = []  # (title, lines)
    for group, labels in measured(home).items():
        for label, runs in labels.items():
            lines = lines_of(runs)
            if any(value is not None for _, _, value in lines):
                found.append((f"{label}, {group}", lines))
    if not found:
        raise ValueError(f"{home / 'results.jsonl'} has no runs yet: python -m experiments run {home.name}")
    figure, panels = new_figure(7.2, [1.0 + 0.3 * len(found[0][1])] * len(found))
    with matplotlib.rc_context(STYLE):
        for axes, (title, lines) in zip(panels, found, strict=True):
            for place, (_, kind, value) in enumerate(lines):
                dot(axes, place, value, COLOURS[kind])
            axes.set_yticks(range(len(lines)), [words for words, _, _ in lines], color=INK)
            axes.set_ylim(len(lines) - 0.5, -0.5)
            axes.set_xlim(-0.3, 1.2)
            axes.axvline(1, color=SOFT, linewidth=1)
            axes.axvline(0, color=SOFT, linewidth=1)
            axes.grid(axis="y", visible=False)
            axes.set_title(f"{home.name}: {title}")
        panels[-1].set_xlabel("share left with the memory off (1: nothing lost; bars: 95 % over seeds)")
        key = [Line2D([], [], color=c, marker="o", label=words) for c, words in zip(COLOURS, KINDS, strict=False)]
        panels[-1].legend(handles=key, loc="upper center", bbox_to_anchor=(0.3, -0.2), ncols=3, fontsize=8)
    return save(figure, home)


def lines_of(runs: dict[int, Any]) -> list[tuple[str, int, Interval | None]]:
    """Return (words, index in KINDS, share left) from top to bottom."""
    added = ("what teaching added to facts", "what saying added to prose")
    lines = [(words, 0, mean_of(runs, learned_retention(name))) for words, name in zip(added, LEVELS, strict=True)]
    for name, words in SHARES.items():
        said = name in ("taught_exact", *LEVELS)
        lines.append((words, 1 if said else 2, mean_of(runs, retention(name))))
    return lines
